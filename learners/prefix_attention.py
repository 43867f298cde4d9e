"""Causal attention over packed groups in which each prompt's keys are seen by its completions without being copied.

    a prompt attends to itself                      causal
    a completion attends to its prompt              whole, all completions of the group at once
    a completion attends to itself                  causal

The two parts of a completion are merged by their log-sum-exps, as blocks are in ring attention (Liu et al. 2023,
arXiv:2310.01889, section 3): with l = logaddexp(l_1, l_2) the result is o = o_1 exp(l_1 - l) + o_2 exp(l_2 - l). For
the gradient each part is given the merged o and l: then its softmax is its own part of the whole one, and the gradients
of the parts add up. Everything is a slice of the packed row: nothing is gathered or padded.

The kernels are torch's flash attention for CPUs, which takes any strides; what it returns is exact.

Shapes: N tokens, H heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt and its completions in the packed row, one behind the other.

    Example: a prompt of 2 tokens with completions of 1 and 2: ``Group(prompt=slice(0, 2), completions=(slice(2, 3),
    slice(3, 5)))``
    """

    prompt: slice
    completions: tuple[slice, ...]

    @property
    def behind(self) -> slice:
        """All completions."""
        return slice(self.completions[0].start, self.completions[-1].stop)


class PrefixAttention(torch.autograd.Function):
    """Attention of groups that fill a packed row; see the module."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float | None
    ) -> Tensor:
        """[1, H, N, E] from query, key and value, each [1, H, N, E]."""

        def attend(rows: slice, columns: slice, *, causal: bool) -> tuple[Tensor, Tensor]:
            keys, values = key[:, :, columns], value[:, :, columns]
            output, lse = _forward(query[:, :, rows], keys, values, 0.0, causal, scale=scale)
            return output, lse[..., None]

        result, lse = torch.empty_like(query), query.new_empty((*query.shape[:3], 1), dtype=torch.float32)
        for group in groups:
            result[:, :, group.prompt], lse[:, :, group.prompt] = attend(group.prompt, group.prompt, causal=True)
            shared, shared_lse = attend(group.behind, group.prompt, causal=False)
            parts = [attend(part, part, causal=True) for part in group.completions]
            own, own_lse = (torch.cat(both, 2) for both in zip(*parts, strict=True))
            merged = torch.logaddexp(shared_lse, own_lse)
            lse[:, :, group.behind] = merged
            own.mul_((own_lse - merged).exp_()).add_(shared.mul_((shared_lse - merged).exp_()))
            result[:, :, group.behind] = own
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.groups, ctx.scale = groups, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, result, lse = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(one) for one in (query, key, value))

        def give_back(rows: slice, columns: slice, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = key[:, :, columns], value[:, :, columns]
            slope, output = gradients[0][:, :, rows], result[:, :, rows]
            norm = lse[:, :, rows, 0]
            found: tuple[Tensor, Tensor, Tensor] = _backward(
                slope, query[:, :, rows], keys, values, output, norm, 0.0, causal, scale=ctx.scale
            )
            return found

        for group in ctx.groups:
            for part in (group.prompt, *group.completions):
                own = give_back(part, part, causal=True)
                to_query[:, :, part], to_key[:, :, part], to_value[:, :, part] = own
            to_rows, to_keys, to_values = give_back(group.behind, group.prompt, causal=False)
            to_query[:, :, group.behind] += to_rows
            to_key[:, :, group.prompt] += to_keys
            to_value[:, :, group.prompt] += to_values
        return to_query, to_key, to_value, None, None
