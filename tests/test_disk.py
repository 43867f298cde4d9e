"""Errors of the disk name the file and the mend; other errors are left to others."""

import errno
import sqlite3

import pytest

from orchestrator.disk import disk_error
from orchestrator.errors import FailureKind, kind_of
from orchestrator.ledger import Ledger


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_told_of(tmp_path, number):
    assert disk_error(OSError(number, "why", "/x/file"), tmp_path) == "/x/file: why: make room on that disk and resume"
    assert str(tmp_path) in disk_error(OSError(number, "why"), tmp_path), "where no file is named"


def test_advice_is_given_once(tmp_path):
    said = "could not be written: make room on that disk and resume"
    assert disk_error(OSError(errno.ENOSPC, said, "/x"), tmp_path) == f"/x: {said}"


def test_a_ledger_without_room_keeps_what_it_had(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.start_phase(1, "collect")
        ledger.db.execute(f"PRAGMA max_page_count = {ledger.db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(sqlite3.OperationalError) as full, ledger.transaction():
            ledger.db.execute("INSERT INTO quarantine VALUES ('a', 1, ?, 0)", ("x" * 100_000,))
        assert disk_error(full.value, tmp_path).startswith(f"{tmp_path / 'ledger.sqlite'}: database or disk is full")
        assert kind_of(full.value) is FailureKind.INFRASTRUCTURE
        assert [phase.iteration for phase in ledger.phases()] == [1]


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no such file", "/x"), sqlite3.OperationalError("no table"), ValueError()]
)
def test_other_errors_are_none_of_the_disk(tmp_path, error):
    assert disk_error(error, tmp_path) is None
