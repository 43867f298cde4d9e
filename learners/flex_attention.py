"""Attention of packed groups on a GPU by torch's FlexAttention: a prompt's keys and values serve all its completions.

One call over the packed row under a block mask (Dong et al. 2024, "Flex Attention", arXiv:2412.05496): blocks of tokens
none of which sees one of the other block are skipped, so a prompt is attended to in place, once. Nothing is gathered
into rows, as it is without (`packed.py`).

No GPU was at hand when it was written. Its masks, values and gradients are tested on CPUs, where FlexAttention has an
unfused form; its kernels are torch's. Therefore it is asked for (`learner.flex_attention`), and as the learner starts
its log-probs and gradients are compared with those of rows, on the device: where that fails or differs, rows are used.

Shapes: N tokens of the packed row, H heads, E width of a head.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from learners.packed import PackedColumns

_BLOCK = 128
"""Tokens: what a kernel takes or skips at once. Rows are filled up to whole blocks, which bounds how many there are."""


def mask_of(columns: PackedColumns, device: torch.device) -> flex_attention.BlockMask:
    """Which token sees which: itself and what is before it in its own sequence, and the prompt of that."""
    num_prompts, size = len(columns.prompt_starts), -(-len(columns.tokens) // _BLOCK) * _BLOCK
    own, prompt = np.full(size, -1), np.full(size, -1)  # tokens that fill up see each other only
    for number, (start, length) in enumerate(zip(columns.prompt_starts, columns.prompt_lengths, strict=True)):
        own[start : start + length] = prompt[start : start + length] = number
    completions = zip(columns.completion_starts, columns.completion_lengths, columns.completion_groups, strict=True)
    for number, (start, length, group) in enumerate(completions, num_prompts):
        own[start : start + length], prompt[start : start + length] = number, group
    of_own, of_prompt = torch.from_numpy(own).to(device), torch.from_numpy(prompt).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((of_own[query] == of_own[key]) | (of_prompt[query] == of_own[key]))

    whole, part = _blocks(own.reshape(-1, _BLOCK), prompt.reshape(-1, _BLOCK))
    lists = [each for found in (part, whole) for each in _listed(found, device)]
    from_kv_blocks: Any = flex_attention.BlockMask.from_kv_blocks
    mask: flex_attention.BlockMask = from_kv_blocks(*lists, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(size, size))
    return mask


def _blocks(own: NDArray[np.int64], prompt: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[blocks, blocks] whether each query of one sees each key of the other, and whether only some do.

    From what is in each block, not from each pair of tokens: [N, N] would be gigabytes.
    """
    of_queries = [set(mine) | set(theirs) for mine, theirs in zip(own.tolist(), prompt.tolist(), strict=True)]
    of_keys = [set(mine) for mine in own.tolist()]
    count = len(own)
    whole, part = np.zeros((count, count), bool), np.zeros((count, count), bool)
    for query in range(count):
        for key in range(query + 1):
            if of_queries[query] & of_keys[key]:
                sees_all = all(np.all((own[query] == one) | (prompt[query] == one)) for one in of_keys[key])
                (whole if sees_all and key < query else part)[query, key] = True
    return whole, part


def _listed(found: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row how many are marked [1, 1, blocks], and which, the marked ones first [1, 1, blocks, blocks]."""
    counts = torch.from_numpy(found.sum(1).astype(np.int32))
    order = torch.from_numpy(np.argsort(~found, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), order[None, None].to(device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: flex_attention.BlockMask, scale: float) -> Tensor:
    """[1, N, H, E] from query [1, H, N, E], key and value [1, H_kv, N, E], in the dtype of the values."""
    missing = mask.shape[-1] - query.shape[2]
    filled = [F.pad(states.to(value.dtype), (0, 0, 0, missing)) for states in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    attended: Tensor = _kernel()(*filled, block_mask=mask, scale=scale, enable_gqa=grouped)
    return attended[:, :, : query.shape[2]].transpose(1, 2)


@cache
def _kernel() -> Any:
    return torch.compile(flex_attention.flex_attention)
