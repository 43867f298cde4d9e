"""Seed data for the judge's role: how it is made, read and replayed; and the judge that goes step by step."""

from __future__ import annotations

import json
import math
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
from orchestrator.errors import DataError
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


def test_a_step_is_approved_of_by_the_probability_of_its_own_result_and_yes():
    """Behind each line stand its own result and Y; what is read is the probability of both, and the mean of lines."""
    seen = []

    def favour(blocks, ending):
        seen.append(ending)
        return 0.0

    model = ScriptedModel(favour=favour)
    likely = {"06Y": (-0.1, -0.2, -0.3), "07Y": (-1.0, 0.0, -1.0), "046Y": (0.0, 0.0, -0.5, -0.5)}

    def logprobs(asked):
        model.sequences += asked
        text = text_of((1, *asked[0][1]))
        values = np.full(len(text), -9.0, np.float32)
        for approval, numbers in likely.items():
            start = text.index(f":{approval}") + 1
            values[start : start + len(approval)] = numbers
        return [values]

    model.logprobs = logprobs
    group = group_of("2+4+0=06\n1+3+0=07\n#046", prompt="12+34\n")
    (scored,) = StepJudge(model, JudgeConfig()).score([group])
    (prompt, completion) = model.sequences[0]
    assert text_of(prompt).startswith("J")
    assert text_of((1, *completion)) == "2+4+0=06:06Y\n1+3+0=07:07Y\n#046:046Y"
    expected = (math.exp(-0.6) + math.exp(-2.0) + math.exp(-1.0)) / 3
    assert scored.scores[0].value == pytest.approx(expected)


def test_a_completion_that_has_no_last_step_is_not_judged():
    model = ScriptedModel(favour=lambda blocks, ending: 0.0)
    (scored,) = StepJudge(model, JudgeConfig()).score([group_of("2+4+0=06", finish=FinishReason.LENGTH)])
    assert scored.scores[0].value is None
    assert "did not end" in scored.scores[0].reason
    assert model.sequences == []
    small = ScriptedModel(favour=lambda blocks, ending: 0.0, max_length=12)
    (scored,) = StepJudge(small, JudgeConfig()).score([group_of("2+4+0=06")])
    assert "longer than the context" in scored.scores[0].reason
