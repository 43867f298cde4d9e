"""The source of truth for resume: what a run finished, in SQLite (`<run>/ledger.sqlite`).

    run          one row: recipe, seed, hash of the configuration, planned iterations, status, error
    phases       one row for each phase of each iteration: when it started and ended, the tokens it took
    iterations   one row for each finished iteration; from that row on the iteration counts

Every call is one transaction that is on disk when it returns (WAL, synchronous=FULL). One process writes; any other may
read meanwhile through `LedgerReader`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from orchestrator.errors import ConfigError, DataError
from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA_VERSION = 1
FILE_NAME = "ledger.sqlite"
_BUSY_S = 30.0

_TABLES = """
CREATE TABLE schema (version INTEGER NOT NULL);
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1), recipe TEXT NOT NULL, seed INTEGER NOT NULL, config_hash TEXT NOT NULL,
    iterations INTEGER NOT NULL, status TEXT NOT NULL, error TEXT, started REAL NOT NULL, ended REAL
);
CREATE TABLE phases (
    iteration INTEGER NOT NULL, phase TEXT NOT NULL, started REAL NOT NULL, finished REAL,
    tokens INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (iteration, phase)
);
CREATE TABLE iterations (
    iteration INTEGER PRIMARY KEY, version_number INTEGER NOT NULL, version_digest TEXT NOT NULL,
    cursor INTEGER NOT NULL, checkpoint TEXT, metrics TEXT NOT NULL, finished REAL NOT NULL
);
"""


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
    """One phase of one iteration: its latest attempt. Times are seconds since the epoch."""

    iteration: int
    phase: str
    started: float
    finished: float | None
    """None while it runs, and for good when it was interrupted."""
    tokens: int

    @property
    def seconds(self) -> float:
        """How long it took; 0 when it did not finish."""
        return 0.0 if self.finished is None else self.finished - self.started


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
        try:
            self._db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={self._mode}", uri=True, timeout=_BUSY_S)
            self._db.row_factory = sqlite3.Row
            self._db.isolation_level = None
            self._prepare()
            found = self._db.execute("SELECT version FROM schema").fetchone()
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a readable ledger: {error}") from error
        if found is None or found["version"] != SCHEMA_VERSION:
            raise DataError(
                f"{self.path}: schema version {found and found['version']}, expected {SCHEMA_VERSION}: use the version"
                " of agon that began this run, or another run folder"
            )

    def run(self) -> RunRecord | None:
        """The run; None before `begin`."""
        row = self._db.execute(f"SELECT {_columns(RunRecord)} FROM run").fetchone()
        return row and RunRecord(**{**row, "status": RunStatus(row["status"])})

    def phases(self) -> list[PhaseRecord]:
        """Every phase, in the order in which they began."""
        rows = self._db.execute(f"SELECT {_columns(PhaseRecord)} FROM phases ORDER BY started, rowid")
        return [PhaseRecord(**row) for row in rows]

    def finished(self) -> list[FinishedIteration]:
        """Every iteration that counts, in order."""
        rows = self._db.execute("SELECT * FROM iterations ORDER BY iteration")
        return [
            FinishedIteration(
                iteration=row["iteration"],
                version=PolicyVersion(number=row["version_number"], digest=row["version_digest"]),
                cursor=row["cursor"],
                checkpoint=row["checkpoint"],
                metrics=json.loads(row["metrics"]),
                finished=row["finished"],
            )
            for row in rows
        ]

    def resume_point(self) -> FinishedIteration | None:
        """The last iteration that counts; None when the run has to start from the beginning."""
        finished = self.finished()
        return finished[-1] if finished else None

    def close(self) -> None:
        """Closes the connection."""
        self._db.close()

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

    _mode = "rwc"

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(run_dir)

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            self._db.executescript(f"BEGIN; {_TABLES} INSERT INTO schema VALUES ({SCHEMA_VERSION}); COMMIT;")

    def begin(self, *, recipe: str, seed: int, config_hash: str, iterations: int) -> None:
        """Notes that the run starts, or goes on.

        Raises:
            ConfigError: the folder holds a run with another configuration.
        """
        known = self.run()
        if known is not None and known.config_hash != config_hash:
            raise ConfigError(
                f"{self.path.parent} holds a run with another configuration (recipe {known.recipe}, seed {known.seed},"
                f" hash {known.config_hash}; now {config_hash}): resume it unchanged, or choose another run_dir"
            )
        self._db.execute(
            "INSERT INTO run (id, recipe, seed, config_hash, iterations, status, started) VALUES (1, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET"
            " status = excluded.status, iterations = excluded.iterations, error = NULL, ended = NULL",
            (recipe, seed, config_hash, iterations, RunStatus.RUNNING, time.time()),
        )
        self._db.execute("DELETE FROM phases WHERE finished IS NULL")  # broken off by the end of an earlier process

    def end(self, status: RunStatus, error: str | None = None) -> None:
        """Notes how the run stopped."""
        self._db.execute("UPDATE run SET status = ?, error = ?, ended = ?", (status, error, time.time()))

    def start_phase(self, iteration: int, phase: str) -> None:
        """Notes that a phase starts; an earlier attempt at it is forgotten."""
        self._db.execute(
            "INSERT OR REPLACE INTO phases (iteration, phase, started) VALUES (?, ?, ?)",
            (iteration, phase, time.time()),
        )

    def finish_phase(self, iteration: int, phase: str, *, tokens: int = 0) -> None:
        """Notes that a phase is done, and the tokens it generated or computed."""
        self._db.execute(
            "UPDATE phases SET finished = ?, tokens = ? WHERE iteration = ? AND phase = ?",
            (time.time(), tokens, iteration, phase),
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
            json.dumps({name: float(value) for name, value in metrics.items()}),
            time.time(),
        )
        self._db.execute("INSERT INTO iterations VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _columns(record: type[RunRecord | PhaseRecord]) -> str:
    return ", ".join(field.name for field in fields(record))
