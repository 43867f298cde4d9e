"""The gate: figures of a comparison worked out by hand, and each alarm at its border."""

import pytest

from conf.schema import PromotionConfig
from orchestrator.promotion import alarms, comparison_figures
from orchestrator.types import Prompt
from tests.records import completion, scored


def answers(**by_prompt):
    """One answer a prompt: its score and its length in tokens."""
    return [
        scored(
            value,
            completions=[completion(*range(length))],
            prompt=Prompt(id=name, text=name, token_ids=(1,)),
        )
        for name, (value, length) in by_prompt.items()
    ]


def test_a_comparison_by_hand():
    """Of a..d: won, tied, lost, tied: 2 wins of 4. e, f are not shared; g was not scored before and wins, h not now
    and loses, i never and does not count: 3 wins of 6.

    Wilson at n = 6, p = 1/2, z = 1.959964: 1/2 -+ z sqrt(p (1 - p) / n + z^2 / (4 n^2)) / (1 + z^2 / n)
    = 1/2 -+ 1.959964 sqrt(0.0416667 + 0.0266768) / 1.640243 = 1/2 -+ 0.3123837.
    """
    greedy = answers(a=(1, 1), b=(1, 1), c=(0, 1), d=(0, 1), e=(1, 1), g=(1, 1), h=(None, 1), i=(None, 1))
    before = answers(a=(0, 1), b=(1, 1), c=(1, 1), d=(0, 1), f=(1, 1), g=(None, 1), h=(1, 1), i=(None, 1))
    now = answers(a=(0, 6), b=(None, 3), e=(0, 90))
    earlier = answers(b=(0, 2), a=(0, 4), f=(0, 90))
    found = comparison_figures(greedy, now, before, earlier)
    assert found["eval/win_rate"] == 0.5
    assert found["eval/win_rate_low"] == pytest.approx(0.187616, abs=1e-6)
    assert found["eval/win_rate_high"] == pytest.approx(0.812384, abs=1e-6)
    assert found["eval/length_ratio"] == pytest.approx(9 / 6)


def test_nothing_shared_is_nothing_to_compare():
    a, b, silent = answers(a=(1, 2)), answers(b=(1, 2)), answers(a=(None, 2))
    assert comparison_figures(a, a, b, b) == {}
    assert comparison_figures(a, a, a, b) == {}, "no lengths"
    assert comparison_figures(silent, a, silent, a) == {}, "no verdicts"
    assert comparison_figures(a, a, a, a)["eval/win_rate"] == 0.5


def test_answers_that_were_empty_make_no_division_by_zero():
    greedy = answers(a=(1, 1))
    assert comparison_figures(greedy, answers(a=(1, 3)), greedy, answers(a=(1, 0)))["eval/length_ratio"] == 3


CONFIG = PromotionConfig(min_win_rate=0.4, max_length_ratio=1.5, max_judge_drop=0.25)
BEFORE = [{"judge/accuracy": 0.75}, {}, {"judge/accuracy": 0.5}]


def won(high):
    return {"eval/win_rate": high - 0.1, "eval/win_rate_low": high - 0.2, "eval/win_rate_high": high}


@pytest.mark.parametrize(
    ("within", "beyond", "said"),
    [
        (won(0.4), won(0.399), "win 29.9% [19.9%, 39.9%] over those of the policy before (promotion.min_win_rate=0.4)"),
        (
            {"eval/length_ratio": 1.5},
            {"eval/length_ratio": 1.501},
            "1.50 times as long as those of the policy before (promotion.max_length_ratio=1.5)",
        ),
        (
            {"judge/accuracy": 0.5},
            {"judge/accuracy": 0.499},
            "49.9% of the anchors right, 75.0% before; what it leaves open counts half (promotion.max_judge_drop=0.25)",
        ),
    ],
)
def test_each_alarm_at_its_border(within, beyond, said):
    assert alarms(CONFIG, within, BEFORE) == []
    (text,) = alarms(CONFIG, beyond, BEFORE)
    assert said in text


def test_every_alarm_is_told_and_what_was_not_measured_alarms_nobody():
    assert len(alarms(CONFIG, won(0.3) | {"eval/length_ratio": 9.0, "judge/accuracy": 0.1}, BEFORE)) == 3
    assert alarms(CONFIG, {}, BEFORE) == []
    assert alarms(CONFIG, {"judge/accuracy": 0.0}, [{}]) == [], "nothing to compare it with"


def test_a_policy_that_says_nothing_to_its_scorer_any_more_alarms():
    names = [f"p{number}" for number in range(64)]
    before, length = answers(**dict.fromkeys(names, (1, 5))), answers(**dict.fromkeys(names, (0, 5)))
    silent = answers(**dict.fromkeys(names, (None, 5)))
    (text,) = alarms(CONFIG, comparison_figures(silent, length, before, length), [])
    assert "its answers win 0.0%" in text


def test_a_judge_that_falls_silent_alarms():
    """Right in .75 before. Mute it is no better than a coin, .5; with one of eight answered and right, 9/16."""
    config = PromotionConfig(max_judge_drop=0.1)
    for figures in ({"judge/answered": 0.0}, {"judge/answered": 0.125, "judge/accuracy": 1.0}):
        (text,) = alarms(config, figures, BEFORE)
        assert "what it leaves open" in text
    assert alarms(config, {"judge/answered": 0.5, "judge/accuracy": 1.0}, BEFORE) == []
