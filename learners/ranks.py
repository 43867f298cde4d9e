"""The learner's ranks: what one process of several must know of the others. One process alone needs no setup.

Every rank has whole prompt groups of the global batch; gradients are summed, since losses are divided by the number of
items of all ranks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def num_ranks() -> int:
    """1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def gather(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def total(values: Iterable[float]) -> list[float]:
    """Sums over ranks, in fp64."""
    return [sum(column) for column in zip(*gather(list(values)), strict=True)]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over ranks; a parameter without one on some rank counts as 0 there."""
    if num_ranks() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
