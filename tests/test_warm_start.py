"""The warm start: lands in its window, leaves an ordinary model folder, whole or not at all."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import ModelConfig, TinyConfig
from launch import warm_start
from launch.initial_model import ensure_tiny_model
from launch.model_cache import default_cache
from launch.tiny import EOS, VOCABULARY, make_model, make_tokenizer
from orchestrator.errors import ModelError
from orchestrator.tasks.addition import AdditionTask

TASK = AdditionTask(digits=1)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 1, "demonstrations": 64}


def config(**tiny):
    """A model that is good enough for the target when nothing has been learned."""
    return ModelConfig(max_length=32, tiny=TinyConfig(**SMALL | {"target_accuracy": 0.0, "seed": 0} | tiny))


@pytest.fixture
def scripted(monkeypatch):
    """Replaces measuring: accuracy is what the test says of the step and of the weights."""

    def script(function):
        monkeypatch.setattr(warm_start, "LOSS_WORTH_A_GLANCE", float("inf"))
        monkeypatch.setattr(warm_start, "measure_accuracy", lambda model, *_, **__: function(model))

    return script


def test_the_folder_is_an_ordinary_model(tmp_path):
    seen = []
    folder = ensure_tiny_model(config(), TASK, progress=lambda *row: seen.append(row), cache=tmp_path)
    assert [row[:2] for row in seen] == [(1, 400)]  # a target of zero is met at once
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 4 + [".safetensors"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == VOCABULARY[EOS]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    text = "5+7\n5+7+0=12\n#12"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) + 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model.dtype == torch.float32


def test_a_second_call_takes_the_cached_folder(tmp_path):
    first = ensure_tiny_model(config(), TASK, cache=tmp_path)
    again = ensure_tiny_model(config(), TASK, cache=tmp_path, progress=lambda *_: pytest.fail("made again"))
    assert again == first
    assert ensure_tiny_model(config(seed=1), TASK, cache=tmp_path) != first
    assert ensure_tiny_model(config(), AdditionTask(digits=2), cache=tmp_path) != first


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "agon" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "agon" / "models"


def test_making_one_model_twice_at_once_leaves_one_whole_folder(tmp_path, monkeypatch):
    both_made, found, save = threading.Barrier(2, timeout=60), [], warm_start.save

    def save_together(*arguments):
        save(*arguments)
        both_made.wait()  # now both are about to rename

    monkeypatch.setattr(warm_start, "save", save_together)
    makers = [
        threading.Thread(target=lambda: found.append(ensure_tiny_model(config(), TASK, cache=tmp_path)))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert found == [found[0]] * 2
    assert list(tmp_path.iterdir()) == [found[0]]
    AutoModelForCausalLM.from_pretrained(found[0])


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(warm_start, "save", full)
    with pytest.raises(OSError, match="no space left"):
        ensure_tiny_model(config(), TASK, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_target_out_of_reach_is_an_error_that_says_what_to_change(tmp_path):
    with pytest.raises(ModelError, match=r"max_steps=3 steps.*Raise model\.tiny\.max_steps"):
        ensure_tiny_model(config(target_accuracy=0.9, max_steps=3), TASK, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_overshoot_is_taken_back_into_the_window(scripted, tmp_path):
    start = make_model(config()).lm_head.weight.clone()

    def accuracy(model):  # jumps from 0 to 1 between two evaluations, at a distance no step size can hit
        distance = (model.lm_head.weight - start).norm().item()
        return min(1.0, (distance / 0.2) ** 3)

    scripted(accuracy)
    model = warm_start.warm_start(
        make_model(config()), make_tokenizer(32), TASK, config(target_accuracy=0.28, lr=0.1).tiny
    )
    assert 0.28 <= accuracy(model) <= 0.28 + warm_start.WINDOW


def test_batches_teach_the_solution_and_its_end_alone():
    tokenizer = make_tokenizer(32)
    tokens, labels = next(warm_start.demonstration_batches(tokenizer, TASK, config(batch_size=4).tiny))
    for row, targets in zip(tokens, labels, strict=True):
        question, solution = tokenizer.decode(row).split("\n", 1)
        taught = targets[targets != warm_start.IGNORED]
        assert tokenizer.decode(taught) == solution
        assert solution.endswith(EOS)
        position = len(tokenizer(f"{question}\n", add_special_tokens=False).input_ids)
        assert targets[position - 1] == row[position] == taught[0]


def test_cached_decoding_is_what_the_model_says_token_by_token():
    model = make_model(config(num_layers=2, num_heads=2, seed=5))
    prompts = torch.tensor([[1, 8, 6, 17], [1, 4, 4, 17], [1, 9, 3, 17]])
    drawn = warm_start.sample(model, prompts, max_tokens=6, temperature=0, generator=torch.Generator())
    for prompt, row in zip(prompts, drawn.tolist(), strict=True):
        tokens = prompt.tolist()
        for token in row[: row.index(2) + 1 if 2 in row else len(row)]:
            assert token == model(torch.tensor([tokens])).logits[0, -1].argmax().item()
            tokens.append(token)


def test_measuring_counts_right_answers_that_end(monkeypatch):
    tokenizer = make_tokenizer(32)
    problems = TASK.tuning(4)
    ends = ["</s>", "</s><pad>", "", "</s>"]
    texts = [f"#{problem.answer}{end}" for problem, end in zip(problems, ends, strict=True)]
    texts[3] = "#99</s>"
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    drawn = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    monkeypatch.setattr(warm_start, "sample", lambda *_, **__: drawn)
    assert warm_start.measure_accuracy(None, tokenizer, TASK, num_problems=4, seed=0) == 0.5
