"""Run any Hugging Face decoder on packed tokens: no padding in the linear layers, each shared prompt computed once.

The model sees one row of N tokens, group after group (``prompt, completion, completion, ...``), with positions that
start anew at each prompt and go on from the prompt's end at each of its completions. Only attention must know that
completions of one prompt do not see each other. The attention registered here as `ATTENTION` has these ways to do it:

* **Rows.** Layer by layer the queries, keys and values of every sequence (prompt + completion) are gathered into
  right-padded rows, ordinary causal attention runs on them, and the result is scattered back. Padding lies behind every
  real token, so causality alone hides it and no mask is built. Rows of similar length share a bucket, so little is
  wasted. A prompt's attention is computed once for each of its completions.
* **Shared prompts**: nothing is gathered, padded or computed twice. On a CPU where prompts and completions are long
  enough for a call each; on a GPU where it is asked for (`flex_attention.py`).

On a CPU both are computed by `cpu_attention.py`.

The packing travels to the attention as a keyword argument through the model, not as a context variable: activation
checkpointing replays layers from autograd's own threads, where a context variable of the forward pass is not set.

Shapes: N tokens, S completions, L longest row of a bucket, H heads, E width of a head, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learners import flex_attention
from learners.cpu_attention import Group, PrefixAttention, RowAttention
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask


class Way(Enum):
    """How attention of a packed row is computed."""

    ROWS = "rows"
    GROUPS = "groups of a shared prompt, on a CPU"
    FLEX = "FlexAttention under a block mask, on a GPU"


ATTENTION = "agon_packed"
"""Name of the attention implementation. Without a packing it is transformers' own SDPA attention."""

_SMALLEST_FILL = 0.75
"""Rows shorter than this share of their bucket's longest open a new bucket."""

_SHORTEST_SLICE = 64
"""Tokens of a prompt or completion, on average, from which on a kernel call for each is faster than padded rows."""


class PackedColumns(Protocol):
    """The token columns of a `PreferenceBatch` or of `PackedSequences`."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def prompt_starts(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def prompt_lengths(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def completion_groups(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def completion_starts(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def completion_lengths(self) -> NDArray[np.int32]: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packing:
    """Where each token of a packed row sits in the rows that attention sees.

    Example: one prompt of 2 tokens with completions of 1 and 2 has N=5 and, in one bucket, the rows
    ``[[0, 1, 3, 4], [0, 1, 2, 0]]`` (the last 0 is padding).
    """

    positions: Tensor
    """[1, N] position of each token in its sequence."""
    rows: tuple[Tensor, ...]
    """Of each bucket [S_b, L_b] the token that stands there; padding repeats the row's first token."""
    source: Tensor
    """[N] where each token's attention output lies in the buckets' rows, laid end to end; [0] without rows."""
    groups: tuple[Group, ...] = ()
    """By `Way.GROUPS` there are groups instead of rows."""
    mask: BlockMask | None = None
    """By `Way.FLEX` there is a mask instead of rows."""


def plan_packing(columns: PackedColumns, device: torch.device, *, way: Way = Way.ROWS) -> Packing:
    """Lay out packed columns for attention."""
    positions = torch.from_numpy(_positions(columns))[None].to(device)
    if way is Way.GROUPS:
        return Packing(positions=positions, rows=(), source=torch.empty(0), groups=_groups(columns))
    if way is Way.FLEX:
        mask = flex_attention.mask_of(columns, device)
        return Packing(positions=positions, rows=(), source=torch.empty(0), mask=mask)
    rows, source = _rows(columns)
    return Packing(
        positions=positions,
        rows=tuple(torch.from_numpy(tokens).to(device) for tokens in rows),
        source=torch.from_numpy(source).to(device),
    )


def _positions(columns: PackedColumns) -> NDArray[np.int64]:
    """[N] position of each token in its sequence."""
    prompts = columns.prompt_lengths[columns.completion_groups].astype(np.int64)
    starts = np.concatenate([columns.prompt_starts, columns.completion_starts])
    lengths = np.concatenate([columns.prompt_lengths, columns.completion_lengths])
    shifts = np.concatenate([columns.prompt_starts, columns.completion_starts - prompts])
    order = np.argsort(starts)
    positions: NDArray[np.int64] = np.arange(len(columns.tokens)) - np.repeat(shifts[order], lengths[order])
    return positions


def _groups(columns: PackedColumns) -> tuple[Group, ...]:
    """The prompts with their completions, as slices of the packed row."""
    completions: list[list[slice]] = [[] for _ in columns.prompt_starts]
    sizes = zip(columns.completion_starts.tolist(), columns.completion_lengths.tolist(), strict=True)
    for group, (start, length) in zip(columns.completion_groups.tolist(), sizes, strict=True):
        completions[group].append(slice(start, start + length))
    prompts = zip(columns.prompt_starts.tolist(), columns.prompt_lengths.tolist(), strict=True)
    return tuple(
        Group(prompt=slice(start, start + length), completions=tuple(parts))
        for (start, length), parts in zip(prompts, completions, strict=True)
    )


def _rows(columns: PackedColumns) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """`Packing.rows` and `Packing.source`."""
    prompts = columns.prompt_lengths[columns.completion_groups].astype(np.int64)
    prompt_starts = columns.prompt_starts[columns.completion_groups]
    lengths = prompts + columns.completion_lengths
    source = np.zeros(len(columns.tokens), np.int64)
    rows = []
    offset = 0
    for members in _buckets(lengths):
        place = np.arange(lengths[members].max())[None, :]
        prompt = prompts[members, None]
        token = np.where(
            place < prompt,
            prompt_starts[members, None] + place,
            columns.completion_starts[members, None] + place - prompt,
        )
        real = place < lengths[members, None]
        token = np.where(real, token, prompt_starts[members, None])
        source[token[real]] = offset + np.flatnonzero(real)
        offset += token.size
        rows.append(token)
    return rows, source


def _buckets(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of sequences by similar length, longest first."""
    order = np.argsort(-lengths, kind="stable")
    cuts = [0]
    for place, length in enumerate(lengths[order].tolist()):
        if length < _SMALLEST_FILL * lengths[order[cuts[-1]]]:
            cuts.append(place)
    return np.split(order, cuts[1:])


def run_base_model(model: nn.Module, columns: PackedColumns, *, way: Way | None = None) -> Tensor:
    """Hidden states [N, D] after the last norm, each token's as if its sequence ran alone.

    Args:
        model: a causal language model of transformers whose attention implementation is `ATTENTION`.
        columns: the packed tokens.
        way: of attention; prompts are shared only where `can_share` says so. None: rows, or on CPUs whatever is faster.

    Raises:
        ModelError: the model's attention cannot be packed (`packed_attention` says why).
    """
    base: Any = model.base_model
    device = next(model.parameters()).device
    if way is None:
        slices = len(columns.prompt_starts) + len(columns.completion_starts)
        long = device.type == "cpu" and len(columns.tokens) >= _SHORTEST_SLICE * slices
        way = Way.GROUPS if long and can_share(model) else Way.ROWS
    packing = plan_packing(columns, device, way=way)
    output = base(
        input_ids=torch.from_numpy(columns.tokens.astype(np.int64))[None].to(device),
        position_ids=packing.positions,
        # A four-dimensional mask is handed on by transformers as it is, so no [N, N] mask is built; nothing reads it.
        attention_mask=torch.zeros((1, 1, 1, 1), device=device),
        use_cache=False,
        packing=packing,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def can_share(model: nn.Module) -> bool:
    """Whether attention with shared prompts serves the model."""
    config: Any = model.config
    return getattr(config, "sliding_window", None) is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows; of ordinary padded rows (no packing) transformers' own SDPA attention.

    Args:
        module: the attention layer.
        query: [1, H, N, E]
        key: [1, H_kv, N, E]
        value: [1, H_kv, N, E]
        attention_mask: for padded rows only.
        packing: the layout of the packed row.
        kwargs: what the architecture asks of its attention. `scaling` and `sliding_window` are honoured; dropout is
            not, since a log-ratio between two networks thinned differently is noise.

    Returns:
        [1, N, H, E], None

    Raises:
        ModelError: the architecture asks for more than causal attention (score capping, sinks, position biases).
    """
    if packing is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    _refuse_unknown(module, kwargs)
    given = kwargs.get("scaling")
    scale = float(query.shape[-1] ** -0.5 if given is None else given)
    if packing.groups:
        return _shared(query, key, value, packing.groups, scale), None
    if packing.mask is not None:
        return flex_attention.attend(query, key, value, packing.mask, scale), None
    flat_query, flat_key, flat_value = (_flat(states, value.dtype) for states in (query, key, value))
    outputs = []
    for rows in packing.rows:
        attended = _of_rows(
            _gather(flat_query, rows, query.shape[1]),
            _gather(flat_key, rows, key.shape[1]),
            _gather(flat_value, rows, value.shape[1]),
            mask=_window_mask(rows, kwargs.get("sliding_window")),
            scale=scale,
        )
        outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    packed = F.embedding(packing.source, torch.cat(outputs))
    return packed.view(1, len(packing.source), query.shape[1], value.shape[3]), None


def _of_rows(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """[S_b, H, L_b, E] from [S_b, H, L_b, E] and twice [S_b, H_kv, L_b, E]; `mask`: what else hides a token."""
    if query.device.type != "cpu" or mask is not None:
        enable_gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
    apply: Any = RowAttention.apply
    repeats = query.shape[1] // key.shape[1]
    attended: Tensor = apply(query.float(), _repeated(key, repeats), _repeated(value, repeats), scale)
    return attended.to(value.dtype)


def _shared(query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
    """[1, N, H, E], each prompt's keys and values used for all its completions."""
    apply: Any = PrefixAttention.apply
    repeats = query.shape[1] // key.shape[1]
    keys, values = _repeated(key, repeats)[0], _repeated(value, repeats)[0]
    attended: Tensor = apply(query[0].float(), keys, values, groups, scale)
    return attended.to(value.dtype).transpose(0, 1)[None]


def _repeated(states: Tensor, times: int) -> Tensor:
    """A head for each query head, in float32."""
    return (states.repeat_interleave(times, 1) if times > 1 else states).float()


def _flat(states: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, N, E] to [N, H * E]. Autocast leaves rotated queries and keys in fp32; attention wants one dtype."""
    return states[0].transpose(0, 1).flatten(1).to(dtype)


def _gather(flat: Tensor, rows: Tensor, heads: int) -> Tensor:
    """[N, H * E] to [S_b, H, L_b, E]. `F.embedding` because its gradient is summed in a fixed order, and fastest."""
    return F.embedding(rows, flat).view(*rows.shape, heads, -1).transpose(1, 2)


def _window_mask(rows: Tensor, window: int | None) -> Tensor | None:
    """[L, L] what each token sees within a sliding window, or None when causality is all there is."""
    length = rows.shape[1]
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=rows.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention with `{name}` ({type(module).__name__}) cannot run packed")
    config: Any = getattr(module, "config", None)
    if getattr(config, "sliding_window", None) is None or kwargs.get("sliding_window") is not None:
        return
    kinds = getattr(config, "layer_types", None)
    index: Any = getattr(module, "layer_idx", None)
    if kinds is None or kinds[index] == "sliding_attention":
        raise ModelError(
            f"{type(module).__name__} does not tell its attention the sliding window; it cannot run packed"
        )


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
