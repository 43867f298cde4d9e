"""Judges that read: what is asked, what is understood, what is done where nothing is, and that order does not count."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.judges.cache import VerdictCache, question_key
from actors.judges.llm_judge import build_llm_judge
from actors.judges.verdicts import Verdict, parse_choice, parse_score
from conf.schema import JudgeConfig, TaskConfig
from orchestrator.errors import ConfigError
from orchestrator.scoring import PooledTextModel
from orchestrator.tasks.base import Message
from orchestrator.types import FinishReason
from tests.judges import ScriptedModel, blocks, group_of, text_of
from tests.models import make_tokenizer


def judged(model, groups, **config):
    judge = build_llm_judge(JudgeConfig(**config), model, seed=3)
    return judge.score(groups), judge


def values(scored):
    return [score.value for score in scored.scores]


# -- verdicts in words --


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("Good.\nScore: 4", 4.0),
        ("score:3.5", 3.5),
        ("**Score: 5**\n\n", 5.0),
        ("**Score:** 2.", 2.0),
        ("Score: 0/5", 0.0),
        ("Score: 1\nNo, more.\nScore: 4", 4.0),
        ("Score: 4\nThat was it.", None),
        ("The answer ends with Score: 5", None),
        ('The answer says "x\u2028Score: 5', None),
        ("> Score: 5", None),
        ('"Score: 5"', None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 8/10", None),
        ("Score: five", None),
        ("Score: \u0665", None),  # a digit of another script
        ("Score:", None),
        ("5", None),
        ("", None),
    ],
)
def test_points_are_read_from_the_last_line_alone(reply, points):
    assert parse_score(reply) == points


@pytest.mark.parametrize(
    ("reply", "first"),
    [
        ("Verdict: A", 1.0),
        ("B it is.\nverdict: b.", 0.0),
        ("**Verdict: tie**", 0.5),
        ("Verdict: A\nVerdict: B", 0.0),
        ("Verdict: A or B", None),
        ("A", None),
        ("Verdict: C", None),
        ("Verdict: A\nas I said", None),
    ],
)
def test_choices_are_read_from_the_last_line_alone(reply, first):
    assert parse_choice(reply) == first


# -- pointwise --


def test_points_are_the_mean_of_the_votes_that_can_be_read():
    replies = iter(["Score: 5", "no idea", "Score: 2", *["no idea"] * 3])
    model = ScriptedModel(reply=lambda blocks, seed: next(replies))
    (scored,), judge = judged(model, [group_of("two", "three")], votes=3)
    assert values(scored) == [3.5, None]
    assert "no idea" in scored.scores[1].reason
    found = judge.metrics()
    assert found["judge/parse_failure_fraction"] == pytest.approx(4 / 6)
    assert found["judge/abstained_fraction"] == 1 / 2
    assert judge.metrics() == {}


def test_points_by_probability_are_the_expected_value():
    p = dict(zip("012345", (0.1, 0.0, 0.1, 0.0, 0.2, 0.4), strict=True))  # sums to 0.8: 0.2 goes elsewhere
    model = ScriptedModel(favour=lambda blocks, digit: math.log(p[digit]) if p[digit] else -math.inf)
    (scored,), _ = judged(model, [group_of("two")], verdict="probability")
    assert values(scored) == [pytest.approx((2 * 0.1 + 4 * 0.2 + 5 * 0.4) / 0.8, rel=1e-6)]
    assert text_of(model.sequences[0][0]).endswith("Score: ")
    assert {text_of((1, *ending)) for _, ending in model.sequences} == set("012345")


def test_a_judge_that_would_say_something_else_abstains():
    model = ScriptedModel(favour=lambda blocks, digit: math.log(1e-3))
    (scored,), judge = judged(model, [group_of("two")], verdict="probability", max_failed_fraction=1.0)
    assert values(scored) == [None]
    assert judge.metrics()["judge/parse_failure_fraction"] == 1


def test_a_reply_that_was_cut_off_is_no_verdict():
    model = ScriptedModel(reply=lambda blocks, seed: "It says:\nScore: 5")
    model.finish = FinishReason.LENGTH
    (scored,), _ = judged(model, [group_of("two")], max_failed_fraction=1.0)
    assert values(scored) == [None]
    assert "did not end by itself" in scored.scores[0].reason


def test_an_aborted_completion_is_not_judged():
    model = ScriptedModel(reply=lambda blocks, seed: "Score: 5")
    (scored,), _ = judged(model, [group_of("two", finish=FinishReason.ABORTED)])
    assert values(scored) == [None]
    assert not model.requests


def test_a_question_that_is_too_long_is_not_asked():
    model = ScriptedModel(reply=lambda blocks, seed: "Score: 5", favour=lambda blocks, digit: -1.0, max_length=3000)
    groups = [group_of("short", "long " * 1000)]
    for verdict in ("words", "probability"):
        (scored,), _ = judged(model, groups, verdict=verdict)
        assert scored.scores[0].value is not None
        assert scored.scores[1].value is None
        assert "the judge's context is 3000" in scored.scores[1].reason
    with pytest.raises(ConfigError, match=r"judge\.max_tokens=3000: leaves no room"):
        judged(model, groups, max_tokens=3000)


# -- comparisons --


def by_length(blocks, seed):
    _, a, b = blocks
    return "Verdict: A" if len(a) > len(b) else "Verdict: B" if len(b) > len(a) else "Verdict: tie"


def test_comparisons_in_words():
    groups = [group_of("1", "333", "22"), group_of("x", "y")]
    (scored, same), judge = judged(ScriptedModel(reply=by_length), groups, style="pairwise")
    assert scored.preferences == ((0.5, 0.0, 0.0), (1.0, 0.5, 1.0), (1.0, 0.0, 0.5))
    assert values(scored) == [0.0, 1.0, 0.5]
    assert same.preferences == ((0.5, 0.5), (0.5, 0.5))
    found = judge.metrics()
    assert found["judge/position_bias"] == 0
    assert found["judge/order_agreement"] == 1
    assert found["judge/vote_agreement"] == 1
    assert found["judge/length_bias"] == 1
    assert found["judge/tie_fraction"] == 1 / 4
    assert scored.scorer.startswith("llm_judge:pairwise:words:")
    assert scored.scorer.endswith(":v1-test@1")


def test_a_judge_that_always_takes_the_first_prefers_nothing():
    model = ScriptedModel(reply=lambda blocks, seed: "Verdict: A", favour=lambda blocks, v: -0.1 if v == "A" else -5.0)
    for verdict in ("words", "probability"):
        (scored,), judge = judged(model, [group_of("1", "333", "22")], style="pairwise", verdict=verdict)
        assert values(scored) == pytest.approx([0.5, 0.5, 0.5])
        found = judge.metrics()
        assert found["judge/position_bias"] > 0.4
        assert found["judge/order_agreement"] == 0
        assert found["judge/tie_fraction"] == 1


def test_comparisons_by_probability_average_both_orders():
    logits = {("A", "1"): 0.6, ("B", "1"): 0.2, ("A", "22"): 0.1, ("B", "22"): 0.3}  # by verdict and what stands first
    model = ScriptedModel(favour=lambda blocks, verdict: math.log(logits[verdict, blocks[1]]))
    (scored,), _ = judged(model, [group_of("1", "22")], style="pairwise", verdict="probability")
    first = (0.6 / 0.8 + 0.3 / 0.4) / 2
    assert scored.preferences[0][1] == pytest.approx(first, rel=1e-6)
    assert scored.preferences[1][0] == pytest.approx(1 - first, rel=1e-6)


def test_an_order_that_cannot_be_read_leaves_the_comparison_undecided():
    def reply(blocks, seed):
        return "hm" if blocks[1] == "1" else by_length(blocks, seed)

    (scored,), judge = judged(ScriptedModel(reply=reply), [group_of("1", "333", "22")], style="pairwise")
    assert scored.preferences == ((0.5, None, None), (None, 0.5, 1.0), (None, 0.0, 0.5))
    assert values(scored) == [None, 1.0, 0.0]
    assert judge.metrics()["judge/abstained_fraction"] == pytest.approx(2 / 3)


@st.composite
def biased_judges(draw):
    """Any judge: its taste depends on both texts, the place and the seed; sometimes it says nothing."""
    salt, silence = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.2]))

    def mood(*parts):
        return (hash((salt, *parts)) % 1009) / 1009  # integers and tuples of them hash alike in every process

    def codes(blocks):
        return tuple(tuple(map(ord, block)) for block in blocks)

    def reply(blocks, seed):
        m = mood(codes(blocks), seed)
        return "hm" if m < silence else f"Verdict: {'A' if m < 0.6 else 'B' if m < 0.9 else 'tie'}"

    return ScriptedModel(reply=reply, favour=lambda blocks, verdict: -8 * mood(codes(blocks), ord(verdict)))


@given(biased_judges(), st.sampled_from(["words", "probability"]), st.permutations(["a", "bb", "ccc", "dd"]))
def test_the_order_of_completions_never_changes_a_judgement(model, verdict, shuffled):
    texts = ["a", "bb", "ccc", "dd"]
    (scored,), _ = judged(model, [group_of(*texts)], style="pairwise", verdict=verdict)
    (moved,), _ = judged(model, [group_of(*shuffled)], style="pairwise", verdict=verdict)
    place = [shuffled.index(text) for text in texts]
    for i in range(4):
        for j in range(4):
            one, other = scored.preferences[i][j], moved.preferences[place[i]][place[j]]
            assert other == (None if one is None else pytest.approx(one, abs=1e-12))
            if one is not None:
                assert one + scored.preferences[j][i] == pytest.approx(1, abs=1e-12)
        one, other = scored.scores[i].value, moved.scores[place[i]].value
        assert other == (None if one is None else pytest.approx(one, abs=1e-12))


# -- asking once --


@pytest.mark.parametrize("verdict", ["words", "probability"])
def test_nothing_is_judged_twice_by_the_same_weights(verdict):
    def reply(blocks, seed):
        return f"Score: {seed % 6}"

    model = ScriptedModel(reply=reply, favour=lambda blocks, digit: -float(digit) - len(blocks[1]))
    judge = build_llm_judge(JudgeConfig(votes=4, verdict=verdict), model, seed=3)
    votes = 4 if verdict == "words" else 1
    first = judge.score([group_of("two", "two", "three")])
    asked = len(model.requests) + len(model.sequences)
    assert len(model.requests) == (2 * votes if verdict == "words" else 0), "identical texts are one question"
    assert judge.score([group_of("two", "two", "three")]) == first
    assert len(model.requests) + len(model.sequences) == asked
    assert judge.metrics()["judge/cache_hit_fraction"] == pytest.approx(4 / 6)
    assert judge.score([group_of("two", "two", "three")]) == first
    assert len(model.requests) + len(model.sequences) == 2 * asked, "another wave remembers nothing of this one"
    asked *= 2
    assert judge.score([group_of("two", "two", "three")]) == first
    model.version = "v2-test"
    again = judge.score([group_of("two", "two", "three")])
    assert len(model.requests) + len(model.sequences) == asked * 3 // 2, "other weights judge anew"
    assert again[0].scorer != first[0].scorer


def test_a_greedy_judge_is_asked_once():
    model = ScriptedModel(reply=lambda blocks, seed: "Score: 1")
    judged(model, [group_of("two")], temperature=0.0, votes=5)
    assert len(model.requests) == 1


def test_memory_is_bounded_and_forgets_what_was_not_used_for_longest():
    asked = []

    def ask(new):
        asked.extend(new)
        return {key: Verdict(value=float(question)) for key, question in new.items()}

    cache = VerdictCache(capacity=2)
    for keys in ("a", "b", "a", "c", "aa"):  # c pushes b out, not a
        cache.resolve([(key, "1") for key in keys], ask)
    assert (asked, len(cache), cache.hits) == (["a", "b", "c"], 2, 3)
    found = cache.resolve([("b", "7"), ("a", "8"), ("d", "9"), ("b", "7")], ask)
    assert [verdict.value for verdict in found] == [7, 1, 9, 7], "a wave larger than the memory is answered whole"
    assert (asked, len(cache)) == (["a", "b", "c", "b", "d"], 2)


def test_different_questions_have_different_keys():
    keys = [question_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), ("ab", "c", 0))]
    assert len(set(keys)) == len(keys)


def test_votes_are_drawn_with_seeds_of_their_own_that_depend_on_nothing_else():
    model = ScriptedModel(reply=lambda blocks, seed: f"Score: {seed % 6}")
    judged(model, [group_of("two", "three"), group_of("four", prompt="other")], votes=2)
    seeds = {(text_of(r.prompt_token_ids), r.seed) for r in model.requests}
    assert len({seed for _, seed in seeds}) == 6
    assert len({r.id for r in model.requests}) == 6
    alone = ScriptedModel(reply=model.reply)
    judged(alone, [group_of("four", prompt="other")], votes=2)
    assert {(text_of(r.prompt_token_ids), r.seed) for r in alone.requests} < seeds


# -- rubrics --


def test_the_question_holds_rubric_principles_and_texts(tmp_path):
    rubric, principles = tmp_path / "rubric.txt", tmp_path / "principles.txt"
    rubric.write_text("Be strict. {principles} Asked: {question} Said: {answer} {answer}")
    principles.write_text("Brevity.\n")
    model = ScriptedModel(reply=lambda blocks, seed: "Score: 5")
    group = group_of("a {question} in braces")
    (scored,), _ = judged(model, [group], rubric=str(rubric), principles=str(principles), votes=1)
    question = text_of(model.requests[0].prompt_token_ids)
    assert "Be strict. \nBrevity.\n Asked: [begin" in question
    assert blocks(question) == ["What is 1+1?", *["a {question} in braces"] * 2]
    (other,), _ = judged(model, [group], votes=1)
    assert other.scorer != scored.scorer, "another rubric is another judge"


@pytest.mark.parametrize("style", ["pointwise", "pairwise"])
def test_a_rubric_that_cannot_be_used_is_refused(tmp_path, style):
    def refusal(**config):
        with pytest.raises(ConfigError) as caught:
            build_llm_judge(JudgeConfig(style=style, **config), ScriptedModel(), seed=0)
        return str(caught.value)

    lacking = tmp_path / "rubric.txt"
    lacking.write_text("Grade {answer} {answer_a} {answer_b}")
    assert f"judge.rubric={lacking}" in refusal(rubric=str(lacking))
    assert "lacks {question}" in refusal(rubric=str(lacking))
    lacking.write_text("Grade {question} {answer} {answer_a} {answer_b}")
    assert "lacks {principles}" in refusal(rubric=str(lacking), principles=str(lacking))
    assert f"judge.rubric={tmp_path / 'absent'}: cannot be read" in refusal(rubric=str(tmp_path / "absent"))
    lacking.write_bytes(b"\xff\xfe")
    assert "cannot be read as a UTF-8 text" in refusal(rubric=str(lacking))
    lacking.write_text(" \n")
    assert f"judge.principles={lacking}: the file is empty" in refusal(principles=str(lacking))


def test_a_tokenizer_that_writes_verdicts_alike_is_refused():
    model = ScriptedModel()
    model.encode = lambda text: tuple(3 for _ in text)
    with pytest.raises(ConfigError, match="does not tell 0, 1, 2, 3, 4, 5 apart"):
        build_llm_judge(JudgeConfig(verdict="probability"), model, seed=0)


def test_verdict_tokens_that_share_a_beginning_are_told_apart_by_their_ends():
    model = ScriptedModel(favour=lambda blocks, verdict: math.log(0.75 if verdict == chr(1000) else 0.25))
    joined = {"A": 1000, "B": 1001}  # the space and the letter are one token
    model.encode = lambda text: (1, *map(ord, text[:-2]), joined[text[-1]]) if text[-1:] in joined else (1,)
    model.encode_chat = lambda messages: ScriptedModel().encode(messages[0].content)
    (scored,), _ = judged(model, [group_of("1", "22")], style="pairwise", verdict="probability")
    assert scored.preferences[0][1] == 0.5
    assert {ending for _, ending in model.sequences} == {(1000,), (1001,)}


def test_the_policys_system_prompt_is_not_the_judges(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    model = PooledTextModel(
        None,
        tokenizer,
        version=lambda: "v1",
        template=TaskConfig(system_prompt="Be brief."),
        max_length=64,
        deadline_s=1,
    )
    asked = model.encode_chat([Message(role="user", content="A judge reads")])
    assert tokenizer.decode(asked) == "<s><user>A judge reads\n<assistant>"
    assert set(model.special_tokens) == {"<pad>", "<s>", "</s>"}


def test_styles_and_names():
    names = {
        build_llm_judge(replace(JudgeConfig(), style=style, verdict=verdict), ScriptedModel(), seed=0).name
        for style in ("pointwise", "pairwise")
        for verdict in ("words", "probability")
    }
    assert len(names) == 4
