"""Files of records that count: written whole, sealed in the ledger with size and digest, read back only if intact.

A file that has no row in the ledger is what a crash left of work that did not count; one that is not what its row says
was damaged since. Both are made again from what stands before them in the flow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from orchestrator.accounts import FileRecord
from orchestrator.events import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from orchestrator.accounts import Accounts
    from orchestrator.events import Emit

_CHUNK = 1 << 22


class Archive:
    """The sealed files of a run folder.

    Args:
        run_dir: the run folder.
        accounts: where they are sealed.
        emit: told of damaged ones.
    """

    def __init__(self, run_dir: Path, accounts: Accounts, emit: Emit) -> None:
        self._run_dir = run_dir
        self._accounts = accounts
        self._emit = emit

    def seal(self, iteration: int, paths: Iterable[Path]) -> None:
        """Makes files count; to be called in the ledger's transaction that notes what they hold."""
        for path in paths:
            size, digest = measure(path)
            self._accounts.add_file(FileRecord(path=self._name(path), iteration=iteration, bytes=size, digest=digest))

    def intact(self, path: Path) -> bool:
        """Whether a file counts and is what it was; one that was damaged since is reported, and counts no more."""
        record = self._accounts.file(self._name(path))
        if record is None:
            return False
        wrong = damage(path, record)
        if wrong:
            self._accounts.drop_file(record.path)
            self._tell(path, record, f"{wrong}; what it held is made again")
        return not wrong

    def usable(self, path: Path) -> bool:
        """Whether a file of what is finished is what it was; a damaged one is reported, and goes on to count."""
        record = self._accounts.file(self._name(path))
        if record is None:
            return False
        if wrong := damage(path, record):
            self._tell(path, record, f"{wrong}; it belongs to a finished iteration and is not made again")
        return not wrong

    def _tell(self, path: Path, record: FileRecord, text: str) -> None:
        self._emit(Event(kind=EventKind.DAMAGED, iteration=record.iteration, text=f"{path}: {text}"))

    def drop(self, path: Path) -> None:
        """A file counts no more, and is removed."""
        self._accounts.drop_file(self._name(path))
        path.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._run_dir))


def measure(path: Path) -> tuple[int, str]:
    """Size in bytes and xxh3-64 of a file's content as it is on disk."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def damage(path: Path, record: FileRecord) -> str:
    """What is wrong with a file that counts; empty where nothing is.

    Raises:
        OSError: it is there and could not be read, which says nothing of what it holds.
    """
    try:
        size, digest = measure(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"cannot be read ({error.strerror})"
    if size != record.bytes:
        return f"has {size:,} bytes, {record.bytes:,} were written"
    return "" if digest == record.digest else f"has other bytes than were written (xxh3-64 {digest})"
