"""Runs on vLLM's workers: writes weights, and reads them back under their Hugging Face names to compare them.

vLLM fuses projections (`q_proj`, `k_proj`, `v_proj` -> `qkv_proj`), pads vocabularies and stores GPT-2's Conv1D
matrices transposed. What cannot be traced back to one tensor with certainty counts as unreadable, never as equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrator.weights import bytes_of, checksum_of_all, on_all_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.weights import TensorRecord

TRANSPOSED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}
"""Model type -> names whose matrices vLLM holds as [out, in] where the checkpoint has [in, out]."""


def load(worker: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the worker's share of `tensors` in place.

    On a CPU, what is held as it was published is written straight to where it lies, on all cores; vLLM's own loader
    takes the rest, one tensor at a time. Layers on a GPU may hold their weights in the layout of a kernel, which only
    vLLM's own reload restores; it takes whole models only.
    """
    runner = worker.model_runner
    if worker.device.type != "cpu":
        runner.reload_weights(weights_iterator=iter(tensors.items()))
        return
    model = runner.get_model()
    held_as = _reader(model)
    places = {name: held_as(name) for name in tensors}
    direct = [(held, tensors[name]) for name, held in places.items() if held is not None]
    on_all_cores(lambda pair: _write(*pair), direct, lambda pair: pair[0].nbytes)
    if rest := {name: tensors[name] for name, held in places.items() if held is None}:
        model.load_weights(rest.items())


def _write(held: torch.Tensor, published: torch.Tensor) -> None:
    """Where bytes need not change by the C library, which copies large blocks past the cache; torch does not."""
    if held.dtype == published.dtype and held.is_contiguous() and published.is_contiguous():
        np.copyto(bytes_of(held), bytes_of(published))
    else:
        held.copy_(published)


def outdated(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of readable tensors that have another checksum than their record."""
    return outdated_among(records, _reader(worker.model_runner.get_model()))


def unreadable(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of those whose values the worker holds in another form than was published, or nobody knows where."""
    return unreadable_among(records, _reader(worker.model_runner.get_model()))


def outdated_among(records: Sequence[TensorRecord], held_as: Callable[[str], torch.Tensor | None]) -> list[str]:
    """Names of readable tensors that have another checksum than their record; `held_as` finds what is held."""
    readable = {record: held for record in records if _is_like(held := held_as(record.name), record)}
    found = checksum_of_all([held for held in readable.values() if held is not None])
    return [record.name for record, checksum in zip(readable, found, strict=True) if checksum != record.checksum]


def unreadable_among(records: Sequence[TensorRecord], held_as: Callable[[str], torch.Tensor | None]) -> list[str]:
    """Names of tensors that cannot be compared."""
    return [record.name for record in records if not _is_like(held_as(record.name), record)]


def _is_like(held: torch.Tensor | None, record: TensorRecord) -> bool:
    return held is not None and str(held.dtype) == f"torch.{record.dtype}"


def _reader(model: Any) -> Callable[[str], torch.Tensor | None]:
    """Finds the model's own values of a checkpoint tensor (a view), or None where they cannot be traced."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    transposed = TRANSPOSED.get(model.config.model_type, ())
    fused = {
        part: (packed, index)
        for packed, parts in getattr(model, "packed_modules_mapping", {}).items()
        for index, part in enumerate(parts)
        if part != packed
    }

    def held_as(name: str) -> torch.Tensor | None:
        path, _, kind = name.rpartition(".")
        parent, dot, last = path.rpartition(".")
        packed, index = fused.get(last, (last, None))
        layer = modules.get(f"{parent}{dot}{packed}")
        if layer is None:
            return None
        value: torch.Tensor | None = layer._parameters.get(kind)
        if value is None or getattr(layer, "tp_size", 1) > 1:
            return None
        value = value.detach()
        if index is not None:
            sizes = layer.output_partition_sizes
            value = value[sum(sizes[:index]) : sum(sizes[: index + 1])]
        elif hasattr(layer, "org_vocab_size"):
            value = value[: layer.org_vocab_size]
        return value.t() if name.endswith(transposed) else value

    return held_as
