"""The source of truth for resume: what a run finished, in SQLite (`<run>/ledger.sqlite`).

Every call is one transaction that is on disk when it returns (WAL, synchronous=FULL), or part of the transaction that
the caller opened. One process writes; any other may read meanwhile through `LedgerReader`. Its tables:
`ledger_schema.py`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from orchestrator.connection import SharedConnection
from orchestrator.errors import ConfigError, DataError
from orchestrator.files import dump_json
from orchestrator.ledger_schema import SCHEMA_VERSION, make
from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FILE_NAME = "ledger.sqlite"
_BUSY_S = 30.0
_CACHE_KIB = 256
"""Of pages. Queries read few rows; SQLite's own 2 MiB would fill up over hours, and look like a leak."""


class RunStatus(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    """Started and not ended; whether its process lives is another question (`orchestrator/runlock.py`)."""
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Stopped from outside; can be resumed."""
    FAILED = "failed"
    """Stopped by an error; can be resumed once its cause is mended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The run as a whole. Times are seconds since the epoch."""

    recipe: str
    seed: int
    config_hash: str
    iterations: int
    """Planned."""
    status: RunStatus
    error: str | None
    started: float
    ended: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRecord:
    """One phase of one iteration: its latest attempt."""

    iteration: int
    phase: str
    started: float
    """Seconds since the epoch."""
    seconds: float | None
    """How long it took, on a clock that does not jump; None while it runs, and for good when it was interrupted."""
    tokens: int
    metrics: Mapping[str, float]
    """What it found out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedIteration:
    """What resuming needs of an iteration that counts. 0 is the evaluation before any update."""

    iteration: int
    version: PolicyVersion
    cursor: int
    """Prompts taken from the stream so far."""
    checkpoint: str | None
    """Relative to the run folder; None when there is none."""
    metrics: Mapping[str, float]
    finished: float
    """Seconds since the epoch."""


class LedgerReader:
    """The ledger of a run folder, read-only: for other processes, while the run goes on or after it.

    Raises:
        DataError: there is no ledger, it is damaged, or it has another schema version.
    """

    _mode = "ro"

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        if self._mode == "ro" and not self.path.is_file():
            what = f"holds no run (there is no {FILE_NAME})" if run_dir.is_dir() else "no such run folder"
            raise DataError(f"{run_dir}: {what}")
        try:
            try:
                found = self._open()
            except sqlite3.OperationalError:
                if not self._is_at_rest():
                    raise
                found = self._open("&immutable=1")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a readable ledger: {error}") from error
        if found is None or found["version"] != SCHEMA_VERSION:
            raise DataError(
                f"{self.path}: schema version {found and found['version']}, expected {SCHEMA_VERSION}: use the version"
                " of agon that began this run, or another run folder"
            )

    def _open(self, options: str = "") -> sqlite3.Row | None:
        """Connects; returns the schema's version."""
        address = f"{self.path.absolute().as_uri()}?mode={self._mode}{options}"
        self.db = sqlite3.connect(address, uri=True, timeout=_BUSY_S, factory=SharedConnection, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.db.isolation_level = None
        self.db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        self._prepare()
        found: sqlite3.Row | None = self.db.execute("SELECT version FROM schema").fetchone()
        return found

    def _is_at_rest(self) -> bool:
        """Whether it is only read and nobody writes: SQLite then needs no file beside it, which a folder may forbid."""
        log = self.path.with_name(f"{FILE_NAME}-wal")
        return self._mode == "ro" and self.path.exists() and (not log.exists() or log.stat().st_size == 0)

    def run(self) -> RunRecord | None:
        """The run; None before `begin`."""
        row = self.db.execute(f"SELECT {_columns(RunRecord)} FROM run").fetchone()
        return row and RunRecord(**{**row, "status": RunStatus(row["status"])})

    def phases(self) -> list[PhaseRecord]:
        """Every phase, in the order in which they began."""
        return [_phase(row) for row in self.db.execute(f"SELECT {_columns(PhaseRecord)} FROM phases ORDER BY rowid")]

    def finished_phase(self, iteration: int, phase: str) -> PhaseRecord | None:
        """A phase that was done; None where it was not."""
        row = self.db.execute(
            f"SELECT {_columns(PhaseRecord)} FROM phases WHERE iteration = ? AND phase = ? AND seconds IS NOT NULL",
            (iteration, phase),
        ).fetchone()
        return row and _phase(row)

    def finished(self) -> list[FinishedIteration]:
        """Every iteration that counts, in order."""
        return list(self.latest_finished())[::-1]

    def latest_finished(self) -> Iterator[FinishedIteration]:
        """The iterations that count, the last one first; reads no more of them than are asked for."""
        for row in self.db.execute("SELECT * FROM iterations ORDER BY iteration DESC"):
            yield _finished(row)

    def finished_iteration(self, iteration: int) -> FinishedIteration | None:
        """An iteration that counts; None where it does not."""
        row = self.db.execute("SELECT * FROM iterations WHERE iteration = ?", (iteration,)).fetchone()
        return row and _finished(row)

    def resume_point(self) -> FinishedIteration | None:
        """The last iteration that counts; None when the run has to start from the beginning."""
        return next(self.latest_finished(), None)

    def versions(self) -> list[PolicyVersion]:
        """The policy that each iteration that counts left, in order."""
        rows = self.db.execute("SELECT version_number, version_digest FROM iterations ORDER BY iteration")
        return [PolicyVersion(number=number, digest=digest) for number, digest in rows]

    def spent(self) -> dict[str, tuple[float, int]]:
        """Of each phase, over all iterations: seconds and tokens; in the order in which they first began."""
        rows = self.db.execute(
            "SELECT phase, TOTAL(seconds), SUM(tokens) FROM phases GROUP BY phase ORDER BY MIN(rowid)"
        )
        return {phase: (seconds, tokens) for phase, seconds, tokens in rows}

    def total(self, metric: str) -> float:
        """The sum of a metric over the iterations that count."""
        path = f'$."{metric}"'
        return float(self.db.execute("SELECT TOTAL(json_extract(metrics, ?)) FROM iterations", (path,)).fetchone()[0])

    def check(self) -> None:
        """Reads all of it. Raises DataError: it is damaged somewhere."""
        try:
            found = [text for (text,) in self.db.execute("PRAGMA quick_check")]
        except sqlite3.DatabaseError as error:
            found = [str(error)]
        if found != ["ok"]:
            raise DataError(f"{self.path}: damaged: {found[0]}: put it back from a copy, or start a new run")

    def close(self) -> None:
        """Closes the connection."""
        self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """What a connection does before its first query."""


class Ledger(LedgerReader):
    """The ledger of a run folder for the one process that writes it; made where it is missing.

    Raises:
        DataError: the file is no ledger, or it has another schema version.
    """

    _mode = "rw"

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / FILE_NAME).exists():
            make(run_dir / FILE_NAME)
        super().__init__(run_dir)

    def _prepare(self) -> None:
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written within the block is on disk, all of it, when the block ends, or never was.

        Other threads wait until it ends.
        """
        with self.db.turn:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:  # a signal too, which may come at any instant
                if self.db.in_transaction:  # a disk that is full has ended it already
                    self.db.execute("ROLLBACK")
                raise

    def check_identity(self, config_hash: str) -> None:
        """Refuses a folder that holds another run than this one.

        Raises:
            ConfigError: its configuration, or a file that is named there, is another.
        """
        known = self.run()
        if known is not None and known.config_hash != config_hash:
            raise ConfigError(
                f"{self.path.parent} holds a run with another configuration, or with other content in the files that it"
                f" names: prompts, models, rubrics, scorer.function (recipe {known.recipe}, seed {known.seed}, hash"
                f" {known.config_hash}; now {config_hash}): resume it unchanged, or choose another run_dir"
            )

    def begin(self, *, recipe: str, seed: int, config_hash: str, iterations: int) -> None:
        """Notes that the run starts, or goes on.

        Raises:
            ConfigError: the folder holds a run with another configuration.
        """
        self.check_identity(config_hash)
        self.db.execute(
            "INSERT INTO run (id, recipe, seed, config_hash, iterations, status, started) VALUES (1, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET"
            " status = excluded.status, iterations = excluded.iterations, error = NULL, ended = NULL",
            (recipe, seed, config_hash, iterations, RunStatus.RUNNING, time.time()),
        )
        self.db.execute("DELETE FROM phases WHERE seconds IS NULL")  # broken off by the end of an earlier process

    def end(self, status: RunStatus, error: str | None = None) -> None:
        """Notes how the run stopped."""
        self.db.execute("UPDATE run SET status = ?, error = ?, ended = ?", (status, error, time.time()))

    def start_phase(self, iteration: int, phase: str) -> None:
        """Notes that a phase starts; an earlier attempt at it is forgotten."""
        self.db.execute(
            "INSERT OR REPLACE INTO phases (iteration, phase, started) VALUES (?, ?, ?)",
            (iteration, phase, time.time()),
        )

    def finish_phase(
        self, iteration: int, phase: str, *, seconds: float, tokens: int = 0, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Notes that a phase is done: how long it took, the tokens it generated or computed, and what it found out."""
        self.db.execute(
            "UPDATE phases SET seconds = ?, tokens = ?, metrics = ? WHERE iteration = ? AND phase = ?",
            (seconds, tokens, _dump(metrics or {}), iteration, phase),
        )

    def finish_iteration(
        self,
        iteration: int,
        *,
        version: PolicyVersion,
        cursor: int,
        checkpoint: str | None,
        metrics: Mapping[str, float],
    ) -> None:
        """From here on the iteration counts: a run that is resumed starts behind it.

        Raises:
            sqlite3.IntegrityError: it is finished already; an iteration is promoted once.
        """
        values = (
            iteration,
            version.number,
            version.digest,
            cursor,
            checkpoint,
            _dump(metrics),
            time.time(),
        )
        self.db.execute("INSERT INTO iterations VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def forget_measurements(self, iteration: int) -> None:
        """What was measured of an iteration's policy counts no more: it is trained again, or trained on."""
        self.db.execute("DELETE FROM phases WHERE iteration = ? AND phase IN ('anchors', 'evaluate')", (iteration,))

    def unfinish_iterations(self, after: int) -> None:
        """Iterations behind `after`, and their stages but `collect`, count no more: what they stood on is lost."""
        self.db.execute("DELETE FROM iterations WHERE iteration > ?", (after,))
        self.db.execute("DELETE FROM phases WHERE iteration > ? AND phase <> 'collect'", (after,))


def _finished(row: sqlite3.Row) -> FinishedIteration:
    return FinishedIteration(
        iteration=row["iteration"],
        version=PolicyVersion(number=row["version_number"], digest=row["version_digest"]),
        cursor=row["cursor"],
        checkpoint=row["checkpoint"],
        metrics=_metrics(row["metrics"]),
        finished=row["finished"],
    )


def _phase(row: sqlite3.Row) -> PhaseRecord:
    return PhaseRecord(**{**row, "metrics": _metrics(row["metrics"])})


def _dump(metrics: Mapping[str, float]) -> str:
    return dump_json({name: float(value) for name, value in metrics.items()})


def _metrics(text: str) -> dict[str, float]:
    """As they were noted; those that were not finite are left out."""
    return {name: value for name, value in json.loads(text).items() if value is not None}


def _columns(record: type[RunRecord | PhaseRecord]) -> str:
    return ", ".join(field.name for field in fields(record))
