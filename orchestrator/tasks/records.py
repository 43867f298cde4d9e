"""Records of JSON Lines and Parquet files, read strictly: what is wrong is refused with its place, never repaired."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DataError
from orchestrator.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
MAX_LINE_BYTES = 16 << 20
SHOWN = 60  # characters of a refused value that a message shows


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line or row. Example: ``Record(place="prompts.jsonl, line 17", number=17, fields={"prompt": "Hi"})``."""

    place: str
    number: int
    """Line or row, from 1."""
    fields: Mapping[str, Any]
    otherwise: str = ""
    """What else a user may do where a field is missing, behind "Mend the record"."""

    def error(self, message: str) -> DataError:
        """An error that names this record."""
        return DataError(f"{self.place}: {message}")

    def value(self, field: str) -> Any:
        """The field's value. Raises DataError when it is missing or null."""
        if self.fields.get(field) is None:
            found = "is null" if field in self.fields else f"is missing; found {', '.join(map(repr, self.fields))}"
            raise self.error(f"field {field!r} {found}. Mend the record{self.otherwise}.")
        return self.fields[field]

    def text(self, field: str) -> str:
        """The field's value as a clean, non-empty text."""
        return self.clean(self.value(field), f"field {field!r}")

    def clean(self, value: object, what: str) -> str:
        """`value`, if it is a text that can be tokenized. Raises DataError naming `what` otherwise."""
        if not isinstance(value, str):
            raise self.error(f"{what} is {describe(value)}, but must be a text.")
        if not value.strip():
            raise self.error(f"{what} is empty.")
        if "\0" in value:
            raise self.error(f"{what} has a NUL character at position {value.index(chr(0)) + 1}; remove it.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"{what} has half of a surrogate pair ({value[error.start]!a}) at position {error.start + 1}, "
                "which is no character; write the character itself or both halves."
            ) from error
        return value


def describe(value: object) -> str:
    """What a value is, for people: ``a number (3)``."""
    if value is None:
        return "null"
    kind = KINDS.get(type(value), type(value).__name__)
    try:
        shown = printable(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:  # it was read further up the stack
        return f"{kind} (nested too deeply to be shown)"
    return f"{kind} ({shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'})"


def read_records(path: Path) -> list[Record]:
    """All records of a .jsonl or .parquet file.

    Raises:
        DataError: The file is missing, unreadable, of another kind, empty, or a record is broken.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: the name must end in .jsonl (one JSON object a line) or .parquet.")
    try:
        if not path.exists():
            raise DataError(f"{path}: there is no such file (looked for {path.absolute()}).")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a pipe or device, which may never end"
            raise DataError(f"{path}: cannot be read: it is {found}; name a file.")
        records = list(readers[path.suffix](path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not records:
        raise DataError(f"{path}: has no records; each prompt is one line (.jsonl) or row (.parquet).")
    return records


def _read_jsonl(path: Path) -> Iterator[Record]:
    """One record a line; blank lines are skipped, and a byte-order mark before the first."""
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            place = f"{path}, line {number}"
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{place}: is longer than {MAX_LINE_BYTES >> 20} MiB. Is each record on its own line?")
            line = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, place)
            if not line.strip():
                continue
            try:
                fields = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                what = error.msg.removesuffix(" at")
                raise DataError(f"{place}: not JSON: {what} at column {error.colno}.") from error
            except (RecursionError, ValueError) as error:  # absurdly deep nesting, or digits without end
                raise DataError(f"{place}: not usable JSON: {error}.") from error
            if not isinstance(fields, dict):
                raise DataError(
                    f'{place}: {describe(fields)}, but each line must be an object such as {{"prompt": ...}}.'
                )
            yield Record(place=place, number=number, fields=fields)


def _decode(raw: bytes, place: str) -> str:
    if b"\0" in raw:
        raise DataError(
            f"{place}: NUL byte at byte {raw.index(0) + 1}. Is the file UTF-16 or binary? Save it as UTF-8."
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}. Save the file as UTF-8."
        ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    """One record a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    for number in range(1, table.num_rows + 1):
        place = f"{path}, row {number}"
        try:
            [fields] = table.slice(number - 1, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: a text is not UTF-8: {error}. Write the file with UTF-8 strings.") from error
        yield Record(place=place, number=number, fields=fields)
