"""`agon audit`: whether a run lost or repeated anything, told from its files by code that had no part in writing them.

It reads the ledger's tables and the Parquet files as they are, by its own queries and with pyarrow alone:

    damaged     a file that counts is missing, or has another size or digest than the ledger says; of its iteration
                only the steps are looked at then
    lost        a pair that was accepted, or the scores of a prompt, are missing where they should be; a batch of a
                finished iteration was never acknowledged; an iteration asked for fewer prompts than it should have; or
                the weights of the last one are in no checkpoint that counts
    repeated    a pair is in more acknowledged batches than the iteration has epochs, two batches took one step, or
                the stream of prompts did not go on with an iteration; or weights on disk contain other batches than
                the ledger says
    rejudged    a prompt's completions were scored twice in one iteration
    stale       a pair was sampled by another policy than the one its iteration started from; with pipeline.mode=async:
                than one that is at most pipeline.max_staleness updates behind that one
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import xxhash

from conf.compose import compose
from orchestrator.ledger import LedgerReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conf.schema import Config

_CHUNK = 1 << 22
ROLLED_BACK = "rolled back"
"""The outcome of batches whose weights were given up."""


@dataclass(kw_only=True, slots=True)
class Audit:
    """What was found; the lists hold a sentence a finding."""

    iterations: int = 0
    pairs: int = 0
    batches: int = 0
    damaged: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    rejudged: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        """All of them, each with its kind."""
        kinds = ("damaged", "lost", "repeated", "rejudged", "stale")
        return [f"{kind}: {text}" for kind in kinds for text in getattr(self, kind)]

    def __str__(self) -> str:
        return (
            f"audit: {self.iterations} iterations, {self.pairs} pairs, {self.batches} batches, {len(self.damaged)}"
            f" damaged, {len(self.lost)} lost, {len(self.repeated)} repeated, {len(self.rejudged)} judged twice,"
            f" {len(self.stale)} stale"
        )


def audit(run: Path) -> Audit:
    """Checks the finished iterations of a run folder.

    Raises:
        DataError: it has no ledger that can be read.
        ConfigError: it has no configuration that can be read.
    """
    with LedgerReader(run) as ledger:
        config = compose([], run / "config.yaml")
        ledger.check()
        ledger.db.row_factory = None
        return _Auditor(run, ledger.db, config).run()


class _Auditor:
    def __init__(self, run: Path, db: sqlite3.Connection, config: Config) -> None:
        self._run = run
        self._db = db
        self._epochs = config.learner.epochs
        self._prompts = config.pipeline.prompts_per_iteration
        pipeline = config.pipeline
        self._bound = pipeline.max_staleness if pipeline.mode == "async" else 0
        rows = db.execute("SELECT iteration, version_number, version_digest FROM iterations")
        self._policies: dict[int, tuple[int, str]] = {iteration: version for iteration, *version in rows}
        """Number and digest of the weights that each finished iteration left, by its number."""
        self._checked = set(self._policies)
        """Finished iterations whose rollouts and pairs can be read."""
        self._found = Audit(iterations=max(0, len(self._policies) - 1))

    def run(self) -> Audit:
        self._check_files()
        self._check_prompts()
        self._check_judgements()
        pairs = self._check_pairs()
        for iteration, ids in pairs.items():
            self._check_batches(iteration, ids)
        self._check_steps()
        return self._found

    def _check_files(self) -> None:
        for path, iteration, size, digest in self._db.execute("SELECT path, iteration, bytes, digest FROM files"):
            if not self._check_file(path, size, digest) and path.startswith(("pairs/", "rollouts/")):
                self._checked.discard(iteration)
                self._found.damaged[-1] += f"; the pairs of iteration {iteration} are not looked at"
        checkpoints = self._db.execute("SELECT path, digest, iteration, batches, step FROM checkpoints")
        for folder, digest, *contains in checkpoints:
            manifest = f"{folder}/manifest.json"
            if self._check_file(manifest, None, digest):
                files = json.loads((self._run / manifest).read_bytes())["files"]
                whole = [
                    self._check_file(f"{folder}/{name}", one["size"], one["digest"]) for name, one in files.items()
                ]
                if all(whole):
                    self._check_weights(folder, contains)
        latest = self._db.execute("SELECT iteration, checkpoint FROM iterations ORDER BY iteration DESC LIMIT 1")
        for iteration, folder in latest:
            if folder and not self._db.execute("SELECT 1 FROM checkpoints WHERE path = ?", (folder,)).fetchone():
                self._found.lost.append(f"{folder}, which has the weights of iteration {iteration}, does not count")

    def _check_weights(self, folder: str, contains: list[int]) -> None:
        """Whether a checkpoint has the batches that the ledger says it has: (iteration, of it, of the run)."""
        facts = json.loads((self._run / folder / "trainer.json").read_bytes())
        if (found := [facts[name] for name in ("iteration", "batches_done", "step")]) != contains:
            self._found.repeated.append(
                f"{folder} contains (iteration, its batches, all batches) {found}, not {contains}"
            )

    def _check_prompts(self) -> None:
        """Whether each iteration asked for its prompts, and for others than those before it."""
        cursors = dict(self._db.execute("SELECT iteration, cursor FROM iterations"))
        issued: Counter[int] = Counter()
        for iteration, prompts in self._db.execute("SELECT iteration, prompts FROM waves"):
            issued[iteration] += len(json.loads(prompts))
        for iteration in sorted(cursors.keys() - {0}):
            if issued[iteration] != self._prompts:
                self._found.lost.append(
                    f"iteration {iteration} asked for {issued[iteration]} of {self._prompts} prompts"
                )
            if cursors[iteration] < cursors[iteration - 1] + issued[iteration]:
                self._found.repeated.append(f"prompts of iteration {iteration}: the stream did not go on by so many")

    def _check_file(self, path: str, size: int | None, digest: str) -> bool:
        """Whether a file is what was written."""
        found, read = xxhash.xxh3_64(), 0
        try:
            with (self._run / path).open("rb") as file:
                while part := file.read(_CHUNK):
                    found.update(part)
                    read += len(part)
        except OSError as error:
            self._found.damaged.append(f"{path}: {error.strerror}")
            return False
        if size not in (None, read) or found.hexdigest() != digest:
            self._found.damaged.append(f"{path} is not what was written")
            return False
        return True

    def _rows(self, kind: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Rows of the files of one kind that count, of the iterations that are checked."""
        files = self._db.execute("SELECT path, iteration FROM files WHERE path LIKE ? ORDER BY path", (f"{kind}/%",))
        for path, iteration in files:
            if iteration in self._checked:
                rows = pq.read_table(self._run / path, columns=["iteration", *columns]).to_pylist()
                yield from ({**row, "path": path} for row in rows if row["iteration"] in self._checked)

    def _check_judgements(self) -> None:
        groups: defaultdict[tuple[int, str], set[tuple[str, int]]] = defaultdict(set)
        for row in self._rows("rollouts", ["prompt_id", "group"]):
            groups[row["iteration"], row["prompt_id"]].add((row["path"], row["group"]))
        self._found.rejudged += [
            f"{prompt} of iteration {iteration}" for (iteration, prompt), where in groups.items() if len(where) > 1
        ]
        noted = set(self._db.execute("SELECT iteration, prompt FROM groups"))
        issued = {
            (iteration, prompt)
            for iteration, prompts in self._db.execute("SELECT iteration, prompts FROM waves")
            for prompt in json.loads(prompts)
            if iteration in self._checked
        }
        aside = dict(self._db.execute("SELECT prompt, iteration FROM quarantine"))
        missing = {(at, prompt) for at, prompt in issued - groups.keys() if prompt not in aside or at < aside[prompt]}
        self._found.lost += [f"completions of {prompt} of iteration {iteration}" for iteration, prompt in missing]
        self._found.lost += [
            f"the note that {prompt} of iteration {iteration} was scored" for iteration, prompt in groups.keys() - noted
        ]

    def _check_pairs(self) -> dict[int, list[str]]:
        """Ids of the pairs of each finished iteration, as its files have them."""
        pairs: dict[int, list[str]] = {iteration: [] for iteration in self._checked if iteration > 0}
        columns = [f"{side}_{column}" for side in ("chosen", "rejected") for column in ("policy_digest", "switches")]
        for row in self._rows("pairs", ["id", *columns]):
            pairs[row["iteration"]].append(row["id"])
            allowed = self._fresh(row["iteration"])
            if not _sampled_by(row) <= allowed:
                self._found.stale.append(f"pair {row['id']} was not sampled by {' or '.join(sorted(allowed))}")
        noted = defaultdict(set)
        for pair, iteration in self._db.execute("SELECT id, iteration FROM pairs"):
            noted[iteration].add(pair)
        for iteration, ids in pairs.items():
            self._found.lost += [f"pair {pair} of the ledger is in no file" for pair in noted[iteration] - set(ids)]
            self._found.lost += [f"the note that pair {pair} was accepted" for pair in set(ids) - noted[iteration]]
            self._found.repeated += [f"pair {pair} was made twice" for pair, n in Counter(ids).items() if n > 1]
        self._found.pairs = sum(map(len, pairs.values()))
        return pairs

    def _fresh(self, iteration: int) -> set[str]:
        """Digests of the weights that may sample the pairs of an iteration."""
        latest, _ = self._policies[iteration - 1]
        versions = (self._policies[before] for before in range(iteration))
        return {digest for number, digest in versions if number >= latest - self._bound}

    def _check_batches(self, iteration: int, pairs: list[str]) -> None:
        rows = self._db.execute(
            "SELECT number, pairs, acknowledged, outcome FROM batches WHERE iteration = ?", (iteration,)
        ).fetchall()
        trained: Counter[str] = Counter()
        for number, ids, acknowledged, outcome in rows:
            if acknowledged is None and outcome != ROLLED_BACK:
                self._found.lost.append(f"batch {number} of iteration {iteration} was never acknowledged")
            else:
                trained.update(json.loads(ids))
        self._found.batches += len(rows)
        for pair in pairs:
            if trained[pair] < self._epochs:
                self._found.lost.append(f"pair {pair}: in {trained[pair]} batches, {self._epochs} epochs")
            elif trained[pair] > self._epochs:
                self._found.repeated.append(f"pair {pair}: in {trained[pair]} batches, {self._epochs} epochs")
        self._found.repeated += [f"pair {pair} is of another iteration" for pair in trained.keys() - set(pairs)]

    def _check_steps(self) -> None:
        """What the kept weights contain is numbered from 1 without a gap."""
        steps = [
            step
            for step, iteration in self._db.execute(
                "SELECT step, iteration FROM batches WHERE outcome <> ? ORDER BY step", (ROLLED_BACK,)
            )
            if iteration in self._policies
        ]
        self._found.repeated += [f"step {step} was taken by {n} batches" for step, n in Counter(steps).items() if n > 1]
        self._found.lost += [
            f"step {step} was taken by no batch" for step in set(range(1, max(steps, default=0))) - set(steps)
        ]


def _sampled_by(row: dict[str, Any]) -> set[str]:
    """Digests of all weights that sampled a token of a pair."""
    switches = [*row["chosen_switches"], *row["rejected_switches"]]
    return {row["chosen_policy_digest"], row["rejected_policy_digest"], *(switch["digest"] for switch in switches)}
