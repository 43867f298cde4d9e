"""Judges that need no words, and how far any judge can be trusted. Expected numbers are worked out by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.judges.comparisons import fill_table, mean_wins, opinions
from actors.judges.consistency import consistency, kendall_tau
from actors.judges.ensemble import Ensemble, build_ensemble
from actors.judges.implicit import build_implicit
from actors.judges.llm_judge import build_llm_judge
from actors.judges.majority import build_majority
from actors.judges.reliability import (
    Reliability,
    calibration_error,
    group_figures,
    observed_agreement,
    truth_figures,
)
from conf.schema import JudgeConfig, ScorerConfig
from orchestrator.blame import Poisoned
from orchestrator.errors import ConfigError, JudgeError
from orchestrator.scoring import PooledJudge
from orchestrator.tally import Tally
from orchestrator.types import FinishReason, Score, ScoredGroup
from tests.judges import ScriptedModel, group_of


def values(scored):
    return [score.value for score in scored.scores]


def scores_of(group, *numbers, preferences=None):
    scores = tuple(Score(value=number, reason="" if number is not None else "silent") for number in numbers)
    return ScoredGroup(group=group, scores=scores, scorer="test@1", preferences=preferences)


class Fixed:
    """Says of the groups what it was given."""

    def __init__(self, name, *scored):
        self.name, self.scored = name, list(scored)

    def score(self, groups):
        return [replace(scored, group=group) for scored, group in zip(self.scored, groups, strict=True)]

    def metrics(self):
        found = Tally()
        found.mean("judge/tie_fraction", [0.25])
        return found


# -- tables of comparisons --


def test_win_rates_leave_out_what_was_not_decided():
    table = fill_table(4, {(0, 1): 0.9, (0, 2): None, (1, 2): 0.3})
    assert table[1] == (pytest.approx(0.1), 0.5, 0.3, None)
    assert [table[i][i] for i in range(4)] == [0.5] * 4
    scores = mean_wins(table, "nobody knows")
    assert [s.value for s in scores] == [0.9, pytest.approx((0.1 + 0.3) / 2), 0.7, None]
    assert scores[3].reason == "nobody knows"


@given(st.lists(st.none() | st.floats(0, 1), min_size=6, max_size=6))
def test_a_table_says_the_same_from_both_sides(firsts):
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    table = fill_table(4, dict(zip(pairs, firsts, strict=True)))
    for i in range(4):
        for j in range(4):
            assert (table[i][j] is None) == (table[j][i] is None)
            assert table[i][j] is None or table[i][j] + table[j][i] == pytest.approx(1)


# -- majority --


def test_the_common_answer_wins():
    judge = build_majority(ScorerConfig(verifier="final_answer", marker="#"))
    group = group_of("a #7", "b # 7 ", "c #8", "none", "#7#9", "#")
    (scored,) = judge.score([group])
    assert values(scored) == [2 / 6, 2 / 6, 1 / 6, None, 1 / 6, None]
    assert scored.scores[3].reason == "it has no final answer"
    assert judge.metrics()["judge/abstained_fraction"] == pytest.approx(2 / 6)


def test_a_completion_that_was_cut_off_has_no_final_answer():
    judge = build_majority(ScorerConfig(verifier="exact"))
    cut = group_of("7", "7", finish=FinishReason.LENGTH)
    assert [values(scored) for scored in judge.score([group_of("7 ", "7"), cut])] == [[1.0, 1.0], [None, None]]


def test_the_vote_needs_no_reference_answer_and_sees_none():
    judge = build_majority(ScorerConfig(verifier="exact"))
    group = group_of("7", "7", "8")
    told = replace(group, prompt=replace(group.prompt, answer="8"))
    assert values(judge.score([group])[0]) == values(judge.score([told])[0]) == [2 / 3, 2 / 3, 1 / 3]


def test_mathematically_equal_answers_are_one():
    judge = build_majority(ScorerConfig(verifier="math"))
    group = group_of(r"so $\frac{1}{2}$", "it is 0.5", r"$\boxed{\frac{2}{4}}$", "The answer is 3", "who knows")
    assert values(judge.score([group])[0]) == [3 / 5, 3 / 5, 3 / 5, 1 / 5, None]


def test_a_vote_needs_answers():
    with pytest.raises(ConfigError, match=r"scorer\.verifier=function: gives scorer\.kind=majority no final answer"):
        build_majority(ScorerConfig(verifier="function"))


# -- implicit --


class Weights(ScriptedModel):
    """Every token has the same log-prob."""

    def __init__(self, logprob, version):
        super().__init__()
        self.logprob, self.version = logprob, version

    def logprobs(self, sequences):
        self.sequences += sequences
        return [np.full(len(completion), self.logprob, dtype=np.float32) for _, completion in sequences]


def test_the_implicit_reward_is_the_log_ratio():
    policy, initial = Weights(-0.5, "v1"), Weights(-1.25, "v0")
    group = group_of("ab", "abcd", "")
    (summed,) = build_implicit(JudgeConfig(), policy, initial, Before(), beta=0.1).score([group])
    assert values(summed) == [pytest.approx(0.1 * 2 * 0.75), pytest.approx(0.1 * 4 * 0.75), None]
    assert policy.sequences == [(group.prompt.token_ids, c.token_ids) for c in group.completions[:2]]
    (mean,) = build_implicit(JudgeConfig(length_normalized=True), policy, initial, Before(), beta=0.1).score([group])
    assert values(mean) == [pytest.approx(0.075), pytest.approx(0.075), None]
    assert summed.scorer != mean.scorer
    assert "v1/v0" in summed.scorer


def test_what_nobody_can_read_is_abstained_on():
    policy, initial = Weights(math.nan, "v1"), Weights(-1.25, "v0")
    (scored,) = build_implicit(JudgeConfig(), policy, initial, Before(), beta=0.1).score([group_of("ab")])
    assert scored.scores == (Score(value=None, reason="it kills whoever computes its log-probs"),)


def test_a_policy_that_has_not_changed_rewards_nothing():
    same = Weights(-0.5, "v0")
    judge = build_implicit(JudgeConfig(), same, same, Before(), beta=0.1)
    assert values(judge.score([group_of("ab", "abcd")])[0]) == [0.0, 0.0]


class Named(Weights):
    """The log-prob of a completion's tokens is told by the text; 0 for those it was not told of."""

    def __init__(self, **by_text):
        super().__init__(0.0, "v")
        self.by_text = by_text

    def logprobs(self, sequences):
        return [
            np.full(len(text), self.by_text.get("".join(map(chr, text)), 0.0), dtype=np.float32)
            for _, text in sequences
        ]


class Before(Named):
    """A policy before the present one; without a word, that there was none."""

    def logprobs(self, sequences):
        return super().logprobs(sequences) if self.by_text else None


def test_consistency_of_rankings():
    """Of six comparisons one is turned, one is a tie on one side: tau = (4 - 1) / 6."""
    assert kendall_tau([4, 3, 2, 1], [4, 2, 3, 2]) == pytest.approx((4 - 1) / 6)
    assert kendall_tau([1, 2], [2, 1]) == -1
    assert consistency(0.4) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize(("which", "labels"), [("prompt", (2 / 3, 1.0)), ("mean", (5 / 6, 5 / 6))])
def test_labels_of_cream_are_how_far_two_policies_rank_alike(which, labels):
    """First prompt: c > b > a now, b > c > a before, so tau = 1/3. Second: the same order."""
    now, before = Named(aa=1, bb=2, cc=3, x=1, y=2), Before(aa=1, bb=3, cc=2, x=1, y=2)
    groups = [group_of("aa", "bb", "cc", ""), group_of("x", "y", prompt="Else?")]
    judge = build_implicit(JudgeConfig(consistency=which), now, Named(), before, beta=0.1)
    first, second = judge.score(groups)
    assert values(first) == [pytest.approx(0.1 * 2 * value) for value in (1, 2, 3)] + [None]
    assert first.preferences[2][0] == first.preferences[2][1] == pytest.approx(labels[0])
    assert first.preferences[0][2] == pytest.approx(1 - labels[0])
    assert first.preferences[3][0] is None
    assert second.preferences[1][0] == pytest.approx(labels[1])
    assert judge.metrics()["judge/consistency"] == pytest.approx((2 / 3 + 1) / 2)


def test_without_a_policy_before_the_initial_one_ranks_by_its_mean_logprob():
    """b is likelier to the initial model, of which the policy thinks more of a."""
    judge = build_implicit(JudgeConfig(consistency="prompt"), Named(), Named(aa=-2, bb=-1), Before(), beta=0.1)
    (scored,) = judge.score([group_of("aa", "bb")])
    assert values(scored) == [pytest.approx(0.4), pytest.approx(0.2)]
    assert scored.preferences[0][1] == 0.0


# -- ensembles --


def test_an_ensemble_speaks_where_its_members_agree():
    group = group_of("a", "bb", "ccc")
    by_points = Fixed("points", scores_of(group, 5.0, 1.0, 1.0))
    by_reward = Fixed("reward", scores_of(group, 0.02, 0.01, None))
    by_table = Fixed("table", scores_of(group, 0, 0, 0, preferences=fill_table(3, {(0, 1): 0.8, (0, 2): 0.4})))
    judge = Ensemble({"a": by_points, "b": by_reward, "c": by_table}, min_agreement=0.6)
    (scored,) = judge.score([group])
    # 0 over 1: 1, 1, 0.8. 0 over 2: 1, -, 0.4 on two sides. 1 over 2: a tie, -, -.
    assert scored.preferences[0][1] == pytest.approx(2.8 / 3)
    assert scored.preferences[0][2] is None
    assert scored.preferences[1][2] is None
    assert values(scored) == [pytest.approx(2.8 / 3), pytest.approx(0.2 / 3), None]
    found = judge.metrics()
    assert found["judge/ensemble_agreement"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found["judge/b_tie_fraction"] == 0.25
    assert scored.scorer == "ensemble(points, reward, table)@1"


def test_two_members_that_contradict_each_other_say_nothing():
    group = group_of("a", "bb")
    for other, expected in (((0.0, 1.0), None), ((2.0, 2.0), None), ((None, None), None), ((7.0, 3.0), 1.0)):
        members = {"a": Fixed("a", scores_of(group, 1.0, 0.0)), "b": Fixed("b", scores_of(group, *other))}
        (scored,) = build_ensemble(JudgeConfig(), members).score([group])
        assert scored.preferences[0][1] == expected


def test_an_ensemble_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"judge\.members=\['a'\]: an ensemble needs at least two"):
        Ensemble({"a": Fixed("a")}, 0.6)


# -- reliability --


def test_agreement_of_votes_is_that_of_fleiss():
    """1971, table 1: subject 1 has 6 of 6 ratings in one category, subject 2 three and three."""
    assert observed_agreement([4, 4, 4, 4, 4, 4]) == 1.0
    assert observed_agreement([2, 2, 2, 5, 5, 5]) == pytest.approx((3 * 2 + 3 * 2) / (6 * 5))


def test_a_judge_that_likes_length_is_found_out():
    """Comparisons told apart by score and length alike: longer wins 2 of 3, so 2/3 - 1/3."""
    judge = build_llm_judge(JudgeConfig(votes=1), ScriptedModel(reply=lambda blocks, seed: POINTS[blocks[1]]), seed=0)
    judge.score([group_of("a", "bb", "ccc"), group_of("dd", "ee")])
    assert judge.metrics()["judge/length_bias"] == pytest.approx(1 / 3)


POINTS = {"a": "Score: 2", "bb": "Score: 1", "ccc": "Score: 3", "dd": "Score: 5", "ee": "Score: 1"}


def test_a_judge_is_measured_by_the_truth():
    groups = [group_of("a", "b", "c"), group_of("d", "e")]
    # 0.9 for 0 over 1 (true), 0.7 for 2 over 0 (false), 1 and 2 undecided; then a tie on what is no tie in truth.
    guess = [
        scores_of(groups[0], 0, 0, 0, preferences=fill_table(3, {(0, 1): 0.9, (0, 2): 0.3})),
        scores_of(groups[1], 4, 4),
    ]
    truth = [scores_of(groups[0], 1, 0, 0), scores_of(groups[1], 1, 0)]
    found = truth_figures(guess, truth)
    assert found["judge/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    # In bins of their own: |0.9 - 1| and |0.7 - 0|, half of the comparisons with a probability each.
    assert found["judge/calibration_error"] == pytest.approx((0.1 + 0.7) / 2)
    assert truth_figures(guess, [scores_of(groups[0], 1, 1, 1), scores_of(groups[1], None, 1)]) == {}
    mute = [scores_of(group, *[None] * len(group.completions)) for group in groups]
    assert truth_figures(mute, truth) == {"judge/answered": 0.0}


def test_a_judge_that_gives_no_probability_has_no_calibration():
    group = group_of("a", "b", "c")
    found = truth_figures([scores_of(group, 3, 1, 2)], [scores_of(group, 3, 2, 1)])
    assert found == {"judge/answered": 1.0, "judge/accuracy": pytest.approx(2 / 3)}


def test_the_best_win_rate_with_and_without_the_draw_with_itself():
    """0 beats 1 by .9 and was not compared with 2; 2 beats 1 by .7 and is best of the second group with .8."""
    first = fill_table(3, {(0, 1): 0.9, (0, 2): None, (1, 2): 0.3})
    second = fill_table(3, {(0, 1): 0.5, (0, 2): 0.3, (1, 2): 0.1})
    judged = [
        scores_of(group_of("a", "b", "c"), 0.9, 0.2, 0.7, preferences=first),
        scores_of(group_of("a", "b", "c"), 0.4, 0.3, 0.8, preferences=second),
        scores_of(group_of("a"), None, preferences=((0.5,),)),
    ]
    found = group_figures(judged)
    assert found["judge/best_win_rate_without_self"] == pytest.approx((0.9 + 0.8) / 2)
    assert found["judge/best_win_rate"] == pytest.approx(((0.9 + 0.5) / 2 + (0.7 + 0.9 + 0.5) / 3) / 2)
    assert "best_win_rate" not in group_figures([scores_of(group_of("a", "b"), 1, 0)])


def test_scorers_behind_actors_report_what_other_judges_do():
    scored = scores_of(group_of("a", "bb", "ccc"), 1, 2, None)

    class Pool:
        def map(self, call, work, **_):
            return [scored for _ in work]

    def metrics(reliability):
        judge = PooledJudge("reward_model", Pool(), deadline_s=1, reliability=reliability, quarantined={})
        assert judge.score([scored.group]) == [scored]
        return judge.metrics(), judge.metrics()

    figures = {"judge/abstained_fraction": pytest.approx(1 / 3), "judge/tie_fraction": 0, "judge/length_bias": 1}
    assert metrics(Reliability()) == (figures, {})
    assert metrics(None) == ({}, {})


def test_calls_that_all_hang_are_waited_for():
    """Of 5 completions on two scorers one has 3, which may take 10 s each."""
    groups, asked = [group_of("a", "b", "c"), group_of("d", "e")], []

    class Pool:
        living = ("one", "two")

        def map(self, call, work, *, deadline_s, **_):
            asked.append(deadline_s)
            return [scores_of(group, *range(len(group.completions))) for group in work]

    for call_s in (10.0, 0.0):
        judge = PooledJudge("verifier", Pool(), deadline_s=120, call_s=call_s, reliability=None, quarantined={})
        judge.score(groups)
    assert asked == [150, 120]


def test_groups_that_kill_their_scorers_are_abstained_on():
    groups = [group_of("a", "b"), group_of("c", "d")]
    fine = scores_of(groups[1], 1, 0)

    class Pool:
        def map(self, call, work, *, keys, **_):
            return [Poisoned(key=keys[0], deaths=3, last_words="out of memory"), fine]

    reliability, quarantined = Reliability(), {}
    judge = PooledJudge("reward_model", Pool(), deadline_s=1, reliability=reliability, quarantined=quarantined)
    silent, other = judge.score(groups)
    assert other == fine
    assert quarantined == {groups[0].prompt.id: "it killed 3 scorers: out of memory"}
    assert silent.group == groups[0]
    assert silent.scores == (Score(value=None, reason="it killed 3 scorers: out of memory"),) * 2
    assert reliability.report()["judge/abstained_fraction"] == 0.5


def silent_on(group, reason):
    return ScoredGroup(group=group, scores=(Score(value=None, reason=reason),) * len(group.completions), scorer="v")


def test_a_scorer_that_never_gives_a_score_stops_the_run_with_the_reason():
    """Poisoned and aborted ones are no word of the scorer's; a few, or one prompt, may be beyond it."""
    groups = [group_of(*texts, prompt=texts) for texts in ("abcdefgh", "ijklmnop", "qrstuvwxyz", "ab")]
    raised = "the function raised ValueError: no such thing"

    def score(*answers):
        class Pool:
            def map(self, call, work, **_):
                return list(answers)

        judge = PooledJudge("verifier", Pool(), deadline_s=1, reliability=None, quarantined={})
        return judge.score([groups[index] for index, _ in enumerate(answers)])

    dead = Poisoned(key=groups[0].prompt.id, deaths=3, last_words="out of memory")
    silent = [silent_on(group, raised) for group in groups]
    with pytest.raises(JudgeError, match=r"to any of 18 completions of 2 prompts\. 18 times: the function raised"):
        score(dead, *silent[1:3])
    with pytest.raises(JudgeError, match=r"16 completions of 2 prompts\. 16 times: .*no such thing\. Mend"):
        score(*silent[:2])
    with pytest.raises(JudgeError, match=r"26 completions of 3 prompts\. 16 times: it took longer"):
        score(*(silent_on(group, "it took longer than 10 s") for group in groups[:2]), silent[2])
    assert score(silent[0]) == silent[:1]
    assert score(dead, silent[1])[1] == silent[1]
    assert score(scores_of(groups[0], *[None] * 7, 0), *silent[1:])[1:] == silent[1:]
    groups = [*groups[2:], *groups[:2]]
    assert score(*silent[2:]) == silent[2:], "12 completions"


def test_calibration_error_is_zero_for_a_judge_as_sure_as_it_is_right():
    assert calibration_error([(0.75, 1.0)] * 3 + [(0.75, 0.0)]) == pytest.approx(0)
    assert calibration_error([(1.0, 1.0)] * 4) == 0
    assert calibration_error([(1.0, 1.0), (1.0, 0.0)]) == 0.5


def test_opinions_are_comparisons_or_the_order_of_scores():
    group = group_of("a", "b", "c")
    assert opinions(scores_of(group, 0.1 + 0.2, 0.3, None)) == {(0, 1): 0.5, (0, 2): None, (1, 2): None}
    assert opinions(scores_of(group, 1, 2, 0)) == {(0, 1): 0.0, (0, 2): 1.0, (1, 2): 1.0}


def test_a_judge_that_says_nothing_in_a_small_iteration_stops_the_run_at_its_report():
    def report(limit):
        model = ScriptedModel(reply=lambda blocks, seed: "I would rather not" if len(blocks[1]) > 1 else "Score: 5")
        judge = build_llm_judge(JudgeConfig(votes=1, max_failed_fraction=limit), model, seed=0)
        judge.score([group_of("a", "bb", "ccc", "dddd")])
        return judge.metrics()

    assert report(0.75)["judge/parse_failure_fraction"] == 0.75
    with pytest.raises(JudgeError) as caught:
        report(0.7)
    for part in ("llm_judge:", "3 of 4", "I would rather not", "judge.max_failed_fraction=0.7"):
        assert part in str(caught.value)


def wave(number):
    return group_of(*(f"{number} {letter}" for letter in "abcd"))


def test_a_small_wave_does_not_stop_a_run_whose_judge_answers_mostly():
    """Of each ten waves three are all garbage; the share is of the judgements since the last report."""

    def reply(blocks, seed):
        return "hm" if int(blocks[1].split()[0]) % 10 in (0, 4, 8) else "Score: 5"

    judge = build_llm_judge(JudgeConfig(votes=1, max_failed_fraction=0.5), ScriptedModel(reply=reply), seed=0)
    for iteration in range(2):
        for number in range(10):
            judge.score([wave(10 * iteration + number)])
        assert judge.metrics()["judge/parse_failure_fraction"] == pytest.approx(0.3)


def test_a_judge_that_never_answers_stops_within_the_iteration_however_small_its_waves():
    judge = build_llm_judge(JudgeConfig(votes=1), ScriptedModel(reply=lambda blocks, seed: "hm"), seed=0)
    for number in range(7):
        judge.score([wave(number)])
    with pytest.raises(JudgeError, match="no verdict in 32 of 32"):
        judge.score([wave(7)])


def test_every_figure_is_documented():
    documented = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`(judge/[a-z_<>]+)`", documented))
    reply = iter(["Verdict: A", "Verdict: B", "hm", "Verdict: A", "Verdict: B", "Verdict: B", "hm", "hm"] * 9)
    model = ScriptedModel(reply=lambda blocks, seed: next(reply))
    group = group_of("a", "bb", "ccc")
    judge = build_llm_judge(JudgeConfig(style="pairwise"), model, seed=0)
    ensemble = Ensemble({"llm_judge": judge, "majority": build_majority(ScorerConfig(verifier="exact"))}, 0.5)
    (scored,) = judge.score([group])
    made = dict(judge.metrics()) | truth_figures([scored], [scores_of(group, 3, 2, 1)])
    assert len(made) >= 10
    assert made.keys() <= named
    ensemble.score([group])
    found = {re.sub("judge/(llm_judge|majority)_", "judge/<member>_", name) for name in ensemble.metrics()}
    assert {re.sub("<member>_.*", "<member>_<figure>", name) for name in found} <= named
