"""Pairs follow from scores alone: not from order, not from silence, not from ties."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.objectives import takes_sides
from conf.schema import LossConfig, PairingConfig
from orchestrator.errors import DataError
from orchestrator.pairing import make_pairs
from tests.records import PROMPT, V0, completion, scored

# Few distinct values, so that ties are common; None abstains.
SCORES = st.lists(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8)
CONFIGS = st.builds(
    PairingConfig,
    policy=st.sampled_from(["best_worst", "all", "length_controlled", "best_random"]),
    length_control=st.sampled_from([0.0, 0.1, 0.25, 0.4]),
    max_pairs=st.integers(1, 6),
    min_margin=st.sampled_from([0.0, 0.25]),
)


def compared(values, **config):
    pairs, counts = make_pairs(scored(*values), PairingConfig(**config), reference=V0)
    return [(p.chosen_score, p.rejected_score) for p in pairs], counts


def test_best_worst_goes_inwards():
    made, counts = compared([0.2, 0.9, None, 0.5, 0.1, 0.7], max_pairs=9)
    assert made == [(0.9, 0.1), (0.7, 0.2)]
    assert counts.as_dict() == {"pairs": 2, "ties": 0, "abstentions": 1, "undecided": 0}


TABLE = ((0.5, 0.75, None, 0.9), (0.25, 0.5, 0.5, 0.9), (None, 0.5, 0.5, 0.4), (0.1, 0.1, 0.6, 0.5))
COMPARED = replace(scored(0.9, 0.6, 0.4, 0.2), preferences=TABLE)


def labels_of(**loss):
    """(chosen, rejected): label of the pairs of `COMPARED` under a loss, and the other counts."""
    config = PairingConfig(policy="all", max_pairs=9)
    pairs, counts = make_pairs(COMPARED, config, reference=V0, takes_sides=takes_sides(LossConfig(**loss)))
    found = {tuple(map(int, pair.id.rpartition("/")[2].split(">"))): pair.label for pair in pairs}
    assert len(found) == counts.pairs
    return found, (counts.ties, counts.undecided)


@pytest.mark.parametrize(
    "loss", [{"labels": "soft"}, *({"name": name} for name in ("sppo", "gpo", "rebel", "irepo", "p3o", "nca", "pro"))]
)
def test_a_scorer_that_compares_labels_the_pair_or_leaves_it_unsaid(loss):
    found, counts = labels_of(**loss)
    assert found == {(0, 1): 0.75, (0, 3): 0.9, (1, 2): 0.5, (1, 3): 0.9, (2, 3): 0.4}
    assert counts == (0, 1)


@pytest.mark.parametrize("labels", ["hard", "robust", "posterior", "denoised"])
@pytest.mark.parametrize("name", ["dpo", "simpo", "sppo_hard", "kto", "trpa"])
def test_a_loss_that_takes_sides_gets_no_pair_that_the_scorer_itself_does_not_prefer(name, labels):
    """Mean scores put 1 over 2 and 2 over 3: compared directly, the first are a tie and the second the other way."""
    found, counts = labels_of(name=name, labels=labels)
    assert found == {(0, 1): 0.75, (0, 3): 0.9, (1, 3): 0.9}
    assert counts == (1, 2)


def test_all_takes_the_widest_margins_first():
    made, _ = compared([0.0, 0.3, 1.0], policy="all", max_pairs=2)
    assert made == [(1.0, 0.0), (1.0, 0.3)]


def test_the_best_meets_a_random_lower_one():
    def rejected(*scores):
        groups = [scored(*scores, seed=seed) for seed in range(200)]
        pairs = [
            pair for group in groups for pair in make_pairs(group, PairingConfig(policy="best_random"), reference=V0)[0]
        ]
        return Counter(pair.rejected_score for pair in pairs if pair.chosen_score == max(scores))

    assert all(40 < count < 95 for count in rejected(0.9, 0.9, 0.1, 0.3, 0.5).values())
    assert rejected(0.5, 0.5) == {}, "a tie"


def of_lengths(*scored_lengths, seed=7):
    """A group with these (score, tokens)."""
    completions = tuple(completion(*[10 + k] * length) for k, (_, length) in enumerate(scored_lengths))
    return scored(*(score for score, _ in scored_lengths), completions=completions, seed=seed)


@pytest.mark.parametrize(
    ("rho", "chosen", "rejected"),
    [
        (0.0, (10, 6), (0, 2)),
        (0.1, (9, 3), (0, 2)),  # from 9 up, to 1 down: 9 itself is near-best
        (0.2, (9, 3), (2, 7)),
        (0.4, (6, 1), (4, 9)),
    ],
)
def test_length_control_takes_the_shortest_good_and_the_longest_bad(rho, chosen, rejected):
    """Meta-Rewarding: chosen among scores >= (1-rho) max + rho min, rejected among those <= (1-rho) min + rho max."""
    group = of_lengths((10, 6), (2, 7), (9, 3), (5, 99), (6, 1), (None, 50), (0, 2), (4, 9))
    config = PairingConfig(policy="length_controlled", length_control=rho)
    ((made,), _) = make_pairs(group, config, reference=V0)
    assert (made.chosen_score, len(made.chosen.token_ids)) == chosen
    assert (made.rejected_score, len(made.rejected.token_ids)) == rejected


def test_length_control_prefers_the_more_extreme_of_equally_long_ones():
    group = of_lengths((10, 3), (9, 3), (1, 3), (0, 3))
    ((made,), _) = make_pairs(group, PairingConfig(policy="length_controlled", length_control=0.2), reference=V0)
    assert (made.chosen_score, made.rejected_score) == (10, 0)


def test_length_alone_makes_no_preference():
    for group in (of_lengths((1, 3), (1, 9)), of_lengths((1, 3), (None, 9)), of_lengths((None, 3), (None, 9))):
        assert make_pairs(group, PairingConfig(policy="length_controlled"), reference=V0)[0] == []


def test_ties_are_counted_and_never_paired():
    made, counts = compared([1.0, 1.0, 1.0], policy="all", max_pairs=9)
    assert (made, counts.ties) == ([], 3)
    made, counts = compared([1.0, 1.0, 0.0, 1.0], max_pairs=2)
    assert (made, counts.ties) == ([(1.0, 0.0)], 1)


def test_a_margin_equal_up_to_rounding_is_a_tie():
    assert 0.1 + 0.2 != 0.3
    assert compared([0.1 + 0.2, 0.3])[0] == []
    assert compared([0.4, 0.3], min_margin=0.1)[0] == []  # 0.4 - 0.3 > 0.1 in binary
    assert compared([0.41, 0.3], min_margin=0.1)[0] == [(0.41, 0.3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match=r"completion 1 of prompt 'task/train/17'.*return None to abstain"):
        compared([0.0, value])


def test_pairs_say_where_they_come_from():
    (made,), _ = make_pairs(scored(0.0, None, 1.0), PairingConfig(), reference=V0)
    assert made.id == "1/task/train/17/2>0"
    assert (made.prompt, made.reference, made.scorer, made.iteration) == (PROMPT, V0, "verifier:test@1", 1)
    assert (made.chosen, made.rejected) == (completion(12), completion(10))


def test_equal_scores_are_not_decided_by_position():
    chosen = {
        make_pairs(scored(1.0, 1.0, 1.0, 0.0, seed=seed), PairingConfig(), reference=V0)[0][0].chosen.token_ids
        for seed in range(50)
    }
    assert chosen == {(10,), (11,), (12,)}


@given(SCORES, CONFIGS, st.integers(0, 2**31 - 1), st.randoms())
def test_the_order_of_completions_does_not_matter(values, config, seed, rng):
    shuffled = list(enumerate(values))
    rng.shuffle(shuffled)
    completions = [completion(10 + k) for k, _ in shuffled]
    moved = scored(*(v for _, v in shuffled), completions=completions, seed=seed)
    pairs, counts = make_pairs(scored(*values, seed=seed), config, reference=V0)
    moved_pairs, moved_counts = make_pairs(moved, config, reference=V0)
    preferred = [(p.chosen.token_ids, p.rejected.token_ids) for p in pairs]
    moved_preferred = [(p.chosen.token_ids, p.rejected.token_ids) for p in moved_pairs]
    assert preferred == moved_preferred
    assert counts == moved_counts


@given(SCORES, CONFIGS)
def test_every_pair_is_a_judgement_that_was_made(values, config):
    pairs, counts = make_pairs(scored(*values), config, reference=V0)
    assert len(pairs) == counts.pairs <= config.max_pairs
    assert counts.abstentions == values.count(None)
    assert len({p.id for p in pairs}) == len(pairs)
    for p in pairs:
        best, worst = (int(index) for index in p.id.rpartition("/")[2].split(">"))
        assert (p.chosen.token_ids, p.rejected.token_ids) == ((10 + best,), (10 + worst,))
        assert (p.chosen_score, p.rejected_score) == (values[best], values[worst])
        assert p.margin > config.min_margin
    assert [p.margin for p in pairs] == sorted((p.margin for p in pairs), reverse=True)
    given_scores = [v for v in values if v is not None]
    if config.policy == "length_controlled" and config.length_control:
        return
    if given_scores and max(given_scores) - min(given_scores) > config.min_margin:
        assert (pairs[0].chosen_score, pairs[0].rejected_score) == (max(given_scores), min(given_scores))


def test_no_label_from_coin_tosses():
    """Over many groups of equally good completions in random order, nothing is ever preferred."""
    rng = random.Random(0)
    for _ in range(100):
        value = rng.random()
        assert compared([value] * rng.randint(1, 8), policy="all", max_pairs=99)[0] == []
