"""Versioned weights on their way from the learner to the generators, and the proof that they arrived.

    learner: pack with checksums -> Publication -> generators: load in place -> prove

The proof has two links: what the engine holds matches the checksums taken at the learner (`Engine.outdated`), whatever
way it came; and its forward pass agrees with the learner's on a probe sequence (`Probe`), which also catches layers
that compute with a copy of their own. That is tried until it held with weights that differ enough from those the engine
had begun with, and each time where something cannot be read back. An error says whether the bytes were damaged on their
way or not taken.

Where all generators are on the learner's node the bytes lie in memory that they share (`shared_memory.py`), written
once and read in place. Elsewhere they are put into the object store in buckets, flat uint8 arrays of some hundred MiB:
few objects, no pickling, one copy a node.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.errors import PublicationError
from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from actors.engine import Engine
    from orchestrator.shared_memory import SharedArray

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALIGNMENT = 64  # bytes; lets every dtype be viewed in place
BUCKET_BYTES = 256 << 20
_MOST_THREADS = 4  # enough to fill the memory's bandwidth
_CHUNK_BYTES = 1 << 20  # what was just copied is summed up while it is still in the core's own cache


class TensorRecord(NamedTuple):
    """Where one tensor lies in the buckets and what its bytes must be.

    A tuple, since a publication has hundreds, and each is pickled for every generator that waits for it.
    """

    name: str
    """Hugging Face checkpoint name."""
    dtype: str
    """A torch dtype without its prefix, such as ``bfloat16``."""
    shape: tuple[int, ...]
    bucket: int
    offset: int
    """Bytes from the start of the bucket."""
    num_bytes: int
    checksum: str
    """xxh3-64 of the bytes, 16 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A sequence whose log-probs under the published weights are known."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """[len(token_ids) - 1] of each token after the first, from the learner's own forward pass."""
    tolerance: float
    """Largest allowed difference of one log-prob, by the rounding of the publishing dtype."""

    def tells_apart(self, other: Probe) -> bool:
        """Whether an engine that computes with the weights of one would be refused under those of the other."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max((abs(one - another) for one, another in pairs), default=0.0) > self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One version of the weights, ready to be fetched by any number of generators."""

    version: PolicyVersion
    records: tuple[TensorRecord, ...]
    buckets: tuple[Any, ...]
    """Ray object references of uint8 arrays, or the arrays themselves; empty when weights travel another way."""
    probe: Probe
    shared: SharedArray | None = None
    """All bytes as one bucket, where every generator is on the learner's node."""

    @property
    def is_packed(self) -> bool:
        """Whether there are bytes to load; weights that come by NCCL or IPC leave none."""
        return bool(self.buckets) or self.shared is not None


Allocate = Callable[[Sequence[int]], Sequence[NDArray[np.uint8]]]
"""Gives an array of each of these sizes, in bytes."""


def pack(
    tensors: Mapping[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES, allocate: Allocate | None = None
) -> tuple[tuple[TensorRecord, ...], list[NDArray[np.uint8]]]:
    """Copies tensors into buckets of at most `bucket_bytes` each (a larger tensor gets a bucket of its own).

    Args:
        tensors: by the names of a Hugging Face checkpoint.
        bucket_bytes: see above.
        allocate: where the buckets lie; None: in memory of their own.
    """
    places: list[tuple[int, int]] = []
    sizes: list[int] = []
    for tensor in tensors.values():
        needed = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if not sizes or sizes[-1] + needed > bucket_bytes:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += needed
    buckets = list(allocate(sizes) if allocate else (np.empty(size, np.uint8) for size in sizes))

    def copy(item: tuple[tuple[str, torch.Tensor], tuple[int, int]]) -> TensorRecord:
        (name, tensor), (bucket, offset) = item
        checksum = copy_and_sum_up(buckets[bucket][offset : offset + tensor.nbytes], bytes_of(tensor))
        return TensorRecord(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            bucket=bucket,
            offset=offset,
            num_bytes=tensor.nbytes,
            checksum=checksum,
        )

    items = list(zip(tensors.items(), places, strict=True))
    return tuple(on_all_cores(copy, items, lambda item: item[0][1].nbytes)), buckets


def copy_and_sum_up(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> str:
    """Fills `target`; returns the checksum of `source`."""
    checksum = xxhash.xxh3_64()
    for start in range(0, len(source), _CHUNK_BYTES):
        part = source[start : start + _CHUNK_BYTES]
        np.copyto(target[start : start + _CHUNK_BYTES], part)
        checksum.update(part.data)
    return checksum.hexdigest()


def bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Of a tensor in the order of its elements; a view where that is how they lie."""
    import torch  # where there are tensors it is loaded; the controller has none

    flat: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def on_all_cores(
    function: Callable[[Item], Result], items: Sequence[Item], num_bytes: Callable[[Item], int]
) -> list[Result]:
    """For functions that copy or sum up bytes, during which Python lets other threads run; the largest go first."""
    results: dict[int, Result] = {}
    waiting = iter(sorted(range(len(items)), key=lambda index: num_bytes(items[index]), reverse=True))

    def work() -> None:
        for index in waiting:  # which threads may share, since a list's iterator takes one at a time
            results[index] = function(items[index])

    num_helpers = min(_MOST_THREADS, os.cpu_count() or 1) - 1
    helpers = [_helpers().submit(work) for _ in range(num_helpers)]
    try:
        work()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
    return [results[index] for index in range(len(items))]


@cache
def _helpers() -> ThreadPoolExecutor:
    """Of this process: to start threads for each use costs some 3 ms, which is a tenth of copying 400 MB."""
    return ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="bytes")


def digest(records: Sequence[TensorRecord]) -> str:
    """One checksum of all names, shapes and checksums, 16 hex digits; the order of the records changes nothing."""
    by_name = sorted(records, key=lambda record: record.name)
    text = "\n".join(f"{record.name} {record.dtype} {record.shape} {record.checksum}" for record in by_name)
    return xxhash.xxh3_64_hexdigest(text.encode())


def checksums(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorRecord, ...]:
    """Records of tensors that do not travel in buckets; copied to the host one at a time for their checksums."""
    return tuple(record for name, tensor in tensors.items() for record in pack({name: tensor})[0])


def version_of(number: int, records: Sequence[TensorRecord]) -> PolicyVersion:
    """The identity of the weights that `records` describe."""
    return PolicyVersion(number=number, digest=digest(records))


def checksum_of_all(tensors: Sequence[torch.Tensor]) -> list[str]:
    """xxh3-64 of the bytes of each tensor, as in its `TensorRecord`."""
    # What has to be laid out anew for that is, here: torch's threads belong to the thread that calls it, and stay.
    elsewhere = {index: _checksum(tensor) for index, tensor in enumerate(tensors) if not tensor.is_contiguous()}
    rest = [tensor for tensor in tensors if tensor.is_contiguous()]
    found = iter(on_all_cores(_checksum, rest, lambda tensor: tensor.nbytes))
    return [elsewhere[index] if index in elsewhere else next(found) for index in range(len(tensors))]


def _checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(bytes_of(tensor).data)


def corrupted(records: Sequence[TensorRecord], buckets: Sequence[NDArray[np.uint8]]) -> list[str]:
    """Names of tensors whose bytes do not match their checksum."""
    found = on_all_cores(
        lambda record: xxhash.xxh3_64_hexdigest(_part_of(record, buckets).data),
        records,
        lambda record: record.num_bytes,
    )
    return [record.name for record, checksum in zip(records, found, strict=True) if checksum != record.checksum]


def unpack(records: Sequence[TensorRecord], buckets: Sequence[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    """Tensors that are views of the buckets: valid, and read-only, as long as those live."""
    import torch

    tensors = {}
    with warnings.catch_warnings():
        # torch warns that the arrays of the object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        memory = [torch.from_numpy(bucket) for bucket in buckets]
    for record in records:
        dtype = getattr(torch, record.dtype)
        part = memory[record.bucket][record.offset : record.offset + record.num_bytes]
        flat = part.view(dtype) if record.num_bytes else torch.empty(0, dtype=dtype)
        tensors[record.name] = flat.view(record.shape)
    return tensors


def _part_of(record: TensorRecord, buckets: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return buckets[record.bucket][record.offset : record.offset + record.num_bytes]


def install(
    engine: Engine, publication: Publication, buckets: Sequence[NDArray[np.uint8]], *, holder: str, tried: bool = False
) -> PolicyVersion:
    """Loads a publication into an engine and proves it.

    What the engine holds afterwards is summed up and held against the checksums, which proves the way of the bytes as
    well; bytes whose end it cannot show are proved before they are loaded. What came by NCCL or IPC is loaded already.

    Args:
        engine: of the generator.
        publication: to be loaded.
        buckets: its bytes.
        holder: names the generator in errors.
        tried: the engine's forward pass agreed with the learner's before, with weights that differ enough from those it
            had begun with. It is tried again only where tensors are held in a form that cannot be read back: it
            computes the same function of the same bytes.

    Raises:
        PublicationError: the bytes, the engine's own copy or its forward pass do not match the publication; or the
            weights are of no use.
    """
    records = publication.records
    _refuse_diverged(publication)
    hidden = set(engine.unreadable(records))
    if publication.is_packed:
        _refuse_damaged(corrupted([one for one in records if one.name in hidden], buckets), publication, holder)
        engine.load_weights(unpack(records, buckets), lasts=publication.shared is not None)
    if outdated := engine.outdated(records):
        damaged = corrupted([one for one in records if one.name in outdated], buckets) if publication.is_packed else []
        _refuse_damaged(damaged, publication, holder)
        raise PublicationError(
            f"{holder}: tensor {outdated[0]} does not hold what weights {publication.version} say ({len(outdated)} of"
            f" {len(records)} tensors differ). The engine did not take the update; this is a defect of the engine or"
            " its version: pin the version this project was tested with."
        )
    if hidden or not tried:
        _try_probe(engine, publication, holder)
    return publication.version


def _refuse_diverged(publication: Publication) -> None:
    if not np.isfinite(publication.probe.logprobs).all():
        raise PublicationError(
            f"weights {publication.version} give log-probs that are not finite, in the learner itself: training has"
            " diverged. Start a new run with a lower learner.lr; finished iterations can be exported (agon export)."
        )


def _refuse_damaged(names: Sequence[str], publication: Publication, holder: str) -> None:
    if names:
        raise PublicationError(
            f"{holder}: tensor {names[0]} of weights {publication.version} arrived with another checksum than the"
            f" learner published ({len(names)} of {len(publication.records)} tensors differ). The copy was damaged on"
            " its way. Restart the run with --resume; if it happens again, suspect the node's memory."
        )


def _try_probe(engine: Engine, publication: Publication, holder: str) -> None:
    """Raises PublicationError unless the engine's forward pass agrees with the learner's."""
    probe = publication.probe
    if not probe.logprobs:
        return
    found = np.asarray(engine.score([probe.token_ids])[0], dtype=np.float64)
    worst = float(np.max(np.abs(found - np.asarray(probe.logprobs))))
    if not worst <= probe.tolerance:
        raise PublicationError(
            f"{holder}: log-probs of the probe under weights {publication.version} differ from the learner's by"
            f" {worst:.2e} (allowed {probe.tolerance:.0e}), though every tensor that can be read matches. The engine"
            " computes another function than the learner: check dtype and the model's support in both."
        )
