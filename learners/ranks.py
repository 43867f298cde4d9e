"""The learner's ranks: what one process of several must know of the others. One process alone needs no setup.

Every rank has whole prompt groups of the global batch; gradients are summed, since losses are divided by the number of
items of all ranks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

T = TypeVar("T")
Group = Any
"""A process group of torch.distributed."""


def num_ranks() -> int:
    """1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def new_group() -> Group | None:
    """Another way for all ranks to talk, for a thread whose exchanges must not mix with training's; None of one rank.

    It works on the host. All ranks must ask for it at the same point.
    """
    return dist.new_group(backend="gloo") if num_ranks() > 1 else None


def gather(value: Any, group: Group | None = None) -> list[Any]:
    """What every rank has, in the order of ranks."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value, group=group)
    return found


def together(
    work: Callable[[], T],
    errors: type[Exception] | tuple[type[Exception], ...],
    group: Group | None = None,
) -> T:
    """Does work in which ranks do not talk; one of `errors` on any rank is raised on all, the same on each."""
    failed: Exception | None = None
    failures: list[Exception] = []
    try:
        found = work()
    except errors as error:
        failed = error
    try:
        failures = [one for one in gather(failed, group) if one is not None]
        if failures:
            raise failures[0]
    finally:
        # An error keeps the frames it passed, and so all their tensors, as long as one of those frames keeps the error.
        del failed, failures
    return found


def on_first(
    work: Callable[[], T], errors: type[Exception] | tuple[type[Exception], ...], group: Group | None = None
) -> T:
    """Does work on rank 0 alone, while the others wait; all get what it returns, or its error."""
    mine = together(lambda: work() if rank() == 0 else None, errors, group)
    found: T = gather(mine, group)[0]
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
