"""Runs on vLLM's workers: writes weights, and reads them back under their Hugging Face names to compare them.

vLLM fuses projections (`q_proj`, `k_proj`, `v_proj` -> `qkv_proj`), pads vocabularies and stores GPT-2's Conv1D
matrices transposed. What cannot be traced back to one tensor with certainty counts as unreadable, never as equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from orchestrator.weights import checksum

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.weights import TensorRecord

TRANSPOSED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}
"""Model type -> names whose matrices vLLM holds as [out, in] where the checkpoint has [in, out]."""


def same_bits(held: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether `held` is `given`, cast to its dtype: no tolerance, NaN equal to itself, 0 apart from -0."""
    given = given.to(device=held.device, dtype=held.dtype)
    return held.shape == given.shape and torch.equal(
        held.contiguous().view(torch.uint8), given.contiguous().view(torch.uint8)
    )


def load(worker: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the worker's share of `tensors` in place.

    Layers on a GPU may hold their weights in the layout of a kernel, which only vLLM's own reload restores; it takes
    whole models only.
    """
    runner = worker.model_runner
    if worker.device.type == "cpu":
        runner.get_model().load_weights(tensors.items())
    else:
        runner.reload_weights(weights_iterator=iter(tensors.items()))


def differing(worker: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of readable tensors that the worker does not hold bit for bit."""
    model = worker.model_runner.get_model()
    held = {name: _held(model, name) for name in tensors}
    return [name for name, value in held.items() if value is not None and not same_bits(value, tensors[name])]


def outdated(worker: Any, records: Sequence[TensorRecord]) -> list[str]:
    """Names of readable tensors that have another checksum than their record; held in another dtype they have none."""
    model = worker.model_runner.get_model()
    held = {record: _held(model, record.name) for record in records}
    return [record.name for record, value in held.items() if value is not None and is_outdated(value, record)]


def is_outdated(held: torch.Tensor, record: TensorRecord) -> bool:
    """Whether `held`, in the dtype that was published, has another checksum than was published."""
    return str(held.dtype) == f"torch.{record.dtype}" and checksum(held) != record.checksum


def unreadable(worker: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that cannot be traced to values the worker holds."""
    model = worker.model_runner.get_model()
    return [name for name in names if _held(model, name) is None]


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
