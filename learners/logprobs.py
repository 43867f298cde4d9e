"""Log-probs of completion tokens: packed, prompt-sharing, a chunk of logits at a time; and the plain way beside it.

`token_logprobs` is what the learner runs. `plain_token_logprobs` is an ordinary padded forward: the reference that
`check_packing` and the tests compare with, and what runs for architectures the packed form cannot serve.

Shapes: N tokens, S completions, C completion tokens, V vocabulary, v columns of one chunk, D hidden width, T tokens of
one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learners.packed import Way, can_share, run_base_model
from orchestrator.batching import pack_sequences
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from learners.packed import PackedColumns

_REFUSED_SETTINGS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Nats by which a token's log-prob may differ, by dtype of the weights: above rounding, below a wrong mask."""
_FLEX_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Likewise, of the norm of all log-probs or of a gradient, by dtype of the products."""
_SMALL = {7: (1, 9, 4), 1: (5, 2), 3: (3,)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenScores:
    """What a forward pass says of the completions of a batch."""

    logprobs: Tensor
    """[C] fp32, natural-log probability of each completion token given its prompt and the tokens before it."""
    log_collision: Tensor | None
    """[C] log of the sum of squared probabilities at each token, without gradient; None unless asked for."""
    states: Tensor | None
    """[S, D] sum of the last hidden states that predict each completion's tokens, from the prompt's last token to the
    completion's last but one, without gradient; None where completions are scored in padded rows."""


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] without holding [C, V] logits, unless they are few.

    The forward pass keeps a running maximum and sum over chunks of the vocabulary (online normalizer of Milakov and
    Gimelshein 2018, algorithm 3); the backward pass computes each chunk's logits again, a fourth product of the head
    beside three, or scales what the forward pass kept. With p = softmax(logits) and g the gradient of the result, the
    gradient of the logits is g * (onehot(target) - p). Everything between the matrix products is fp32, and so are the
    products' results.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocab_chunk: int,
        collision: bool,
        kept_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        """[C] fp32 from hidden [C, D], weight [V, D], bias [V] or None, targets [C]; and log sum p^2 [C] if asked.

        For the backward pass [C, V] fp32 are kept where they take at most `kept_bytes`.
        """
        dtype = _product_dtype(hidden)
        states = hidden.to(dtype)
        maximum = torch.full((len(targets),), -torch.inf, device=hidden.device)
        total, squares = torch.zeros_like(maximum), torch.zeros_like(maximum)
        chosen = torch.zeros_like(maximum)
        keeps = len(targets) * len(weight) * maximum.element_size() <= kept_bytes
        kept: list[Tensor] = []
        for start in range(0, len(weight), vocab_chunk):
            logits = _chunk_logits(states, weight, bias, start, vocab_chunk)
            higher = torch.maximum(maximum, logits.amax(1))
            index, inside = _target_columns(targets, start, logits.shape[1])
            chosen = torch.where(inside, logits.gather(1, index)[:, 0], chosen)
            shrunk = (maximum - higher).exp()
            total = total * shrunk + logits.sub_(higher[:, None]).exp_().sum(1)
            if collision:
                squares = squares * shrunk.square() + torch.linalg.vecdot(logits, logits)
            maximum = higher
            if keeps:
                kept += [logits, maximum]
            del logits  # before the next chunk's are made
        normalizer = maximum + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, *kept)
        ctx.vocab_chunk = vocab_chunk
        ctx.dtype = dtype
        if not collision:
            return chosen - normalizer, None
        log_collision = squares.log() - 2 * total.log()
        ctx.mark_non_differentiable(log_collision)
        return chosen - normalizer, log_collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, in their dtypes."""
        hidden, weight, bias, targets, normalizer, *kept = ctx.saved_tensors
        gradient = gradients[0].float()[:, None]
        states = hidden.to(ctx.dtype)
        to_hidden = torch.zeros(hidden.shape, device=hidden.device) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for number, start in enumerate(range(0, len(weight), ctx.vocab_chunk)):
            if kept:
                logits, maximum = kept[2 * number : 2 * number + 2]
                slope = logits * ((maximum - normalizer).exp()[:, None] * -gradient)
            else:
                slope = _chunk_logits(states, weight, bias, start, ctx.vocab_chunk)
                slope.sub_(normalizer[:, None]).exp_().mul_(-gradient)
            columns = slice(start, start + slope.shape[1])
            index, inside = _target_columns(targets, start, slope.shape[1])
            slope.scatter_add_(1, index, torch.where(inside[:, None], gradient, 0.0))
            if to_bias is not None:
                to_bias[columns] = slope.sum(0)
            slope = slope.to(ctx.dtype)
            if to_hidden is not None:
                to_hidden += _product(slope, weight[columns].to(ctx.dtype))
            if to_weight is not None:
                to_weight[columns] = _product(slope.T, states)
            del slope
        return (
            to_hidden if to_hidden is None else to_hidden.to(hidden.dtype),
            to_weight,
            to_bias,
            None,
            None,
            None,
            None,
        )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """bf16 products with fp32 results exist on CUDA; elsewhere the head runs in fp32, since bf16 logits are too coarse.

    At a logit of 20 bf16 steps are 0.125 wide, and a preference loss sums the rounding of hundreds of tokens.
    """
    if hidden.device.type != "cuda":
        return torch.float32
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return hidden.dtype


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in fp32, outside autocast."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)


def _chunk_logits(states: Tensor, weight: Tensor, bias: Tensor | None, start: int, vocab_chunk: int) -> Tensor:
    """[C, v] fp32 logits of the chunk's columns."""
    columns = slice(start, start + vocab_chunk)
    logits = _product(states, weight[columns].to(states.dtype).T)
    return logits if bias is None else logits.add_(bias[columns])


def _target_columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The targets' columns in a chunk as [C, 1] (clamped into it), and whether they are really inside, [C]."""
    local = targets - start
    return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)


def completion_indices(columns: PackedColumns) -> tuple[np.ndarray, np.ndarray]:
    """Token indices [C] of completion tokens, and [C] of the tokens that predict them.

    A completion's first token is predicted by the last of its prompt, wherever the completion itself lies.
    """
    lengths = columns.completion_lengths.astype(np.int64)
    offsets = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
    targets = np.repeat(columns.completion_starts, lengths) + within
    groups = np.repeat(columns.completion_groups, lengths)
    prompt_ends = columns.prompt_starts[groups] + columns.prompt_lengths[groups] - 1
    return targets, np.where(within == 0, prompt_ends, targets - 1)


def token_logprobs(
    model: nn.Module,
    columns: PackedColumns,
    *,
    vocab_chunk: int,
    logits_mb: int = 0,
    collision: bool = False,
    way: Way | None = None,
) -> TokenScores:
    """Scores of each completion token; differentiable.

    Args:
        model: a causal language model of transformers whose attention implementation is `packed.ATTENTION`.
        columns: the packed tokens; completions in order.
        vocab_chunk: columns of the vocabulary whose logits exist at once.
        logits_mb: all of them, where there is a backward pass, are kept for it if they take no more MiB than this.
        collision: give `TokenScores.log_collision` too.
        way: see `run_base_model`.

    Raises:
        ModelError: the model's attention or head cannot run packed.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ModelError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a linear layer")
    targets, predictors = completion_indices(columns)
    hidden = run_base_model(model, columns, way=way)
    hidden = F.embedding(torch.from_numpy(predictors).to(hidden.device), hidden)
    wanted = torch.from_numpy(columns.tokens[targets].astype(np.int64)).to(hidden.device)
    apply: Any = ChunkedLogprobs.apply
    kept_bytes = logits_mb << 20 if torch.is_grad_enabled() else 0
    logprobs, log_collision = apply(hidden, head.weight, head.bias, wanted, vocab_chunk, collision, kept_bytes)
    lengths = torch.from_numpy(columns.completion_lengths.astype(np.int64)).to(hidden.device)
    states = torch.segment_reduce(hidden.detach().float(), "sum", lengths=lengths, axis=0)
    return TokenScores(logprobs=logprobs, log_collision=log_collision, states=states)


def plain_token_logprobs(model: nn.Module, columns: PackedColumns, *, collision: bool = False) -> TokenScores:
    """The same by an ordinary forward: one right-padded row a completion, whole logits, nothing shared."""
    device = next(model.parameters()).device
    prompts = columns.prompt_lengths[columns.completion_groups]
    lengths = prompts + columns.completion_lengths
    shape = (len(lengths), int(lengths.max()))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    scored = np.zeros(shape, bool)
    for row, (group, prompt, length) in enumerate(zip(columns.completion_groups, prompts, lengths, strict=True)):
        start, completion = columns.prompt_starts[group], columns.completion_starts[row]
        ids[row, :prompt] = columns.tokens[start : start + prompt]
        ids[row, prompt:length] = columns.tokens[completion : completion + length - prompt]
        mask[row, :length] = 1
        scored[row, prompt:length] = True
    inputs = torch.from_numpy(ids).to(device)
    logits = model(input_ids=inputs, attention_mask=torch.from_numpy(mask).to(device), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(2, inputs[:, 1:, None])[..., 0]
    real = torch.from_numpy(scored[:, 1:]).to(device)
    log_collision = (2 * logprobs.detach()).logsumexp(-1)[real] if collision else None
    return TokenScores(logprobs=picked[real], log_collision=log_collision, states=None)


def check_packing(model: nn.Module, *, vocab_chunk: int, seed: int = 0) -> str | None:
    """Prove on a small random batch that this very model may run packed: None, or why it may not.

    In rows, and on a CPU in groups too. `check_flex` proves the third way.

    The batch has a shared prompt, lengths from 1 upwards, and the vocabulary's last token. Whether packing is right
    does not depend on autocast, so both forwards run without it and the tolerance can be tight.
    """
    config: Any = model.config
    for name in _REFUSED_SETTINGS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"the model uses `{name}`"
    unknown = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
    if unknown:
        return f"the model has layers of kind {', '.join(sorted(unknown))}"
    columns = _probe(config.vocab_size, seed)
    parameter = next(model.parameters())
    with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
        plain = plain_token_logprobs(model, columns).logprobs
        ways = [Way.ROWS]
        if parameter.device.type == "cpu" and can_share(model):
            ways.append(Way.GROUPS)
        try:
            packed = [token_logprobs(model, columns, vocab_chunk=vocab_chunk, way=way).logprobs for way in ways]
        except (ModelError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    difference = max(float((logprobs - plain).abs().max()) for logprobs in packed)
    if not difference <= _TOLERANCES[parameter.dtype]:
        return f"packed and plain log-probs differ by {difference:.2g} nats on a probe batch"
    return None


def check_flex(model: nn.Module, *, vocab_chunk: int, dtype: torch.dtype, seed: int = 0) -> str | None:
    """Prove on random batches of several blocks that FlexAttention gives what rows give: None, or why it does not.

    Log-probs and the gradient of the embeddings, which has gone through every layer, as they are computed in training.
    What torch's compiler may raise where it cannot make a kernel is not listed anywhere: each exception counts.
    """
    if not can_share(model):
        return "the model attends within a sliding window"
    config: Any = model.config
    table: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    try:
        for shape in ({60: (40, 9, 33), 1: (44, 2), 30: (50,)}, {50: (50, 50, 31), 7: (3, 50, 48, 31), 40: (20, 1)}):
            columns = _probe(config.vocab_size, seed, shape)
            found = []
            for way in (Way.ROWS, Way.FLEX):
                with torch.autocast(table.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logprobs = token_logprobs(model, columns, vocab_chunk=vocab_chunk, way=way).logprobs
                found.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), table)))
            for what, rows, flex in zip(("log-probs", "gradients"), *found, strict=True):
                difference = float((flex - rows).norm() / rows.norm())
                if not difference <= _FLEX_TOLERANCES[dtype]:
                    return f"its {what} differ from those of rows by {difference:.2g} of their norm"
    except Exception as error:  # noqa: BLE001 - see above
        return f"{type(error).__name__}: {error}"
    return None


def _probe(vocab_size: int, seed: int, shape: Mapping[int, Sequence[int]] = _SMALL) -> PackedColumns:
    """Prompts of so many tokens with completions of so many, and each with one of the vocabulary's last token."""
    random = np.random.default_rng(seed)
    sequences = []
    for prompt_length, lengths in shape.items():
        prompt = tuple(random.integers(0, vocab_size, prompt_length).tolist())
        sequences += [(prompt, tuple(random.integers(0, vocab_size, length).tolist())) for length in lengths]
        sequences.append((prompt, (vocab_size - 1,)))
    return pack_sequences(sequences)[0]
