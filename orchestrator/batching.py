"""Pairs to packed ragged columns and back to smaller ones: shuffle, pack, split. Pure numpy.

    pairs --batches()--> global batches --pack()--> PreferenceBatch --split()--> micro-batches

A prompt is packed once however many completions it has, and a completion once however many pairs it is part of, so
that the learner computes neither twice. Pairs of one prompt therefore stay together wherever they can.

Shapes: N tokens, G groups, S completions, C completion tokens, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.types import PreferenceBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from orchestrator.types import PolicyVersion, PreferencePair

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedSequences:
    """Prompts with their completions as packed ragged columns: what `PreferenceBatch` holds of tokens, without pairs.

    Example: the columns behind ``pack_sequences([((1, 5), (7, 2))])``.
    """

    tokens: NDArray[np.int32]
    """[N] token ids."""
    prompt_starts: NDArray[np.int64]
    """[G] offset in `tokens`."""
    prompt_lengths: NDArray[np.int32]
    """[G] tokens, at least 1."""
    completion_groups: NDArray[np.int32]
    """[S] group of completion s; non-decreasing."""
    completion_starts: NDArray[np.int64]
    """[S] offset in `tokens`."""
    completion_lengths: NDArray[np.int32]
    """[S] tokens, at least 1."""


def batches(
    pairs: Sequence[PreferencePair], *, batch_pairs: int, seed: int, epoch: int, whole_groups: bool = False
) -> list[list[PreferencePair]]:
    """Shuffle pairs into global batches; the last one may be short.

    Whole prompts are shuffled, so that pairs of one prompt are neighbours and share a batch unless its border falls
    between them. The order depends on the pairs' order, `seed` and `epoch` alone.

    Args:
        pairs: the pairs of an iteration.
        batch_pairs: pairs of one optimizer step, at least 1.
        seed: the run's seed.
        epoch: pass over the pairs, 0 for the first; each has an order of its own.
        whole_groups: close a batch before a prompt that does not fit; one with more than `batch_pairs` is a batch.
    """
    if batch_pairs < 1:
        raise ValueError(f"batch_pairs is {batch_pairs}; it must be at least 1")
    groups: dict[tuple[str, Tokens], list[PreferencePair]] = {}
    for pair in pairs:
        groups.setdefault((pair.prompt.id, pair.prompt.token_ids), []).append(pair)
    blocks = list(groups.values())
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
    if whole_groups:
        made: list[list[PreferencePair]] = []
        for index in order:
            if not made or len(made[-1]) + len(blocks[index]) > batch_pairs:
                made.append([])
            made[-1] += blocks[index]
        return made
    shuffled = list(chain.from_iterable(blocks[index] for index in order))
    return [shuffled[start : start + batch_pairs] for start in range(0, len(shuffled), batch_pairs)]


def pack(
    pairs: Sequence[PreferencePair],
    *,
    number: int = 0,
    mismatched: bool = False,
    include_prompt: bool = False,
    sampled_reference: bool = False,
    stale: bool = False,
) -> PreferenceBatch:
    """Pack pairs into one batch. Groups come in the order their prompts first appear.

    Args:
        pairs: at least one, all of the same iteration and loss reference; their order is kept.
        number: of the batch within its iteration.
        mismatched: each prompt is also given the first completion of the next prompt in the batch (of the first one
            after the last); nothing is added to a batch of a single prompt.
        include_prompt: count the prompt's tokens, all but the first, as tokens of the completions, so that they are
            scored. Nothing is shared then.
        sampled_reference: where the reference sampled every completion and nothing else is scored, its log-probs are
            those noted then; otherwise, or where False, the batch has none yet.
        stale: other weights than the learner's may have sampled them: the batch says how probable they were then.

    Raises:
        ValueError: no pairs, an empty prompt or completion, token weights of another length than their completion,
            pairs of different iterations or references, or of none.
    """
    first, reference = _first_of_equals(pairs)
    sequences = [
        (pair.prompt.token_ids, completion.token_ids) for pair in pairs for completion in (pair.chosen, pair.rejected)
    ]
    sides = len(sequences)
    if mismatched:
        sequences += _mismatched(sequences)
    if include_prompt:
        sequences = [(prompt[:1], prompt[1:] + completion) for prompt, completion in sequences]
    columns, index = _columns(sequences)
    as_sampled = sampled_reference and not include_prompt and len(sequences) == sides
    return PreferenceBatch(
        tokens=columns.tokens,
        prompt_starts=columns.prompt_starts,
        prompt_lengths=columns.prompt_lengths,
        completion_groups=columns.completion_groups,
        completion_starts=columns.completion_starts,
        completion_lengths=columns.completion_lengths,
        chosen=index[0:sides:2],
        rejected=index[1:sides:2],
        weights=np.array([pair.weight for pair in pairs], np.float32),
        labels=np.array([pair.label for pair in pairs], np.float32),
        chosen_scores=np.array([pair.chosen_score for pair in pairs], np.float32),
        rejected_scores=np.array([pair.rejected_score for pair in pairs], np.float32),
        data_versions=np.array(
            [min(pair.chosen.policy.number, pair.rejected.policy.number) for pair in pairs], np.int32
        ),
        mismatched=index[sides:],
        chosen_token_weights=_token_weights(pairs, "chosen", include_prompt),
        rejected_token_weights=_token_weights(pairs, "rejected", include_prompt),
        reference_logprobs=_by_reference(pairs, index) if as_sampled else None,
        sampled_logprobs=_as_sampled(pairs) if stale else None,
        pair_ids=tuple(pair.id for pair in pairs),
        reference=reference,
        iteration=first.iteration,
        number=number,
    )


def _first_of_equals(pairs: Sequence[PreferencePair]) -> tuple[PreferencePair, PolicyVersion]:
    """The first pair, and its reference. Raises ValueError where another differs in iteration or reference."""
    if not pairs:
        raise ValueError("no pairs to pack")
    first = pairs[0]
    if first.reference is None:
        raise ValueError(f"pair {first.id} has no reference yet")
    for pair in pairs:
        if (pair.iteration, pair.reference) != (first.iteration, first.reference):
            raise ValueError(
                f"pairs of one batch must share iteration and reference: {first.id} has {first.iteration} and "
                f"{first.reference}, {pair.id} has {pair.iteration} and {pair.reference}"
            )
    return first, first.reference


def _by_reference(pairs: Sequence[PreferencePair], index: NDArray[np.int32]) -> NDArray[np.float32] | None:
    """[C] log-probs of the completions as sampled; None where one was sampled by another policy than the reference.

    Args:
        pairs: of the batch.
        index: [2 P] the number of each pair's chosen and rejected completion.
    """
    found: dict[int, tuple[float, ...]] = {}
    sides = ((pair, completion) for pair in pairs for completion in (pair.chosen, pair.rejected))
    for number, (pair, completion) in zip(index.tolist(), sides, strict=True):
        if completion.policy != pair.reference or completion.switches:
            return None
        if len(completion.logprobs) != len(completion.token_ids):
            return None
        found.setdefault(number, completion.logprobs)
    return np.fromiter(chain.from_iterable(found[number] for number in sorted(found)), np.float32)


def _as_sampled(pairs: Sequence[PreferencePair]) -> NDArray[np.float64]:
    """[P, 2] log-probs of the completions under the weights that sampled their tokens.

    Raises:
        ValueError: they were not noted for every token.
    """
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            if len(side.logprobs) != len(side.token_ids):
                raise ValueError(f"pair {pair.id}: {len(side.logprobs)} log-probs of {len(side.token_ids)} tokens")
    return np.array([(sum(pair.chosen.logprobs), sum(pair.rejected.logprobs)) for pair in pairs], np.float64)


def _mismatched(sequences: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[Tokens, Tokens]]:
    """For each prompt, in the order they first appear, itself with the first completion of the next one."""
    first: dict[Tokens, Tokens] = {}
    for prompt, completion in sequences:
        first.setdefault(prompt, completion)
    prompts = list(first)
    if len(prompts) == 1:
        return []
    return [(prompt, first[after]) for prompt, after in zip(prompts, prompts[1:] + prompts[:1], strict=True)]


def _token_weights(pairs: Sequence[PreferencePair], side: str, include_prompt: bool) -> NDArray[np.float32] | None:
    given = [getattr(pair, f"{side}_token_weights") for pair in pairs]
    if all(weights is None for weights in given):
        return None
    columns = []
    for pair, weights in zip(pairs, given, strict=True):
        length = len(getattr(pair, side).token_ids)
        if weights is not None and len(weights) != length:
            raise ValueError(f"pair {pair.id} has {len(weights)} token weights for the {length} tokens of its {side}")
        prompt = len(pair.prompt.token_ids) - 1 if include_prompt else 0
        columns.append(np.concatenate([np.ones(prompt), np.ones(length) if weights is None else weights]))
    return np.concatenate(columns, dtype=np.float32, casting="same_kind")


def pack_sequences(sequences: Sequence[tuple[Tokens, Tokens]]) -> tuple[PackedSequences, NDArray[np.int32]]:
    """Pack (prompt, completion) sequences, each prompt and each completion of it once.

    Returns:
        The columns, and for each sequence the index of its completion among the S.

    Raises:
        ValueError: no sequences, or an empty prompt or completion.
    """
    if not sequences:
        raise ValueError("no sequences to pack")
    return _columns(sequences)


def completion_keys(batch: PreferenceBatch) -> list[bytes]:
    """[S] what identifies each completion in its context: its prompt's length, and the tokens of both."""
    keys = []
    for group, start, length in zip(
        batch.completion_groups.tolist(),
        batch.completion_starts.tolist(),
        batch.completion_lengths.tolist(),
        strict=True,
    ):
        begin, size = int(batch.prompt_starts[group]), int(batch.prompt_lengths[group])
        parts = (batch.tokens[begin : begin + size], batch.tokens[start : start + length])
        keys.append(size.to_bytes(4, "little") + b"".join(part.tobytes() for part in parts))
    return keys


def split(batch: PreferenceBatch, max_tokens: int) -> list[PreferenceBatch]:
    """Cut a batch into micro-batches of whole prompt groups, none lost, in order.

    Each holds at most `max_tokens` tokens, save that a group larger than that is one of its own. Reference log-probs
    are cut along. Arrays of tokens are views of the batch's.
    """
    ends = [*batch.prompt_starts[1:].tolist(), batch.num_tokens]
    cuts = [0]
    for group, end in enumerate(ends):
        if end - batch.prompt_starts[cuts[-1]] > max_tokens and group > cuts[-1]:
            cuts.append(group)
    if len(cuts) == 1:
        return [batch]
    return [_groups(batch, low, high) for low, high in zip(cuts, [*cuts[1:], len(ends)], strict=True)]


def _columns(sequences: Sequence[tuple[Tokens, Tokens]]) -> tuple[PackedSequences, NDArray[np.int32]]:
    groups: dict[Tokens, dict[Tokens, int]] = {}
    for prompt, completion in sequences:
        if not prompt or not completion:
            raise ValueError(f"an empty {'completion' if prompt else 'prompt'} cannot be packed")
        groups.setdefault(prompt, {}).setdefault(completion, 0)
    number = 0
    for completions in groups.values():
        for completion in completions:
            completions[completion] = number
            number += 1
    index = np.array([groups[prompt][completion] for prompt, completion in sequences], np.int32)
    return _flatten(groups), index


def _flatten(groups: Mapping[Tokens, Mapping[Tokens, int]]) -> PackedSequences:
    segments = list(chain.from_iterable((prompt, *completions) for prompt, completions in groups.items()))
    lengths = np.array([len(segment) for segment in segments], np.int64)
    starts = np.cumsum(lengths) - lengths
    sizes = np.array([len(completions) for completions in groups.values()], np.int64)
    is_prompt = np.zeros(len(segments), bool)
    is_prompt[np.cumsum(sizes + 1) - (sizes + 1)] = True
    return PackedSequences(
        tokens=np.fromiter(chain.from_iterable(segments), np.int32, int(lengths.sum())),
        prompt_starts=starts[is_prompt],
        prompt_lengths=lengths[is_prompt].astype(np.int32),
        completion_groups=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        completion_starts=starts[~is_prompt],
        completion_lengths=lengths[~is_prompt].astype(np.int32),
    )


def _groups(batch: PreferenceBatch, low: int, high: int) -> PreferenceBatch:
    """The groups low <= g < high of a batch, with their pairs."""
    start = int(batch.prompt_starts[low])
    end = int(batch.prompt_starts[high]) if high < len(batch.prompt_starts) else batch.num_tokens
    first, last = np.searchsorted(batch.completion_groups, [low, high]).tolist()
    kept = np.flatnonzero((batch.chosen >= first) & (batch.chosen < last))
    offsets = np.concatenate([[0], np.cumsum(batch.completion_lengths, dtype=np.int64)])
    scored = slice(offsets[first], offsets[last])
    mine = (batch.mismatched >= first) & (batch.mismatched < last)
    return replace(
        batch,
        tokens=batch.tokens[start:end],
        prompt_starts=batch.prompt_starts[low:high] - start,
        prompt_lengths=batch.prompt_lengths[low:high],
        completion_groups=batch.completion_groups[first:last] - np.int32(low),
        completion_starts=batch.completion_starts[first:last] - start,
        completion_lengths=batch.completion_lengths[first:last],
        chosen=batch.chosen[kept] - np.int32(first),
        rejected=batch.rejected[kept] - np.int32(first),
        weights=batch.weights[kept],
        labels=batch.labels[kept],
        chosen_scores=batch.chosen_scores[kept],
        rejected_scores=batch.rejected_scores[kept],
        data_versions=batch.data_versions[kept],
        mismatched=batch.mismatched[mine] - np.int32(first),
        chosen_token_weights=_kept(batch.chosen_token_weights, batch.completion_lengths[batch.chosen], kept),
        rejected_token_weights=_kept(batch.rejected_token_weights, batch.completion_lengths[batch.rejected], kept),
        reference_logprobs=None if batch.reference_logprobs is None else batch.reference_logprobs[scored],
        sampled_logprobs=None if batch.sampled_logprobs is None else batch.sampled_logprobs[kept],
        pair_ids=tuple(batch.pair_ids[index] for index in kept.tolist()),
    )


def _kept(
    weights: NDArray[np.float32] | None, lengths: NDArray[np.int32], kept: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """The token weights of the pairs `kept`, of runs of `lengths`."""
    if weights is None:
        return None
    chosen = np.zeros(len(lengths), bool)
    chosen[kept] = True
    found: NDArray[np.float32] = weights[np.repeat(chosen, lengths)]
    return found
