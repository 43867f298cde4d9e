"""Causal attention on CPUs: of rows, and of packed groups in which a prompt's keys serve all its completions.

softmax(Q K^T) V, a block of rows at a time, small enough that its scores stay in the cache, against the keys that the
last of its rows sees. The matrix products go to the library that computes them fastest (`products.py`). torch's flash
attention for CPUs calls MKL from within its own threads, which wait for each other where they share one heap, as in the
learner's process: there, on two cores of an AMD EPYC, a step of 64 short pairs took 875 ms with it, and takes 170. The
backward pass computes each block's softmax again (Dao et
al. 2022, "FlashAttention", arXiv:2205.14135, algorithm 4), so no scores are kept.

Shapes: B rows times heads, T queries, R of them in a block, K keys: those of the queries, and perhaps others before;
H heads, N tokens of a packed row, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK_SCORES = 1 << 19
"""2 MiB: what a core's own cache holds."""
_FEWEST_ROWS, _MOST_ROWS = 16, 128
"""Of a block: products of fewer are slow, and above the diagonal of more there is much to compute in vain."""


class RowAttention(torch.autograd.Function):
    """Causal attention in float32 of rows that are as long as each other."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[S, H, T, E] from query, key and value, each [S, H, T, E]."""
        with torch.autocast("cpu", enabled=False):
            result = _attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), scale).view_as(query)
        ctx.save_for_backward(query, key, value, result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        slope, query, key, value, result = (states.flatten(0, 1) for states in (gradients[0], *ctx.saved_tensors))
        found = _give_back(slope, query, key, value, result, ctx.scale)
        return (*(gradient.view_as(gradients[0]) for gradient in found), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt and its completions in the packed row, one behind the other.

    Example: a prompt of 2 tokens with completions of 1 and 2: ``Group(prompt=slice(0, 2), completions=(slice(2, 3),
    slice(3, 5)))``
    """

    prompt: slice
    completions: tuple[slice, ...]

    @property
    def sequences(self) -> Iterator[tuple[slice, slice]]:
        """What attends to itself, and to which tokens before it."""
        yield self.prompt, slice(self.prompt.start, self.prompt.start)
        for completion in self.completions:
            yield completion, self.prompt


class PrefixAttention(torch.autograd.Function):
    """Attention in float32 of groups that fill a packed row: of a prompt to itself, of a completion to both."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
        """[H, N, E] from query, key and value, each [H, N, E]."""
        result = torch.empty_like(query)
        with torch.autocast("cpu", enabled=False):
            for own, before in (sequence for group in groups for sequence in group.sequences):
                keys, values = _joined(key, before, own), _joined(value, before, own)
                result[:, own] = _attend(query[:, own], keys, values, scale)
        ctx.save_for_backward(query, key, value, result)
        ctx.groups, ctx.scale = groups, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, result = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(one) for one in (query, key, value))
        for own, before in (sequence for group in ctx.groups for sequence in group.sequences):
            keys, values = _joined(key, before, own), _joined(value, before, own)
            to_query[:, own], to_keys, to_values = _give_back(
                gradients[0][:, own], query[:, own], keys, values, result[:, own], ctx.scale
            )
            num_before = before.stop - before.start
            for whole, part in ((to_key, to_keys), (to_value, to_values)):
                whole[:, before] += part[:, :num_before]  # a prompt's own came first
                whole[:, own] = part[:, num_before:]
        return to_query, to_key, to_value, None, None


def _joined(states: Tensor, before: slice, own: slice) -> Tensor:
    """[H, K, E] of the tokens before and the own ones, out of [H, N, E]."""
    if before.start == before.stop:
        return states[:, own]
    if before.stop == own.start:
        return states[:, before.start : own.stop]
    return torch.cat([states[:, before], states[:, own]], 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[B, T, E] from query [B, T, E], keys and values [B, K, E]."""
    scaled, result = query * scale, torch.empty_like(query)
    for rows, seen in _blocks(query, keys):
        result[:, rows] = _weights(*_dense(scaled[:, rows], keys[:, :seen])) @ values[:, :seen]
    return result


def _give_back(
    slope: Tensor, query: Tensor, keys: Tensor, values: Tensor, result: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values from `slope`, that of the result.

    With the weights P and scores S, dS = P * (dP - the sum of P dP over the keys), and that sum is that of O dO over E.
    """
    scaled, norms = query * scale, (slope * result).sum(-1, keepdim=True)
    to_query, to_keys, to_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _blocks(query, keys):
        row, sloped, key, value = _dense(scaled[:, rows], slope[:, rows], keys[:, :seen], values[:, :seen])
        weights = _weights(row, key)
        to_values[:, :seen] += weights.mT @ sloped
        to_scores = weights.mul_((sloped @ value.mT).sub_(norms[:, rows]))
        to_query[:, rows] = (to_scores @ key).mul_(scale)
        to_keys[:, :seen] += to_scores.mT @ row
    return to_query, to_keys, to_values


def _blocks(query: Tensor, keys: Tensor) -> Iterator[tuple[slice, int]]:
    """Rows of a block, and how many of the keys the last of them sees."""
    length, num_keys = query.shape[1], keys.shape[1]
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, _BLOCK_SCORES // (len(keys) * num_keys)))
    for start in range(0, length, size):
        end = min(length, start + size)
        yield slice(start, end), num_keys - length + end


def _dense(*parts: Tensor) -> list[Tensor]:
    """Each as one block of memory: every batched product would make it one anew, and slowly where it is transposed."""
    return [part.contiguous() for part in parts]


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, R, K] what each row gives to each key: nothing to those behind its own, which is the R-th from the end."""
    scores = queries @ keys.mT
    rows = scores.shape[1]
    scores[:, :, -rows:] += scores.new_full((rows, rows), -torch.inf).triu_(1)
    return scores.softmax(-1)
