"""Figures are what docs/metrics.md says, worked out by hand."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.metrics import (
    Accuracy,
    pair_metrics,
    read_accuracy,
    rollout_metrics,
    update_metrics,
    why_no_pairs,
    wilson_interval,
)
from orchestrator.types import FinishReason, UpdateResult
from tests.records import completion, pair, scored

Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_the_literature(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_where_the_score_test_turns(case):
    """Its ends are the proportions p that lie exactly z standard errors, computed at p, from what was seen."""
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / n - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / n), rel=1e-6)
    mirrored = wilson_interval(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_interval_knows_nothing_of_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


def test_rollouts():
    cut = completion(1, 2, 3, finish=FinishReason.LENGTH)
    groups = [
        scored(1.0, 1.0, 0.0, completions=[completion(1), completion(1, 2), cut]),  # comparisons: tie, -, -
        scored(0.5, 0.5, None, completions=[completion(1, 2), completion(1, 2), completion(1, 2)]),  # tie
    ]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "rollout/completions": 6,
            "rollout/tokens": 12,
            "rollout/length_mean": 2,
            "rollout/length_max": 3,
            "rollout/truncated_fraction": 1 / 6,
            "rollout/abstained_fraction": 1 / 6,
            "rollout/all_same_fraction": 1 / 2,
            "rollout/score_mean": 3.0 / 5,
            "rollout/tie_fraction": 2 / 4,
        }
    )


def test_rollouts_without_a_single_score_have_no_mean():
    found = rollout_metrics([scored(None, None)])
    assert found["rollout/abstained_fraction"] == 1
    assert found["rollout/all_same_fraction"] == 1
    assert not {"rollout/score_mean", "rollout/tie_fraction"} & found.keys()
    assert rollout_metrics([]) == {}


def test_pairs():
    kept = [pair(completion(1), completion(2, 3)), pair(completion(1, 2, 3), completion(4), chosen_score=0.5)]
    found = pair_metrics(kept, Counter(pairs=3, ties=4, abstentions=5, undecided=2), Counter(identical=1))
    assert found == {
        "pairs/made": 3,
        "pairs/kept": 2,
        "pairs/ties": 4,
        "pairs/abstentions": 5,
        "pairs/undecided": 2,
        "pairs/dropped_identical": 1,
        "pairs/margin_mean": 0.75,
        "pairs/length_chosen_mean": 2,
        "pairs/length_rejected_mean": 1.5,
    }


def test_why_there_are_no_pairs():
    found = pair_metrics([], Counter(pairs=1, ties=4, undecided=0), Counter(too_long=1))
    assert why_no_pairs(dict(found)) == "4 ties, 1 dropped too long"
    assert why_no_pairs(dict(pair_metrics([], Counter(), Counter()))) == "no scores"


def test_updates_are_weighted_by_pairs():
    first = UpdateResult(
        batch=0,
        step=1,
        pair_ids=("a", "b", "c"),
        tokens=30,
        metrics={"loss": 1.0, "lr": 0.1, "staleness_max": 3.0, "staleness_mean": 1.0},
    )
    second = UpdateResult(
        batch=0,
        step=2,
        pair_ids=("d",),
        tokens=10,
        metrics={"loss": 5.0, "lr": 0.2, "staleness_max": 1.0, "staleness_mean": 0.0, "extra": 8.0},
    )
    assert update_metrics([first, second]) == {
        "train/steps": 2,
        "train/pairs": 4,
        "train/tokens": 40,
        "train/loss": 2.0,
        "train/lr": 0.2,
        "train/staleness_max": 3.0,
        "train/staleness_mean": 0.75,
        "train/extra": 8.0,
    }
    assert update_metrics([]) == {}


def test_accuracy_is_read_back():
    metrics = {"eval/greedy_value": 0.5, "eval/greedy_low": 0.4, "eval/greedy_high": 0.6, "eval/greedy_n": 96.0}
    assert read_accuracy(metrics, "greedy") == Accuracy(value=0.5, low=0.4, high=0.6, n=96)
    assert read_accuracy(metrics, "sampled") is None


def test_every_metric_made_here_is_documented():
    documented = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`([a-z_]+/[a-z_<>]+)`", documented))
    groups = [scored(1.0, 0.0)]
    result = UpdateResult(step=1, batch=0, pair_ids=("a",), tokens=1, metrics={})
    made = update_metrics([result]) | dict(rollout_metrics(groups))
    made |= pair_metrics([pair(completion(1), completion(2))], Counter(), Counter())
    assert made.keys() <= named
