"""Runs on vLLM's workers: writes weights, and reads them back under their Hugging Face names to compare them.

vLLM fuses projections (`q_proj`, `k_proj`, `v_proj` -> `qkv_proj`), pads vocabularies and stores GPT-2's Conv1D
matrices transposed. What cannot be traced back to one tensor with certainty counts as unreadable, never as equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from orchestrator.weights import checksum_of_all, on_all_cores

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
    places = {name: _held(model, name) for name in tensors}
    direct = [(held, tensors[name]) for name, held in places.items() if held is not None]
    on_all_cores(lambda pair: pair[0].copy_(pair[1]), direct)
    if rest := {name: tensors[name] for name, held in places.items() if held is None}:
        model.load_weights(rest.items())


def outdated(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of readable tensors that have another checksum than their record."""
    model = worker.model_runner.get_model()
    return outdated_among(records, lambda name: _held(model, name))


def unreadable(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of those whose values the worker holds in another form than was published, or nobody knows where."""
    model = worker.model_runner.get_model()
    return unreadable_among(records, lambda name: _held(model, name))


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


def _held(model: Any, name: str) -> torch.Tensor | None:
    """The model's own values of a checkpoint tensor (a view), or None where they cannot be traced."""
    *path, kind = name.split(".")
    packed, rows = _fused(model, path)
    try:
        layer = model.get_submodule(".".join(packed))
        value: torch.Tensor = layer.get_parameter(kind).detach()
    except AttributeError:
        return None
    if getattr(layer, "tp_size", 1) > 1:
        return None
    if rows is not None:
        value = value[rows]
    elif hasattr(layer, "org_vocab_size"):
        value = value[: layer.org_vocab_size]
    return value.t() if name.endswith(TRANSPOSED.get(model.config.model_type, ())) else value


def _fused(model: Any, path: list[str]) -> tuple[list[str], slice | None]:
    """The module that holds the projection at `path`, and the rows it occupies there; None means all."""
    for packed, parts in getattr(model, "packed_modules_mapping", {}).items():
        if path and path[-1] in parts and path[-1] != packed:
            sizes = model.get_submodule(".".join([*path[:-1], packed])).output_partition_sizes
            index = parts.index(path[-1])
            start = sum(sizes[:index])
            return [*path[:-1], packed], slice(start, start + sizes[index])
    return path, None
