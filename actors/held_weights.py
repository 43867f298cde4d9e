"""Runs on vLLM's workers: takes weights, and reads them back under their Hugging Face names to compare them.

Published memory that lasts is not copied where it lies as the layers have it: then it is the parameters' own, and all
engines of a node have it in common.

vLLM fuses projections (`q_proj`, `k_proj`, `v_proj` -> `qkv_proj`), pads vocabularies and stores GPT-2's Conv1D
matrices transposed. What cannot be traced back to one tensor with certainty counts as unreadable, never as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrator.weights import bytes_of, checksum_of_all, on_all_cores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.weights import TensorRecord

TRANSPOSED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}
"""Model type -> names whose matrices vLLM holds as [out, in] where the checkpoint has [in, out]."""


_BORROWED = "tensors_in_published_memory"
"""Attribute of a model: those that must not be written to."""


@dataclass(frozen=True, slots=True)
class Held:
    """Where a model holds a tensor of a checkpoint."""

    whole: torch.Tensor
    """A parameter or a buffer, which may hold others beside it."""
    values: torch.Tensor
    """A view."""


Find = Callable[[str], Held | None]
"""By the name in the checkpoint; None: nobody knows where, or in which form."""


def load(worker: Any, tensors: Mapping[str, torch.Tensor], lasts: bool) -> None:
    """Gives the worker its share of `tensors`; `lasts`: see `Engine.load_weights`.

    On a CPU, what is held as it was published is adopted or written straight to where it lies, on all cores; vLLM's own
    loader takes the rest, one tensor at a time. Layers on a GPU may hold their weights in the layout of a kernel, which
    only vLLM's own reload restores; it takes whole models only.
    """
    runner = worker.model_runner
    if worker.device.type != "cpu":
        runner.reload_weights(weights_iterator=iter(tensors.items()))
        return
    model = runner.get_model()
    rest = take(model, tensors, _finder(model), lasts=lasts)
    if rest:
        model.load_weights((name, tensors[name]) for name in rest)


def take(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], find: Find, *, lasts: bool) -> list[str]:
    """Makes the model hold `tensors`; returns the names of those that `find` does not find.

    Args:
        model: on a CPU.
        tensors: by their names in the checkpoint.
        find: tells where the model holds them.
        lasts: adopt their memory where that can be.
    """
    places = {name: find(name) for name in tensors}
    pairs = [(held, tensors[name]) for name, held in places.items() if held is not None]
    adopted = _adopt(pairs) if lasts else set()
    for whole in getattr(model, _BORROWED, set()) - adopted:
        whole.data = whole.data.clone()
    setattr(model, _BORROWED, adopted)
    # Found anew: what was borrowed lies elsewhere now.
    others = [name for name, held in places.items() if held is not None and held.whole not in adopted]
    written = [(held.values, tensors[name]) for name in others if (held := find(name)) is not None]
    alike = [pair for pair in written if _lies_alike(*pair)]
    # By the C library, which copies large blocks past the cache; torch does not.
    on_all_cores(lambda pair: np.copyto(bytes_of(pair[0]), bytes_of(pair[1])), alike, lambda pair: pair[0].nbytes)
    for values, tensor in written:
        if not _lies_alike(values, tensor):
            values.copy_(tensor)  # on threads of this one's own: each that calls it would get such, and keep them
    return [name for name, held in places.items() if held is None]


def _adopt(pairs: Sequence[tuple[Held, torch.Tensor]]) -> set[torch.Tensor]:
    """Tensors of the model that are published memory from now on: those whose parts lie there side by side."""
    parts: dict[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for held, tensor in pairs:
        parts.setdefault(held.whole, []).append((held.values, tensor))
    adopted = set()
    for whole, both in parts.items():
        both.sort(key=lambda pair: pair[0].data_ptr())
        if all(_lies_alike(*pair) for pair in both) and _adjoin([tensor for _, tensor in both], whole.nbytes):
            first = both[0][1]
            whole.data = first.as_strided(whole.shape, whole.stride(), first.storage_offset())
            adopted.add(whole)
    return adopted


def _lies_alike(held: torch.Tensor, published: torch.Tensor) -> bool:
    """Whether bytes mean the same in both."""
    return held.dtype == published.dtype and held.is_contiguous() and published.is_contiguous()


def _adjoin(tensors: Sequence[torch.Tensor], num_bytes: int) -> bool:
    """Whether they lie in one memory, each where the one before ends, and fill `num_bytes`."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            return False
        end += tensor.nbytes
    return end - tensors[0].data_ptr() == num_bytes


def outdated(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of readable tensors that have another checksum than their record."""
    return outdated_among(records, _finder(worker.model_runner.get_model()))


def unreadable(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of those whose values the worker holds in another form than was published, or nobody knows where."""
    return unreadable_among(records, _finder(worker.model_runner.get_model()))


def outdated_among(records: Sequence[TensorRecord], find: Find) -> list[str]:
    """Names of readable tensors that have another checksum than their record."""
    readable = {record: held for record in records if _is_like(held := find(record.name), record)}
    found = checksum_of_all([held.values for held in readable.values() if held is not None])
    return [record.name for record, checksum in zip(readable, found, strict=True) if checksum != record.checksum]


def unreadable_among(records: Sequence[TensorRecord], find: Find) -> list[str]:
    """Names of tensors that cannot be compared."""
    return [record.name for record in records if not _is_like(find(record.name), record)]


def _is_like(held: Held | None, record: TensorRecord) -> bool:
    return held is not None and str(held.values.dtype) == f"torch.{record.dtype}"


@lru_cache(maxsize=1)  # a worker has one model, whose layers stay
def _finder(model: Any) -> Find:
    """Knows vLLM's own way to hold what a checkpoint has."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    transposed = TRANSPOSED.get(model.config.model_type, ())
    fused = {
        part: (packed, index)
        for packed, parts in getattr(model, "packed_modules_mapping", {}).items()
        for index, part in enumerate(parts)
        if part != packed
    }

    def find(name: str) -> Held | None:
        path, _, kind = name.rpartition(".")
        parent, dot, last = path.rpartition(".")
        packed, index = fused.get(last, (last, None))
        layer = modules.get(f"{parent}{dot}{packed}")
        if layer is None:
            return None
        parameter = layer._parameters.get(kind)
        if parameter is None or getattr(layer, "tp_size", 1) > 1:
            return None
        value = parameter.detach()
        if index is not None:
            sizes = layer.output_partition_sizes
            value = value[sum(sizes[:index]) : sum(sizes[: index + 1])]
        elif hasattr(layer, "org_vocab_size"):
            value = value[: layer.org_vocab_size]
        return Held(parameter, value.t() if name.endswith(transposed) else value)

    return find
