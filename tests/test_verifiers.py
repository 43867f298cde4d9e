"""Verifiers: right, wrong or silent, and never an invented label."""

import math
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.judges import build_scorer
from conf.schema import ScorerConfig
from orchestrator.errors import ConfigError
from orchestrator.types import Completion, FinishReason, PolicyVersion, Prompt, RolloutGroup

POLICY = PolicyVersion(number=0, digest="0" * 16)
EOS = FinishReason.EOS


def group(*texts, answer="07776", finish=EOS):
    completions = tuple(
        Completion(token_ids=(1,), text=text, logprobs=(0.0,), finish_reason=finish, policy=POLICY) for text in texts
    )
    prompt = Prompt(id="p", text="question", token_ids=(1,), answer=answer)
    return RolloutGroup(prompt=prompt, completions=completions, iteration=1, seed=0)


def values(scorer, *texts, **settings):
    return [score.value for score in scorer.score(group(*texts, **settings)).scores]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of functions and makes it importable."""

    def write(source):
        (tmp_path / "rewards.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "rewards", raising=False)
        return build_scorer(ScorerConfig(verifier="function", function="rewards.f"), has_answers=False)

    return write


def test_final_answer_is_what_follows_the_last_marker():
    scorer = build_scorer(ScorerConfig())
    assert values(scorer, "5+1+0=06\n#07776", "#1#07776", "#07776#1", "#7776", "07776", "", "#077760") == [
        1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert scorer.score(group("#07776")).scorer == scorer.name == "verifier:final_answer@1"


@given(text=st.text(), answer=st.text(st.characters(blacklist_characters="#"), min_size=1))
def test_final_answer_accepts_any_way_there(text, answer):
    scorer = build_scorer(ScorerConfig())
    assert values(scorer, f"{text}#{answer}", f"{text}#{answer}x", answer=answer) == [1.0, 0.0]


@pytest.mark.parametrize("verifier", ["final_answer", "exact", "math"])
def test_only_a_completion_that_ended_itself_is_right(verifier):
    scorer = build_scorer(ScorerConfig(verifier=verifier))
    text = "#72" if verifier == "final_answer" else "72"
    assert values(scorer, text, answer="72") == [1.0]
    assert values(scorer, text, answer="72", finish=FinishReason.STOP) == [1.0]
    assert values(scorer, text, answer="72", finish=FinishReason.LENGTH) == [0.0]
    assert values(scorer, text, answer="72", finish=FinishReason.ABORTED) == [None]


def test_exact_compares_the_whole_text():
    assert values(build_scorer(ScorerConfig(verifier="exact")), " Yes\n", "yes", "Yes.", answer="Yes") == [
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She has 48 + 24 = 72 clips.\n#### 72", "72", 1.0),
        ("The total is $1,234.00", "1234", 1.0),
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        ("#### 18.0", "18", 1.0),
        ("it is 0.5", "1/2", 1.0),
        ("it is 2", "1/2", 0.0),
        ("72 apples, no: 73", "72", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_math_compares_values(text, answer, right):
    assert values(build_scorer(ScorerConfig(verifier="math")), text, answer=answer) == [right]


def test_math_works_outside_the_main_thread():
    scorer, found = build_scorer(ScorerConfig(verifier="math")), []
    thread = threading.Thread(target=lambda: found.extend(values(scorer, "#### 72", "#### 73", answer="72")))
    thread.start()
    thread.join(60)
    assert found == [1.0, 0.0]


def test_math_is_not_held_up_by_a_number_beyond_computing(monkeypatch):
    monkeypatch.setattr("actors.judges.verifier.MATH_TIMEOUT_S", 1)
    assert values(build_scorer(ScorerConfig(verifier="math")), "$9^{9^{9^{9}}}$", answer="72") == [None]


@pytest.mark.parametrize("answer", ["1/0", "\u0663", "9" * 4301])
def test_math_abstains_where_it_fails_on_the_reference(answer):
    assert values(build_scorer(ScorerConfig(verifier="math")), "so it is $7$", answer=answer) == [None]


def test_math_does_not_judge_what_is_no_mathematics():
    scorer = build_scorer(ScorerConfig(verifier="math"))
    assert values(scorer, "Paris", "It is Paris.", "Rome", answer="Paris") == [1.0, None, None]
    assert values(scorer, "yes", "no", answer="no solution") == [None, None]
    assert values(scorer, r"$x + 1$", "the answer is 3", answer="x+1") == [1.0, 0.0]


def test_a_function_scores_or_abstains_with_the_reason(module):
    scorer = module(
        "def f(prompt, completion, answer):\n"
        "    return {'good': 2, 'half': 0.5, 'nan': float('nan'), 'text': 'x', 'none': None}[completion]\n"
    )
    scored = scorer.score(group("good", "half", "nan", "text", "none", "other", answer=None))
    assert [score.value for score in scored.scores] == [2.0, 0.5, None, None, None, None]
    words = ["", "", "no finite number", "no finite number", "abstained", "raised KeyError: 'other'"]
    assert all(word in score.reason for word, score in zip(words, scored.scores, strict=True))
    assert scored.scorer.startswith("verifier:rewards.f@")


def test_a_function_sees_prompt_completion_and_answer(module):
    scorer = module("def f(*seen):\n    return float(seen == ('question', 'text', '07776'))\n")
    assert values(scorer, "text") == [1.0]


def test_a_changed_function_is_another_judge(module):
    names = {module(f"def f(prompt, completion, answer):\n    return {value}.0\n").name for value in (1, 2)}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("source", "function", "words"),
    [
        ("", None, "found None"),
        ("", "f", "found 'f'"),
        ("", "no_such_module.f", "'no_such_module' cannot be imported"),
        ("def f(:\n", "rewards.f", "cannot be imported"),
        ("", "rewards.f", "has no such name: 'f'"),
        ("f = 3\n", "rewards.f", "has it as int"),
        ("def f(completion): ...\n", "rewards.f", "does not take these three arguments"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(tmp_path, monkeypatch, source, function, words):
    (tmp_path / "rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    with pytest.raises(ConfigError, match=words):
        build_scorer(ScorerConfig(verifier="function", function=function))


def test_a_missing_reference_answer_is_an_abstention_and_a_task_without_any_is_refused():
    scorer = build_scorer(ScorerConfig())
    [score] = scorer.score(group("#1", answer=None)).scores
    assert (score.value, score.reason) == (None, "the prompt has no reference answer")
    with pytest.raises(ConfigError, match=r"task\.answer_field"):
        build_scorer(ScorerConfig(), has_answers=False)


def test_scores_are_finite_or_none():
    scored = build_scorer(ScorerConfig(verifier="math")).score(group("1", "x", "\\frac{", answer="1"))
    assert all(score.value is None or math.isfinite(score.value) for score in scored.scores)
