"""Checkpoints of the learner: folders of tensors and facts that are whole or absent, and prove what they hold.

    checkpoints/iteration-0003/
      shard-00001-model-00001-of-00002.safetensors    rank 1's part of the first tensors, by torch's distributed
      ...                                             checkpoint; loads on any other number of ranks
      trainer.json                                    the facts
      manifest.json                                   size and xxh3-64 digest of each file

Tensors are named ``<entry>.<name>``, such as ``weights.model.norm.weight``. Nothing is pickled, so nothing in a
checkpoint can run.
"""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learners import ranks
from learners.manifest import FILE_NAME, FileRecord, check_content, check_sizes, record_of, write_manifest
from orchestrator.errors import ModelError
from orchestrator.files import sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from typing_extensions import Buffer

FACTS = "trainer.json"
FILE_BYTES = 1 << 30
"""Tensors of one file: what is held a second and third time while it is written."""

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class State:
    """What a checkpoint holds.

    Example: ``State(tensors={"weights": {"model.norm.weight": ...}}, facts={"step": 12})``
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    """By entry and name; on several ranks, DTensors or the same tensors on each."""
    facts: Mapping[str, Any]
    """What JSON can say; rank 0's are written."""

    def copy(self) -> State:
        """On the host, sharing no memory with what goes on being trained."""
        copied = {
            entry: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for entry, named in self.tensors.items()
        }
        return State(tensors=copied, facts=self.facts)


def write_folder(
    folder: str | Path, state: State, *, group: ranks.Group | None = None, file_bytes: int = FILE_BYTES
) -> str:
    """Writes a checkpoint, all ranks together; replaces a folder of that name.

    Everything is written beside the target, synced, read back from the disk and compared with what was handed over, and
    renamed last: a process killed at any instant leaves the old folder, none, or the new one.

    Args:
        folder: seen by all ranks.
        state: not to be changed meanwhile.
        group: by which ranks talk; a thread needs one of its own.
        file_bytes: tensors of one file.

    Returns:
        The digest of the manifest.

    Raises:
        OSError: the disk is full or fails; nothing of the new folder is left, and the old one is.
    """
    target = Path(folder)
    partial = target.with_name(f".{target.name}.partial")
    try:
        ranks.on_first(lambda: _prepare(target, partial), OSError, group)
        records = _write_tensors(partial, state.tensors, group, file_bytes)
        digest = ranks.on_first(lambda: _seal(target, partial, records, state.facts), OSError, group)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint could not be written ({error.strerror or error}): make room on that disk and resume",
            str(target),
        ) from error
    finally:
        if ranks.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return digest


class Checkpoint:
    """A folder that `write_folder` wrote, found whole. With several ranks, all must open and read it together.

    Raises:
        ModelError: a file is missing, truncated or damaged; it is named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        ranks.together(self._verify, ModelError)
        self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text())
        self._found = HuggingFaceStorageReader(str(self.folder)).read_metadata().state_dict_metadata

    def names(self, entry: str) -> list[str]:
        """The names of an entry's tensors; none where there is no such entry."""
        return [name.removeprefix(f"{entry}.") for name in self._found if name.startswith(f"{entry}.")]

    def read(self, entry: str) -> dict[str, Tensor]:
        """An entry's tensors, whole and on the host."""
        tensors = {}
        for name in self.names(entry):
            found: Any = self._found[f"{entry}.{name}"]
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
        self.load_into(entry, tensors)
        return tensors

    def load_into(self, entry: str, tensors: Mapping[str, Tensor]) -> None:
        """Copies an entry into tensors of the same names and shapes, sharded or not, on any device.

        Raises:
            ModelError: names or shapes differ.
        """
        shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        saved: dict[str, Any] = {name: self._found[f"{entry}.{name}"] for name in self.names(entry)}
        if shapes != {name: tuple(found.size) for name, found in saved.items()}:
            raise ModelError(f"{self.folder} was saved from another model: its {entry} differ in names or shapes")
        if tensors:
            load(
                {f"{entry}.{name}": tensor.detach() for name, tensor in tensors.items()},
                storage_reader=HuggingFaceStorageReader(str(self.folder)),
                no_dist=ranks.num_ranks() == 1,
            )

    def _verify(self) -> None:
        records = check_sizes(self.folder)
        if FACTS not in records:
            raise ModelError(f"{self.folder / FILE_NAME} is damaged, it does not name {FACTS}: put it back from a copy")
        check_content(self.folder, records, sorted(records)[ranks.rank() :: ranks.num_ranks()])


def _prepare(target: Path, partial: Path) -> None:
    for leftover in (partial, _retired(target)):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def _retired(target: Path) -> Path:
    return target.with_name(f".{target.name}.retired")


def _write_tensors(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: ranks.Group | None, file_bytes: int
) -> dict[str, FileRecord]:
    """Writes this rank's parts and reads them back; the records of all ranks' files."""
    named = {
        f"{entry}.{name}": tensor.detach().contiguous()
        for entry, part in tensors.items()
        for name, tensor in part.items()
    }
    writer = HuggingFaceStorageWriter(str(folder), _files(named, file_bytes), save_distributed=True)
    writer.fs = files = _Digesting()
    try:
        save(named, storage_writer=writer, process_group=group, no_dist=ranks.num_ranks() == 1)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    ranks.together(lambda: _read_back(folder, files.written), OSError, group)
    return {name: record for part in ranks.gather(files.written, group) for name, record in part.items()}


def _read_back(folder: Path, written: Mapping[str, FileRecord]) -> None:
    for name, record in written.items():
        if record_of(folder / name) != record:
            raise OSError(errno.EIO, "it was written, but another content is read back", str(folder / name))


def _files(named: Mapping[str, Tensor], file_bytes: int) -> dict[str, int]:
    """The number, from 1, of the file of each tensor: neighbours of at most `file_bytes` together, at least one."""
    numbers: dict[str, int] = {}
    number, room = 0, 0
    for name, tensor in named.items():
        if not number or tensor.nbytes > room:
            number, room = number + 1, file_bytes
        numbers[name] = number
        room -= tensor.nbytes
    return numbers


def _seal(target: Path, partial: Path, records: Mapping[str, FileRecord], facts: Mapping[str, Any]) -> str:
    text = (json.dumps(facts, indent=2) + "\n").encode()
    written = {FACTS: FileRecord(size=len(text), digest=xxhash.xxh3_64_hexdigest(text))}
    (partial / FACTS).write_bytes(text)
    sync(partial / FACTS)
    _read_back(partial, written)
    digest = write_manifest(partial, {**records, **written})
    sync(partial)
    if target.exists():
        target.rename(_retired(target))
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(_retired(target), ignore_errors=True)
    return digest


class _Digesting(FileSystem):
    """The file system of a writer, which notes what is handed to each file."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with _Noted(FileIO(path, mode)) as stream:
            yield stream
        self.written[Path(path).name] = FileRecord(size=stream.size, digest=stream.digest.hexdigest())


class _Noted(BufferedWriter):
    """A file being written, and the digest of what it is given."""

    def __init__(self, raw: FileIO) -> None:
        super().__init__(raw)
        self.size = 0
        self.digest = xxhash.xxh3_64()

    def write(self, data: Buffer) -> int:
        self.digest.update(data)
        self.size += len(memoryview(data))
        return super().write(data)
