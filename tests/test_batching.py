"""Packing loses nothing, shares what can be shared, and splits along prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.batching import batches, pack, pack_sequences, split
from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferenceBatch, PreferencePair, Prompt
from tests import records

REFERENCE = PolicyVersion(number=0, digest="0" * 16)


def completion(token_ids, version=0):
    return Completion(
        token_ids=tuple(token_ids),
        text="",
        logprobs=(-1.0,) * len(token_ids),
        finish_reason=FinishReason.EOS,
        policy=PolicyVersion(number=version, digest=f"{version:016x}"),
    )


@st.composite
def pair_lists(draw):
    """Pairs of a few prompts whose completions are drawn from a small pool, so that sharing happens."""
    tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6)
    pairs = []
    for number in range(draw(st.integers(1, 5))):
        prompt = Prompt(id=str(number), text="", token_ids=(number, *draw(tokens)))
        pool = draw(st.lists(tokens, min_size=2, max_size=4))
        for index in range(draw(st.integers(1, 4))):
            chosen, rejected = (completion(draw(st.sampled_from(pool)), draw(st.integers(0, 3))) for _ in range(2))
            pairs.append(
                PreferencePair(
                    id=f"1/{number}/{index}",
                    prompt=prompt,
                    chosen=chosen,
                    rejected=rejected,
                    chosen_score=draw(st.sampled_from([0.5, 1.0])),
                    rejected_score=0.0,
                    iteration=1,
                    reference=REFERENCE,
                    scorer="test@1",
                    label=draw(st.sampled_from([0.75, 1.0])),
                    weight=draw(st.sampled_from([0.25, 1.0])),
                )
            )
    return draw(st.permutations(pairs))


def unpacked(batch: PreferenceBatch):
    """What a batch says of each pair, read through its columns."""
    ends = np.cumsum(batch.completion_lengths)
    facts = {}
    for index, name in enumerate(batch.pair_ids):
        sides = []
        for number in (batch.chosen[index], batch.rejected[index]):
            group, start = batch.completion_groups[number], batch.completion_starts[number]
            prompt = batch.prompt_starts[group]
            reference = batch.reference_logprobs
            sides.append(
                (
                    tuple(batch.tokens[prompt : prompt + batch.prompt_lengths[group]].tolist()),
                    tuple(batch.tokens[start : start + batch.completion_lengths[number]].tolist()),
                    reference is not None
                    and tuple(reference[ends[number] - batch.completion_lengths[number] : ends[number]].tolist()),
                )
            )
        facts[name] = (
            *sides,
            batch.weights[index],
            batch.chosen_scores[index],
            batch.rejected_scores[index],
            batch.labels[index],
            batch.data_versions[index],
            batch.sampled_logprobs is not None and tuple(batch.sampled_logprobs[index]),
        )
    return facts


def annotated(batch: PreferenceBatch) -> PreferenceBatch:
    return replace(batch, reference_logprobs=np.arange(batch.num_completion_tokens, dtype=np.float32))


@given(pair_lists())
def test_pack_keeps_every_pair_and_stores_each_sequence_once(pairs):
    batch = pack(pairs)
    facts = unpacked(batch)
    assert list(batch.pair_ids) == [pair.id for pair in pairs]
    for pair in pairs:
        chosen, rejected, *numbers, version, _ = facts[pair.id]
        assert chosen[:2] == (pair.prompt.token_ids, pair.chosen.token_ids)
        assert rejected[:2] == (pair.prompt.token_ids, pair.rejected.token_ids)
        assert numbers == [pair.weight, pair.chosen_score, pair.rejected_score, pair.label]
        assert version == min(pair.chosen.policy.number, pair.rejected.policy.number)
    prompts = {pair.prompt.token_ids for pair in pairs}
    sides = {(pair.prompt.token_ids, side.token_ids) for pair in pairs for side in (pair.chosen, pair.rejected)}
    assert (len(batch.prompt_starts), len(batch.completion_starts)) == (len(prompts), len(sides))
    assert batch.num_tokens == sum(map(len, prompts)) + sum(len(side) for _, side in sides)
    assert (np.diff(batch.completion_groups) >= 0).all()


@given(pair_lists(), st.data())
def test_log_probs_as_sampled_are_the_reference_where_it_sampled_everything(pairs, data):
    def noted(side):
        return replace(side, logprobs=tuple(data.draw(st.sampled_from([-0.5, -1.5, -2.5])) for _ in side.token_ids))

    pairs = [replace(pair, chosen=noted(pair.chosen), rejected=noted(pair.rejected)) for pair in pairs]
    assert pack(pairs).reference_logprobs is None
    batch = pack(pairs, sampled_reference=True)
    if any(side.policy != REFERENCE for pair in pairs for side in (pair.chosen, pair.rejected)):
        assert batch.reference_logprobs is None
        return
    known = {}
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            known.setdefault((pair.prompt.token_ids, side.token_ids), set()).add(side.logprobs)
    for prompt, tokens, logprobs in (side for facts in unpacked(batch).values() for side in facts[:2]):
        assert logprobs in known[prompt, tokens]
    assert pack(pairs, sampled_reference=True, include_prompt=True).reference_logprobs is None
    mismatched = pack(pairs, sampled_reference=True, mismatched=True)
    assert (mismatched.reference_logprobs is None) == (len(mismatched.mismatched) > 0)


@given(pair_lists(), st.booleans())
def test_stale_pairs_bring_along_what_they_were_sampled_with(pairs, mismatched):
    """Each its own, also where two of a prompt drew the same tokens from other weights."""

    def noted(side, start):
        return replace(side, logprobs=tuple(-start - place for place in range(len(side.token_ids))))

    pairs = [
        replace(pair, chosen=noted(pair.chosen, 2 * index), rejected=noted(pair.rejected, 2 * index + 1))
        for index, pair in enumerate(pairs)
    ]
    batch = pack(pairs, stale=True, mismatched=mismatched)
    for pair, sampled in zip(pairs, batch.sampled_logprobs, strict=True):
        assert tuple(sampled) == (sum(pair.chosen.logprobs), sum(pair.rejected.logprobs))
    assert pack(pairs).sampled_logprobs is None
    with pytest.raises(ValueError, match="1 log-probs of 2 tokens"):
        pack([replace(pairs[0], chosen=replace(pairs[0].chosen, token_ids=(7, 8), logprobs=(-1.0,)))], stale=True)


def test_a_pair_whose_reference_is_not_known_yet_cannot_be_packed():
    with pytest.raises(ValueError, match="has no reference yet"):
        pack([replace(records.pair(records.completion(5), records.completion(6)), reference=None)])


@given(pair_lists(), st.integers(1, 60), st.booleans())
def test_split_loses_no_pair_and_respects_the_bound(pairs, max_tokens, stale):
    batch = annotated(pack(pairs, stale=stale))
    parts = split(batch, max_tokens)
    together = {}
    for part in parts:
        assert part.num_tokens <= max_tokens or len(part.prompt_starts) == 1
        assert part.num_pairs > 0
        assert len(part.reference_logprobs) == part.num_completion_tokens
        together |= unpacked(part)
    assert together == unpacked(batch)
    assert sum(part.num_pairs for part in parts) == batch.num_pairs
    assert sum(part.num_tokens for part in parts) == batch.num_tokens


@given(pair_lists(), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=50)
def test_batches_are_a_deterministic_permutation_with_prompts_together(pairs, batch_pairs, seed, epoch):
    made = batches(pairs, batch_pairs=batch_pairs, seed=seed, epoch=epoch)
    assert made == batches(pairs, batch_pairs=batch_pairs, seed=seed, epoch=epoch)
    flat = [pair for batch in made for pair in batch]
    assert sorted(pair.id for pair in flat) == sorted(pair.id for pair in pairs)
    assert all(len(batch) == batch_pairs for batch in made[:-1])
    changes = sum(left.prompt.id != right.prompt.id for left, right in pairwise(flat))
    assert changes == len({pair.prompt.id for pair in pairs}) - 1


def test_epochs_and_seeds_shuffle_differently(numbered_pairs):
    orders = {
        tuple(pair.id for batch in batches(numbered_pairs, batch_pairs=4, seed=seed, epoch=epoch) for pair in batch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.fixture
def numbered_pairs():
    return [
        PreferencePair(
            id=f"1/{number}/0",
            prompt=Prompt(id=str(number), text="", token_ids=(number,)),
            chosen=completion([1]),
            rejected=completion([2]),
            chosen_score=1.0,
            rejected_score=0.0,
            iteration=1,
            reference=REFERENCE,
            scorer="test@1",
        )
        for number in range(12)
    ]


def test_pack_refuses_what_does_not_belong_together(numbered_pairs):
    first, second, *_ = numbered_pairs
    with pytest.raises(ValueError, match="no pairs"):
        pack([])
    with pytest.raises(ValueError, match="must share iteration and reference"):
        pack([first, replace(second, iteration=2)])
    with pytest.raises(ValueError, match="must share iteration and reference"):
        pack([first, replace(second, reference=PolicyVersion(number=1, digest="1" * 16))])
    with pytest.raises(ValueError, match="empty completion"):
        pack([replace(first, chosen=completion([]))])


def test_pack_sequences_finds_each_again():
    sequences = [((1, 2), (3,)), ((4,), (5, 6)), ((1, 2), (7, 8)), ((1, 2), (3,))]
    columns, index = pack_sequences(sequences)
    assert columns.tokens.tolist() == [1, 2, 3, 7, 8, 4, 5, 6]
    assert index.tolist() == [0, 2, 1, 0]
