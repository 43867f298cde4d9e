"""Seed data for the judge's role: how it is made, read and replayed; and the judge that goes step by step."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.judges.step_judge import StepJudge
from conf.schema import JudgeConfig, TaskConfig
from launch.seeds import read_seeds
from launch.tiny import make_tokenizer
from learners.policy import Policy, load_model
from learners.replay import Replay, seed_nll
from orchestrator.errors import ConfigError, DataError, JudgeError
from orchestrator.prompts import Renderer
from orchestrator.tasks.addition import AdditionTask, flawed_solution, worked_solution
from orchestrator.types import FinishReason, SeedSequence
from tests.judges import ScriptedModel, group_of, text_of
from tests.learning import VOCAB, make_model

# Flawed solutions


@given(a=st.integers(0, 9999), b=st.integers(0, 9999), rate=st.floats(0, 1), seed=st.integers(0, 1000))
def test_verdicts_are_what_a_careful_reader_says(a, b, rate, seed):
    """Each line is read against the question and the carry that the line before wrote, slip or no slip."""
    *columns, last = flawed_solution(a, b, 4, rate=rate, random=Random(seed))
    carry, written = 0, ""
    for place, step in enumerate(columns):
        x, y = a // 10**place % 10, b // 10**place % 10
        assert step.result == f"{x + y + carry:02d}"
        assert step.right == (step.line == f"{x}+{y}+{carry}={x + y + carry:02d}")
        total = step.line.split("=")[1]
        assert len(total) == 2
        carry, written = int(total[0]), total[1] + written
    assert last.result == f"{carry}{written}"
    assert last.right == (last.line == f"#{carry}{written}")
    if rate == 0:
        assert "\n".join(step.line for step in [*columns, last]) == worked_solution(a, b, 4)


def test_judged_solutions_teach_both_verdicts_on_problems_of_no_other_split():
    task = AdditionTask()
    made = task.judged_solutions(300, seed=0)
    assert made == task.judged_solutions(300, seed=0) != task.judged_solutions(300, seed=1)
    for problem, _ in made:
        a, b = map(int, problem.content.strip().split("+"))
        assert task.split_of(a, b) == "demonstrations"
    verdicts = [step.right for _, steps in made for step in steps]
    assert 0.6 < np.mean(verdicts) < 0.85
    assert 60 < sum(all(step.right for step in steps) for _, steps in made) < 200


# Files


def read(tmp_path, *rows, max_length=128):
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tokenizer = make_tokenizer(max_length)
    return read_seeds(path, Renderer(tokenizer, TaskConfig()), tokenizer, max_length=max_length), tokenizer


def test_seed_data_is_read_token_by_token(tmp_path):
    rows = [
        {"prompt": "J12+34\n", "completion": "2+4+0=06:06Y", "spans": [[9, 12]]},
        {"prompt": "12+34\n", "completion": "#046"},
    ]
    (judged, plain), tokenizer = read(tmp_path, *rows)
    assert tokenizer.decode(judged.prompt, skip_special_tokens=True) == "J12+34\n"
    assert tokenizer.decode(judged.completion, skip_special_tokens=True) == "2+4+0=06:06Y"
    assert [text for text, learned in zip("2+4+0=06:06Y", judged.learned, strict=False) if learned] == list("06Y")
    assert judged.completion[-1] == plain.completion[-1] == tokenizer.eos_token_id
    assert judged.learned[-1] is False, "with spans, the end is not one of them"
    assert plain.learned == (True,) * 5, "without, all of it is learned and that it ends"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+1\n"}, "completion"),
        ({"prompt": "1+1\n", "completion": "2", "spans": [[0, 2]]}, "'spans' holds.*in the 1 characters"),
        ({"prompt": "1+1\n", "completion": "2", "spans": [1]}, "'spans' holds"),
        ({"prompt": "1+1\n", "completion": "2", "spans": [[1, 1]]}, "'spans' holds"),
        ({"prompt": "1+1\n", "completion": "2", "spans": []}, "no token of the completion is learned"),
        ({"prompt": "1+1\n", "completion": "2" * 130}, "have 1[0-9][0-9] tokens, model.max_length is 128"),
    ],
)
def test_unusable_seed_data_is_refused_with_its_line(tmp_path, row, expected):
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path, {"prompt": "1+1\n", "completion": "2"}, row)
    assert "line 2" in str(caught.value)


# Replay


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    torch.set_num_threads(1)
    return Policy(load_model(folder), dtype="float32", vocab_chunk=64)


def sequences(count, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(random.integers(1, 8))
        learned = random.random(length) < 0.5
        learned[int(random.integers(length))] = True
        prompt = tuple(random.integers(0, VOCAB, random.integers(1, 5)).tolist())
        completion = tuple(random.integers(0, VOCAB, length).tolist())
        made.append(SeedSequence(prompt=prompt, completion=completion, learned=tuple(learned.tolist())))
    return made


def test_the_loss_is_the_mean_over_learned_tokens_alone(policy):
    made = sequences(6) + sequences(1)  # one of them twice
    found, total = [], 0
    with torch.no_grad():
        for sequence in made:
            row = torch.tensor([[*sequence.prompt, *sequence.completion]])
            logprobs = policy.model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            mask = torch.tensor(sequence.learned)
            found.append(logprobs[len(sequence.prompt) - 1 :][mask].sum())
            total += int(mask.sum())
        assert float(seed_nll(policy, made)) == pytest.approx(-float(sum(found)) / total, rel=1e-5)


def test_a_step_replays_the_same_draw_and_another_step_another(policy):
    replay = Replay(sequences(40), per_step=5, weight=0.5, seed=3)

    def gradient(step, weight=0.5):
        policy.zero_grad(set_to_none=True)
        loss = Replay(sequences(40), per_step=5, weight=weight, seed=3).backward(policy, step)
        return loss, policy.model.lm_head.weight.grad.clone()

    policy.zero_grad(set_to_none=True)
    first = replay.backward(policy, 7)
    loss, grad = gradient(7)
    assert loss == first != gradient(8)[0]
    torch.testing.assert_close(gradient(7, weight=1.0)[1], 2 * grad)
    assert len({gradient(step)[0] for step in range(6)}) == 6


# The step judge


def judging(favour, **more):
    """A judge of one token a character; `favour`: (written before, what stands next) -> its probability."""
    model = ScriptedModel(**more)

    def logprobs(asked):
        model.sequences += asked
        texts = [(text_of(prompt), text_of((1, *tokens))) for prompt, tokens in asked]
        with np.errstate(divide="ignore"):
            return [
                np.log([favour(prompt + text[:at], sign) for at, sign in enumerate(text)]).astype(np.float32)
                for prompt, text in texts
            ]

    model.logprobs = logprobs
    return model


SOLUTION = "2+4+0=06\n1+3+0=07\n#046"


def test_a_step_is_approved_of_by_the_probability_of_its_own_result_and_of_yes_among_the_verdicts():
    """Behind each line stands its own result. Of the second the judge comes to another with .75, and says right of it
    three times as often as wrong; half of the time it would say neither."""

    def favour(before, sign):
        second = before.endswith(("=07:", "=07:0", "=07:07"))
        if sign in "YN":
            return {"Y": 0.375, "N": 0.125}[sign] if second else {"Y": 0.8, "N": 0.2}[sign]
        return 0.5 if second else 1.0

    model = judging(favour)
    (scored,) = StepJudge(model, JudgeConfig()).score([group_of(SOLUTION, prompt="12+34\n")])
    (prompt, right), (same, wrong) = model.sequences
    assert text_of(prompt).startswith("J")
    assert prompt == same
    assert text_of((1, *right)) == "2+4+0=06:06Y\n1+3+0=07:07Y\n#046:046Y"
    assert text_of((1, *wrong)) == text_of((1, *right)).replace("Y", "N")
    assert scored.scores[0].value == pytest.approx((0.8 + 0.25 * 0.75 + 0.8) / 3)


def test_other_verdicts_can_be_named_and_must_differ_from_their_beginning():
    model = judging(lambda before, sign: 0.5)
    StepJudge(model, JudgeConfig(yes="+ok", no="-no")).score([group_of("a=1\n\nb")])
    assert [text_of((1, *tokens)) for _, tokens in model.sequences] == [f"a=1:1{v}\n\nb:{v}" for v in ("+ok", "-no")]
    for yes, no in (("Y", "Y"), ("no", "not"), ("Y", "")):
        with pytest.raises(ConfigError, match=r"writes one as the beginning of the other"):
            StepJudge(model, JudgeConfig(yes=yes, no=no))


def test_a_judge_that_says_no_verdict_at_one_step_abstains_and_is_counted():
    def favour(before, sign):
        return 0.004 if sign in "YN" and "#" in before else 0.5

    judge = StepJudge(judging(favour), JudgeConfig())
    (scored,) = judge.score([group_of(SOLUTION, "2+4+0=06")])
    assert scored.scores[0].value is None
    assert "behind step 3 both verdicts together have probability 0.008" in scored.scores[0].reason
    assert scored.scores[1].value == pytest.approx(0.5 * 0.5 * 0.5)
    found = judge.metrics()
    assert found["judge/parse_failure_fraction"] == found["judge/abstained_fraction"] == 0.5


def test_a_step_judge_that_never_says_a_verdict_stops_the_run():
    judge = StepJudge(judging(lambda before, sign: 1e-4 if sign in "YN" else 1.0), JudgeConfig())
    judge.score([group_of("2+4+0=06")])
    with pytest.raises(JudgeError, match=r"step_judge:.* no verdict in 1 of 1 .*behind step 1 both verdicts"):
        judge.metrics()


def test_a_completion_that_has_no_last_step_is_not_judged():
    model = judging(lambda before, sign: 0.5)
    judge = StepJudge(model, JudgeConfig())
    (scored,) = judge.score([group_of("2+4+0=06", finish=FinishReason.LENGTH)])
    assert scored.scores[0].value is None
    assert "did not end" in scored.scores[0].reason
    (scored,) = judge.score([group_of("", "\n\n")])
    assert [score.reason for score in scored.scores] == ["it has no step"] * 2
    assert model.sequences == []
    assert "judge/parse_failure_fraction" not in judge.metrics(), "the judge was not asked"
    small = judging(lambda before, sign: 0.5, max_length=12)
    (scored,) = StepJudge(small, JudgeConfig()).score([group_of("2+4+0=06")])
    assert "longer than the context" in scored.scores[0].reason
