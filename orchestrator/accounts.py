"""What became of each prompt, pair and batch, and which files and weights count: the rows of the ledger behind I1.

    prompts issued -> groups scored -> pairs accepted -> batches issued -> batches acknowledged with a checkpoint
       (waves)          (groups)         (pairs)          (batches)            (batches, checkpoints)

A group is scored once an iteration and a pair accepted once a run: the primary keys say so. A batch is acknowledged in
the transaction that makes the checkpoint count whose weights contain it; a batch that was trained on and not
acknowledged is in no weights that are kept, and is trained on again.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.types import PolicyVersion, UpdateResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.ledger import LedgerReader
    from orchestrator.types import PreferencePair, ScoredGroup

TRAINED, SKIPPED, ROLLED_BACK = "trained", "skipped", "rolled back"
"""What becomes of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file that counts.

    Example: ``FileRecord(path="pairs/iteration-0001.parquet", iteration=1, bytes=81_920, digest="9f1c2ab07d35e814")``
    """

    path: str
    """Relative to the run folder."""
    iteration: int
    bytes: int
    digest: str
    """xxh3-64, 16 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A state of the learner that counts.

    Example: ``CheckpointRecord(path="checkpoints/iteration-0002", iteration=2, batches=31, step=60, digest="...")``
    """

    path: str
    """Relative to the run folder."""
    iteration: int
    batches: int
    """Of that iteration, that it contains."""
    step: int
    """Batches of the run that it contains."""
    digest: str
    """Of its manifest."""


class Accounts:
    """The accounts of a run; of a `LedgerReader`, to be read only. Give a `Ledger` to write."""

    def __init__(self, ledger: LedgerReader) -> None:
        self._db = ledger.db

    def add_file(self, record: FileRecord) -> None:
        """From here on the file counts; one of an earlier attempt under its name does not."""
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            (record.path, record.iteration, record.bytes, record.digest, time.time()),
        )

    def drop_file(self, path: str) -> None:
        """The file does not count any more."""
        self._db.execute("DELETE FROM files WHERE path = ?", (path,))

    def file(self, path: str) -> FileRecord | None:
        """What is known of a file; None where it does not count."""
        row = self._db.execute("SELECT path, iteration, bytes, digest FROM files WHERE path = ?", (path,)).fetchone()
        return row and FileRecord(**row)

    def issue_wave(self, iteration: int, wave: int, prompts: Sequence[str]) -> None:
        """Notes that completions of `prompts` are asked for; of an earlier attempt only its evicted pairs are known."""
        self._forget_wave(iteration, wave)
        self._db.execute(
            "INSERT INTO waves (iteration, wave, prompts, issued) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " prompts = excluded.prompts, issued = excluded.issued",
            (iteration, wave, json.dumps(list(prompts)), time.time()),
        )

    def evict_wave(self, iteration: int, wave: int) -> None:
        """What was made of a wave does not count: weights sampled it that may not have. Its pairs are counted."""
        evicted = self._forget_wave(iteration, wave)
        self._db.execute(
            "UPDATE waves SET evicted = evicted + ? WHERE iteration = ? AND wave = ?", (evicted, iteration, wave)
        )

    def evicted(self, iteration: int, wave: int) -> int:
        """How many pairs of a wave were evicted, over all attempts at it."""
        row = self._db.execute(
            "SELECT evicted FROM waves WHERE iteration = ? AND wave = ?", (iteration, wave)
        ).fetchone()
        return row["evicted"] if row else 0

    def _forget_wave(self, iteration: int, wave: int) -> int:
        """Returns how many pairs it had."""
        of_it = (iteration, wave)
        self._db.execute(
            "UPDATE waves SET sampled = NULL, scored = NULL, outcome = NULL WHERE iteration = ? AND wave = ?", of_it
        )
        self._db.execute("DELETE FROM groups WHERE iteration = ? AND wave = ?", of_it)
        return self._db.execute("DELETE FROM pairs WHERE iteration = ? AND wave = ?", of_it).rowcount

    def wave_sampled(self, iteration: int, wave: int) -> None:
        """Notes that the completions of a wave are on disk."""
        self._db.execute(
            "UPDATE waves SET sampled = ? WHERE iteration = ? AND wave = ?", (time.time(), iteration, wave)
        )

    def wave_scored(self, iteration: int, wave: int, groups: Sequence[ScoredGroup], outcome: Any) -> None:
        """Notes that the scores of a wave are on disk, and what else came of it (`outcome`: anything JSON can hold).

        Raises:
            sqlite3.IntegrityError: a prompt was scored in this iteration already.
        """
        self._db.executemany(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?)",
            [
                (iteration, scored.group.prompt.id, wave, len(scored.group.completions), scored.scorer)
                for scored in groups
            ],
        )
        self._db.execute(
            "UPDATE waves SET scored = ?, outcome = ? WHERE iteration = ? AND wave = ?",
            (time.time(), json.dumps(outcome), iteration, wave),
        )

    def wave_outcome(self, iteration: int, wave: int) -> Any | None:
        """What came of a wave that was scored; None where it was not."""
        row = self._db.execute(
            "SELECT outcome FROM waves WHERE iteration = ? AND wave = ? AND scored IS NOT NULL", (iteration, wave)
        ).fetchone()
        return row and json.loads(row["outcome"])

    def accept_pairs(self, iteration: int, wave: int, pairs: Sequence[PreferencePair]) -> None:
        """Notes the pairs of a wave that are trained on.

        Raises:
            sqlite3.IntegrityError: two pairs of the run have the same id.
        """
        self._db.executemany("INSERT INTO pairs VALUES (?, ?, ?)", [(pair.id, iteration, wave) for pair in pairs])

    def plan_batches(self, iteration: int, batches: Sequence[Sequence[PreferencePair]]) -> None:
        """Notes the batches of an iteration; those that count already stay, others that were planned before do not."""
        self._db.execute("DELETE FROM batches WHERE iteration = ? AND acknowledged IS NULL", (iteration,))
        self._db.executemany(
            "INSERT OR IGNORE INTO batches (iteration, number, pairs) VALUES (?, ?, ?)",
            [(iteration, number, json.dumps([pair.id for pair in batch])) for number, batch in enumerate(batches)],
        )

    def issue_batch(self, iteration: int, number: int) -> None:
        """Notes that a batch is handed to the queue."""
        self._db.execute(
            "UPDATE batches SET issued = ? WHERE iteration = ? AND number = ?", (time.time(), iteration, number)
        )

    def acknowledge(self, checkpoint: CheckpointRecord, results: Sequence[UpdateResult]) -> None:
        """Makes a checkpoint count, and with it the batches that it contains beyond the one before."""
        self._db.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(checkpoint.path, checkpoint.iteration, checkpoint.batches, checkpoint.step, checkpoint.digest),
                time.time(),
            ),
        )
        self._db.executemany(
            "UPDATE batches SET acknowledged = ?, step = ?, outcome = ?, result = ? WHERE iteration = ? AND number = ?",
            [
                (
                    *(time.time(), result.step, SKIPPED if result.skipped else TRAINED, _dump_result(result)),
                    *(checkpoint.iteration, result.batch),
                )
                for result in results
            ],
        )

    def results(self, iteration: int) -> list[UpdateResult]:
        """What the acknowledged batches of an iteration did, in order."""
        rows = self._db.execute(
            "SELECT number, step, pairs, result FROM batches WHERE iteration = ? AND acknowledged IS NOT NULL"
            " ORDER BY number",
            (iteration,),
        )
        return [
            _result(row["step"], row["number"], json.loads(row["pairs"]), json.loads(row["result"])) for row in rows
        ]

    def give_up(self, iteration: int) -> None:
        """The training of an iteration is rolled back: its pairs are in no weights that are kept."""
        self._db.execute(
            "UPDATE batches SET acknowledged = NULL, step = NULL, result = NULL, outcome = ? WHERE iteration = ?",
            (ROLLED_BACK, iteration),
        )
        self._db.execute("DELETE FROM checkpoints WHERE iteration = ?", (iteration,))

    def checkpoints(self) -> list[CheckpointRecord]:
        """States of the learner that count, oldest first."""
        rows = self._db.execute(
            "SELECT path, iteration, batches, step, digest FROM checkpoints ORDER BY iteration, batches"
        )
        return [CheckpointRecord(**row) for row in rows]

    def latest_checkpoint(self) -> CheckpointRecord | None:
        """The newest state of the learner that counts; None where it is the initial model."""
        return next(reversed(self.checkpoints()), None)

    def drop_checkpoint(self, path: str) -> None:
        """A checkpoint does not count any more, since a later one does."""
        self._db.execute("DELETE FROM checkpoints WHERE path = ?", (path,))

    def rewind(self, to: CheckpointRecord | None) -> None:
        """Checkpoints behind `to` (None: all) are lost: what only they contained is to be trained on again.

        What was rolled back stays so: it was in none of them.
        """
        iteration, batches = (to.iteration, to.batches) if to else (0, 0)
        behind = "iteration > ? OR (iteration = ? AND {} {} ?)"
        self._db.execute(
            f"DELETE FROM checkpoints WHERE {behind.format('batches', '>')}", (iteration, iteration, batches)
        )
        self._db.execute(
            "UPDATE batches SET acknowledged = NULL, step = NULL, outcome = NULL, result = NULL"
            f" WHERE ({behind.format('number', '>=')}) AND outcome IS NOT ?",
            (iteration, iteration, batches, ROLLED_BACK),
        )

    def publish(self, version: PolicyVersion, iteration: int) -> None:
        """Notes that every generator held these weights."""
        self._db.execute(
            "INSERT OR REPLACE INTO publications VALUES (?, ?, ?, ?)",
            (version.number, version.digest, iteration, time.time()),
        )

    def quarantine(self, prompts: Mapping[str, str], iteration: int) -> None:
        """Notes that prompts are set aside for good, each with the reason; those that are known stay as they are."""
        for prompt, reason in dict(prompts).items():  # which another thread may add to meanwhile
            self._db.execute(
                "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?)", (prompt, iteration, reason, time.time())
            )

    def quarantined(self, before: int | None = None) -> Mapping[str, str]:
        """Prompts that were set aside, and why; only those before an iteration where one is named."""
        rows = self._db.execute(
            "SELECT prompt, reason FROM quarantine WHERE ? IS NULL OR iteration < ?", (before, before)
        )
        return {row["prompt"]: row["reason"] for row in rows}


def _result(step: int, number: int, pairs: list[str], known: dict[str, Any]) -> UpdateResult:
    return UpdateResult(step=step, batch=number, pair_ids=tuple(pairs), **known | {"notes": tuple(known["notes"])})


def _dump_result(result: UpdateResult) -> str:
    known = {"tokens": result.tokens, "metrics": dict(result.metrics)}
    return json.dumps(known | {"skipped": result.skipped, "notes": list(result.notes)})
