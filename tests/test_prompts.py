"""Prompts: special tokens once, chats through the template, lengths counted, streams that resume."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import TaskConfig
from launch.tiny import make_tokenizer as make_tiny_tokenizer
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompts import PromptStream, Renderer, check_lengths
from orchestrator.tasks.addition import AdditionTask
from orchestrator.tasks.base import Message, Problem
from orchestrator.types import Prompt
from tests.models import make_tokenizer


class Words:
    """A task of texts of given lengths in tokens (the tiny tokenizer: characters and a BOS)."""

    name, has_answers = "words", False

    def __init__(self, lengths):
        self.problems = [
            Problem(id=str(line), content="1" * (length - 1), source=f"words.jsonl, line {line}")
            for line, length in enumerate(lengths, start=1)
        ]
        self.num_train = len(self.problems)

    def train(self, cursor):
        while True:
            yield self.problems[cursor % self.num_train]
            cursor += 1

    def test(self, n):
        return self.problems[:n]

    tuning = test

    def locate(self, problem_id):
        return self.problems[int(problem_id) - 1].source


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tiny():
    return make_tiny_tokenizer(128)


def problem(content):
    return Problem(id="p/1", content=content, answer="4", source="p.jsonl, line 1")


def stream(task, tokenizer, **settings):
    return PromptStream(task, Renderer(tokenizer, TaskConfig()), **{"max_length": 20, "max_tokens": 10} | settings)


def test_a_text_gets_its_bos_once_and_no_eos(tiny):
    prompt = Renderer(tiny, TaskConfig())(problem("53+24\n"))
    assert prompt == Prompt(id="p/1", text="53+24\n", token_ids=(1, 8, 6, 13, 5, 7, 17), answer="4")
    assert Renderer(tiny, TaskConfig())(problem("<s>53+24\n")).token_ids == prompt.token_ids


def test_an_eos_that_the_tokenizer_appends_is_taken_off(chat_tokenizer):
    class Closing:
        bos_token_id, eos_token, eos_token_id, pad_token_id, unk_token_id, chat_template = 1, "</s>", 2, 2, 2, None

        def encode(self, text, *, add_special_tokens):
            ids = chat_tokenizer.encode(text, add_special_tokens=False)
            return [1, *ids, 2] if add_special_tokens else ids

    inner = chat_tokenizer.encode("A judge", add_special_tokens=False)
    render = Renderer(Closing(), TaskConfig())
    assert render(problem("A judge")).token_ids == (1, *inner)
    assert render(problem("A judge</s>")).token_ids[-1] == 2


def test_a_chat_goes_through_the_template_with_one_bos(chat_tokenizer):
    chat = (Message(role="user", content="2+2?"),)
    for content in ("2+2?", chat):
        prompt = Renderer(chat_tokenizer, TaskConfig(system_prompt="Be brief."))(problem(content))
        assert prompt.text == "<s><system>Be brief.\n<user>2+2?\n<assistant>"
        assert prompt.token_ids.count(1) == 1
        assert prompt.token_ids[0] == 1
        assert chat_tokenizer.decode(prompt.token_ids) == prompt.text
    own = (Message(role="system", content="Be long."), *chat)
    prompt = Renderer(chat_tokenizer, TaskConfig(system_prompt="Be brief."))(problem(own))
    assert prompt.text == "<s><system>Be long.\n<user>2+2?\n<assistant>"


def test_template_text_leaves_a_text_as_it_stands(chat_tokenizer):
    assert Renderer(chat_tokenizer, TaskConfig(template="text"))(problem("2+2?")).text == "2+2?"


def test_what_the_template_cannot_say_is_refused(chat_tokenizer, tiny, tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(tiny, TaskConfig(template="chat"))
    with pytest.raises(ConfigError, match="system_prompt"):
        Renderer(tiny, TaskConfig(system_prompt="Be brief."))
    with pytest.raises(DataError, match="line 1: the prompt is a chat"):
        Renderer(tiny, TaskConfig())(problem((Message(role="user", content="2+2"),)))
    with pytest.raises(DataError, match=r"line 1: .*characters that the model's tokenizer does not know"):
        Renderer(tiny, TaskConfig())(problem("what is 2+2"))
    strict = make_tokenizer(tmp_path)
    strict.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match=r"line 1: .*refuses the roles user: no system here"):
        Renderer(strict, TaskConfig())(problem("2+2"))


def test_lengths_are_counted_and_the_worst_is_named(tiny):
    render = Renderer(tiny, TaskConfig())
    task = Words([5, 11, 10, 30])
    report = check_lengths([render(p) for p in task.test(4)], max_length=20, max_tokens=10)
    assert (report.num_prompts, report.num_too_long, report.worst.id, report.room) == (4, 2, "4", 10)


def test_prompts_that_are_too_long_are_refused_or_dropped(tiny):
    task = Words([5, 11, 10, 30])
    refusing = stream(task, tiny)
    with pytest.raises(DataError, match=r"words\.jsonl, line 2"):
        refusing.take(2)
    assert refusing.cursor == 0
    with pytest.raises(DataError, match=r"2 of 4 prompts .* the longest has 30 \(words\.jsonl, line 4\)"):
        refusing.held_out(4)
    dropping = stream(task, tiny, on_too_long="drop")
    assert [prompt.id for prompt in dropping.take(2)] == ["1", "3"]
    assert dropping.cursor == 3
    with pytest.raises(DataError, match=r"has 2 prompts that leave room .* and 3 are wanted"):
        dropping.take(3)
    assert dropping.cursor == 3
    assert [prompt.id for prompt in dropping.held_out(4)] == ["1", "3"]


def test_a_stream_in_which_nothing_fits_ends_in_an_error(tiny):
    with pytest.raises(DataError, match="has 0 prompts that leave room"):
        stream(Words([11, 30]), tiny, on_too_long="drop").take(1)


@given(sizes=st.lists(st.integers(1, 3), max_size=12), lengths=st.lists(st.integers(2, 14), max_size=6))
def test_a_prompt_stream_resumes_at_its_cursor(tiny, sizes, lengths):
    task = Words([5, 5, 5, *lengths])
    whole = stream(task, tiny, on_too_long="drop")
    for size in sizes:
        resumed = stream(task, tiny, on_too_long="drop", cursor=whole.cursor)
        assert resumed.take(size) == whole.take(size)
        assert resumed.cursor == whole.cursor


@given(sizes=st.lists(st.integers(1, 5), max_size=12))
def test_an_iteration_never_has_a_prompt_twice(tiny, sizes):
    whole = stream(Words([5, 5, 5, 5, 5]), tiny)
    for size in sizes:
        ids = [prompt.id for prompt in whole.take(size)]
        assert len(set(ids)) == size


def test_the_addition_task_reads_as_its_problems(tiny):
    task = AdditionTask(seed=1)
    taken = stream(task, tiny, max_length=128, max_tokens=64).take(3)
    assert [(p.id, p.text, p.answer) for p in taken] == [(p.id, p.content, p.answer) for p in islice(task.train(0), 3)]
