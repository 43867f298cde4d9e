"""The tables of the ledger, and how it is made.

run            one row: recipe, seed, hash of the configuration, planned iterations, status, error
phases         one row for each phase of each iteration: when it started, how long it took, its tokens and metrics
iterations     one row for each finished iteration; from that row on the iteration counts
files          one row for each file of records that counts, with its size and digest (`accounts.py`, and all below)
waves          one row for each wave of prompts: issued, sampled, scored
groups         one row for each prompt of an iteration whose completions were scored: nobody is judged twice
pairs          one row for each pair that was accepted for training
batches        one row for each batch: its pairs, and what became of it
checkpoints    one row for each state of the learner that counts
publications   one row for each version of the weights that generators held
quarantine     one row for each prompt that kills whoever works on it
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from orchestrator.errors import DataError
from orchestrator.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION = 3

_TABLES = """
CREATE TABLE schema (version INTEGER NOT NULL);
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1), recipe TEXT NOT NULL, seed INTEGER NOT NULL, config_hash TEXT NOT NULL,
    iterations INTEGER NOT NULL, status TEXT NOT NULL, error TEXT, started REAL NOT NULL, ended REAL
);
CREATE TABLE phases (
    iteration INTEGER NOT NULL, phase TEXT NOT NULL, started REAL NOT NULL, seconds REAL,
    tokens INTEGER NOT NULL DEFAULT 0, metrics TEXT NOT NULL DEFAULT '{}', PRIMARY KEY (iteration, phase)
);
CREATE TABLE iterations (
    iteration INTEGER PRIMARY KEY, version_number INTEGER NOT NULL, version_digest TEXT NOT NULL,
    cursor INTEGER NOT NULL, checkpoint TEXT, metrics TEXT NOT NULL, finished REAL NOT NULL
);
CREATE TABLE files (
    path TEXT PRIMARY KEY, iteration INTEGER NOT NULL, bytes INTEGER NOT NULL, digest TEXT NOT NULL,
    written REAL NOT NULL
);
CREATE TABLE waves (
    iteration INTEGER NOT NULL, wave INTEGER NOT NULL, prompts TEXT NOT NULL, issued REAL NOT NULL, sampled REAL,
    scored REAL, outcome TEXT, evicted INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (iteration, wave)
);
CREATE TABLE groups (
    iteration INTEGER NOT NULL, prompt TEXT NOT NULL, wave INTEGER NOT NULL, completions INTEGER NOT NULL,
    scorer TEXT NOT NULL, PRIMARY KEY (iteration, prompt)
);
CREATE TABLE pairs (id TEXT PRIMARY KEY, iteration INTEGER NOT NULL, wave INTEGER NOT NULL);
CREATE TABLE batches (
    iteration INTEGER NOT NULL, number INTEGER NOT NULL, pairs TEXT NOT NULL, issued REAL, acknowledged REAL,
    step INTEGER, outcome TEXT, result TEXT, PRIMARY KEY (iteration, number)
);
CREATE TABLE checkpoints (
    path TEXT PRIMARY KEY, iteration INTEGER NOT NULL, batches INTEGER NOT NULL, step INTEGER NOT NULL,
    digest TEXT NOT NULL, written REAL NOT NULL
);
CREATE TABLE publications (
    number INTEGER PRIMARY KEY, digest TEXT NOT NULL, iteration INTEGER NOT NULL, published REAL NOT NULL
);
CREATE TABLE quarantine (
    prompt TEXT PRIMARY KEY, iteration INTEGER NOT NULL, reason TEXT NOT NULL, noted REAL NOT NULL
);
"""


def make(path: Path) -> None:
    """A ledger with nothing in it, which appears whole: who reads it meanwhile finds none, or all of its tables.

    Raises:
        DataError: it could not be written.
    """
    try:
        with closing(sqlite3.connect(":memory:")) as db, atomic_file(path) as file:
            db.executescript(f"{_TABLES} INSERT INTO schema VALUES ({SCHEMA_VERSION});")
            file.write(db.serialize())
    except (OSError, sqlite3.DatabaseError) as error:
        raise DataError(f"{path}: could not be made: {error}") from error
