"""Errors of the disk that a run writes to, told so that people can mend them."""

from __future__ import annotations

import errno
import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ADVICE = "make room on that disk and resume"
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_OF_DATABASES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


def disk_error(error: BaseException, run_dir: Path) -> str | None:
    """Which file the disk refused and what to do; None: `error` is another one.

    Args:
        error: of this process, or Ray's word of one of an actor.
        run_dir: the folder that is told of where the error names no file.
    """
    cause = getattr(error, "cause", error)
    if isinstance(cause, sqlite3.OperationalError):
        primary = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the rest says which call failed
        return f"{run_dir / 'ledger.sqlite'}: {cause}: {ADVICE}" if primary in _OF_DATABASES else None
    if not isinstance(cause, OSError) or cause.errno not in _OF_DISKS:
        return None
    said = f"{cause.filename or run_dir}: {cause.strerror}"
    return said if said.endswith(ADVICE) else f"{said}: {ADVICE}"
