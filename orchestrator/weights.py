"""Versioned weights on their way from the learner to the generators, and the proof that they arrived.

    learner: pack -> ray.put of a few large buckets -> Publication -> generators: get -> verify -> load -> prove

The proof has three links, each of which names what failed: the bytes received match the checksums taken at the
learner (`corrupted`), the engine holds those bytes (`Engine.differing`), and its forward pass agrees with the learner's
on a probe sequence (`Probe`), which also catches stale caches and re-packed weights. Weights that are sent by NCCL or
IPC leave no bytes to compare with: what the engine holds is held against the checksums instead (`Engine.outdated`).

A bucket is one flat uint8 array of some hundred MiB: few objects, no pickling, zero-copy reads on the same node.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from orchestrator.errors import PublicationError
from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from actors.engine import Engine

_ALIGNMENT = 64  # bytes; lets every dtype be viewed in place
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """Where one tensor lies in the buckets and what its bytes must be."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One version of the weights, ready to be fetched by any number of generators."""

    version: PolicyVersion
    records: tuple[TensorRecord, ...]
    buckets: tuple[Any, ...]
    """Ray object references of uint8 arrays, or the arrays themselves; empty when weights travel by NCCL or IPC."""
    probe: Probe


def pack(
    tensors: Mapping[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES
) -> tuple[tuple[TensorRecord, ...], list[NDArray[np.uint8]]]:
    """Copies tensors into buckets of at most `bucket_bytes` each (a larger tensor gets a bucket of its own)."""
    import torch  # where there are tensors it is loaded; the controller has none

    layout: list[tuple[str, torch.Tensor, int, int]] = []
    sizes: list[int] = []
    for name, tensor in tensors.items():
        needed = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if not sizes or sizes[-1] + needed > bucket_bytes:
            sizes.append(0)
        layout.append((name, tensor, len(sizes) - 1, sizes[-1]))
        sizes[-1] += needed
    buckets = [np.zeros(size, dtype=np.uint8) for size in sizes]
    records = []
    for name, tensor, bucket, offset in layout:
        part = buckets[bucket][offset : offset + tensor.nbytes]
        if tensor.nbytes:
            torch.from_numpy(part).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        records.append(
            TensorRecord(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                bucket=bucket,
                offset=offset,
                num_bytes=tensor.nbytes,
                checksum=xxhash.xxh3_64_hexdigest(part.data),
            )
        )
    return tuple(records), buckets


def digest(records: Sequence[TensorRecord]) -> str:
    """One checksum of all names, shapes and checksums, 16 hex digits."""
    text = "\n".join(f"{record.name} {record.dtype} {record.shape} {record.checksum}" for record in records)
    return xxhash.xxh3_64_hexdigest(text.encode())


def checksums(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorRecord, ...]:
    """Records of tensors that do not travel in buckets; copied to the host one at a time for their checksums."""
    return tuple(record for name, tensor in tensors.items() for record in pack({name: tensor})[0])


def version_of(number: int, records: Sequence[TensorRecord]) -> PolicyVersion:
    """The identity of the weights that `records` describe."""
    return PolicyVersion(number=number, digest=digest(records))


def checksum(tensor: torch.Tensor) -> str:
    """xxh3-64 of a tensor's bytes, as in its `TensorRecord`."""
    return pack({"": tensor})[0][0].checksum


def corrupted(records: Sequence[TensorRecord], buckets: Sequence[NDArray[np.uint8]]) -> list[str]:
    """Names of tensors whose bytes do not match their checksum."""
    return [
        record.name
        for record in records
        if xxhash.xxh3_64_hexdigest(_bytes_of(record, buckets).data) != record.checksum
    ]


def unpack(records: Sequence[TensorRecord], buckets: Sequence[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    """Tensors that are views of the buckets: valid, and read-only, as long as those live."""
    import torch

    tensors = {}
    with warnings.catch_warnings():
        # torch warns that the arrays of the object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        for record in records:
            dtype = getattr(torch, record.dtype)
            part = _bytes_of(record, buckets)
            flat = torch.from_numpy(part).view(dtype) if record.num_bytes else torch.empty(0, dtype=dtype)
            tensors[record.name] = flat.view(record.shape)
    return tensors


def _bytes_of(record: TensorRecord, buckets: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return buckets[record.bucket][record.offset : record.offset + record.num_bytes]


def install(
    engine: Engine, publication: Publication, buckets: Sequence[NDArray[np.uint8]], *, holder: str
) -> PolicyVersion:
    """Loads a publication into an engine and proves it; `holder` names the generator in errors.

    Raises:
        PublicationError: the bytes, the engine's own copy or its forward pass do not match the publication.
    """
    version = publication.version
    if not publication.buckets:  # they came by NCCL or IPC and are loaded; there is no second copy to compare with
        _refuse(engine.outdated(publication.records), publication, holder)
        prove(engine, publication, {}, holder=holder)
        return version
    if names := corrupted(publication.records, buckets):
        raise PublicationError(
            f"{holder}: tensor {names[0]} of weights {version} arrived with another checksum than the learner published"
            f" ({len(names)} of {len(publication.records)} tensors differ). The copy was damaged on its way; the old"
            " weights are still loaded. Restart the run with --resume; if it happens again, suspect the node's memory."
        )
    tensors = unpack(publication.records, buckets)
    engine.load_weights(tensors)
    prove(engine, publication, tensors, holder=holder)
    return version


def prove(engine: Engine, publication: Publication, tensors: Mapping[str, torch.Tensor], *, holder: str) -> None:
    """Raises PublicationError unless the engine holds `tensors` and its forward pass agrees with the probe."""
    version = publication.version
    _refuse(engine.differing(tensors), publication, holder)
    probe = publication.probe
    if not probe.logprobs:
        return
    found = np.asarray(engine.score([probe.token_ids])[0], dtype=np.float64)
    worst = float(np.max(np.abs(found - np.asarray(probe.logprobs))))
    if not worst <= probe.tolerance:
        raise PublicationError(
            f"{holder}: log-probs of the probe under weights {version} differ from the learner's by {worst:.2e}"
            f" (allowed {probe.tolerance:.0e}), though every tensor that can be read matches. The engine computes"
            " another function than the learner: check dtype and the model's support in both."
        )


def _refuse(names: Sequence[str], publication: Publication, holder: str) -> None:
    if names:
        raise PublicationError(
            f"{holder}: tensor {names[0]} does not hold what weights {publication.version} say ({len(names)} of"
            f" {len(publication.records)} tensors differ). The engine did not take the update; this is a defect of the"
            " engine or its version: pin the version this project was tested with."
        )
