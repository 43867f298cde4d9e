"""Going on where memory is short: what ran out is tried again in micro-batches half as large."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from learners import ranks
from orchestrator.batching import split

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.types import PreferenceBatch

T = TypeVar("T")

ERRORS = (RuntimeError, MemoryError)
"""What a want of memory is among; torch's CPU allocator has no error of its own."""
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


def within_memory(work: Callable[[int], T], batch: PreferenceBatch, tokens: int) -> tuple[T, int]:
    """Does work on a batch in micro-batches that memory holds.

    Args:
        work: given the tokens of a micro-batch; it raises what it raises on all ranks (`ranks.together`), and may be
            called again after it ran out of memory.
        batch: what `split` cuts.
        tokens: of a micro-batch, at first.

    Returns:
        What `work` returned, and the tokens with which it did.

    Raises:
        Exception: what `work` raised, where that was not memory or every micro-batch was one prompt group already.
    """
    while True:
        try:
            return work(tokens), tokens
        except ERRORS as error:
            if not is_out_of_memory(error) or not _can_be_cut(batch, tokens):
                raise
        tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _can_be_cut(batch: PreferenceBatch, tokens: int) -> bool:
    return any(ranks.gather(len(split(batch, tokens)) < len(batch.prompt_starts)))


def halved(before: int, after: int) -> str:
    """What people should know of it."""
    return (
        f"out of memory: micro-batches were halved from {before} to {after} tokens for the rest of the run;"
        f" set learner.micro_batch_tokens={after}"
    )
