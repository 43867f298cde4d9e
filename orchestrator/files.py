"""Files that are either whole or absent, and JSON that any reader accepts."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path`, durable, when the block ends; an exception leaves what was there before.

    The folder is made where it is missing. One writer at a time: the temporary file beside `path` has a fixed name, so
    that one left by a killed run is overwritten and not collected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a rename within a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LOG = logging.getLogger(__name__)


def cut_torn_line(path: Path) -> None:
    """Cuts what a killed writer left of a last line, so that the next one begins on a line of its own."""
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, oldest first; none where there is no file.

    What is behind the last line break is torn and left out. A line that was damaged since (a power cut may leave zeros)
    is left out as well, and named in the log: these files are for people, and nothing is resumed from them.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            value = error
        if isinstance(value, dict):
            found.append(value)
        else:
            _LOG.warning("%s: line %d is damaged and left out (%s)", path, number, value)
    return found


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: figures that are not finite become null, since JSON has no word for them."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
