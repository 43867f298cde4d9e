"""What a checkpoint's folder must hold: size and digest of each of its files, in `manifest.json`. Loads no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from orchestrator.errors import ModelError
from orchestrator.files import dump_json, sync

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILE_NAME = "manifest.json"
_READ_BYTES = 8 << 20
_LONGEST_NAME = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What one file must be.

    Example: ``FileRecord(size=1048, digest="9f1c2ab07d35e814")``
    """

    size: int
    """Bytes."""
    digest: str
    """xxh3-64 of the bytes, 16 hex digits."""


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> str:
    """Writes and syncs `manifest.json`; returns its own digest, which stands for the whole checkpoint."""
    path = folder / FILE_NAME
    path.write_text(dump_json({"files": {name: asdict(files[name]) for name in sorted(files)}}, indent=2) + "\n")
    sync(path)
    return record_of(path).digest


def manifest_digest(folder: str | Path) -> str:
    """xxh3-64 of a checkpoint's manifest, as `write_manifest` returned it. Raises ModelError where there is none."""
    return xxhash.xxh3_64_hexdigest(_read(Path(folder)))


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file on the disk: pages the system still holds are given up first, so that it is read."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
        return FileRecord(size=file.tell(), digest=digest.hexdigest())


def check_sizes(folder: str | Path) -> dict[str, FileRecord]:
    """What the manifest says of each file, all of which are there in their sizes; reads no content but its own.

    Raises:
        ModelError: a file is missing, truncated, too long, or not in the manifest; it is named.
    """
    folder = Path(folder)
    records = _parse(folder, _read(folder))
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        size = path.stat().st_size
        if size < record.size:
            raise ModelError(f"{path} is truncated, {size} of {record.size} bytes")
        if size > record.size:
            raise ModelError(f"{path} is damaged, {size} bytes instead of {record.size}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in records:
            raise ModelError(f"{path} is not in {FILE_NAME}: remove it, it does not belong to this checkpoint")
    return records


def check_content(folder: str | Path, records: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Raises ModelError, naming the file, where one of `names` is not what its record says."""
    for name in names:
        found = record_of(Path(folder) / name)
        if found != records[name]:
            raise ModelError(
                f"{Path(folder) / name} is damaged, xxh3-64 {found.digest} instead of {records[name].digest}"
            )


def _is_name(name: str) -> bool:
    """Whether it can be the name of a file within a folder."""
    return Path(name).name == name and name.isprintable() and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def _read(folder: Path) -> bytes:
    path = folder / FILE_NAME
    if not path.is_file():
        raise ModelError(f"{path} is missing, so {folder} is not a checkpoint of the learner")
    return path.read_bytes()


def _parse(folder: Path, text: bytes) -> dict[str, FileRecord]:
    try:
        records = {str(name): FileRecord(**record) for name, record in json.loads(text)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / FILE_NAME} is damaged ({error!r})") from error
    odd = [n for n, r in records.items() if not _is_name(n) or type(r.size) is not int or type(r.digest) is not str]
    if odd:
        raise ModelError(f"{folder / FILE_NAME} is damaged (what it says of {odd[0][:80]!r})")
    return records
