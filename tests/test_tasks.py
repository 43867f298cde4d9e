"""Tasks: streams that resume anywhere, splits that never touch, and files refused with the place of the fault."""

import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import TaskConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.tasks import build_task
from orchestrator.tasks.addition import AdditionTask, worked_solution
from orchestrator.tasks.base import Message


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(path, **changes):
    return TaskConfig(kind="prompts", path=str(path), **changes)


# Addition


def test_worked_solution_is_the_published_example():
    assert worked_solution(5305, 2471, 4) == "5+1+0=06\n0+7+0=07\n3+4+0=07\n5+2+0=07\n#07776"


@given(a=st.integers(0, 9999), b=st.integers(0, 9999))
def test_worked_solution_adds(a, b):
    *columns, total = worked_solution(a, b, 4).split("\n")
    assert total == f"#{a + b:05d}"
    carry = 0
    for place, column in enumerate(columns):
        left, right, carried, result = int(column[0]), int(column[2]), int(column[4]), int(column[6:])
        assert (left, right, carried) == (a // 10**place % 10, b // 10**place % 10, carry)
        assert left + right + carried == result
        carry = result // 10


@pytest.mark.parametrize("digits", [1, 2])
def test_addition_splits_are_a_partition_of_all_problems(digits):
    task = AdditionTask(digits=digits, seed=3)
    everything = 10 ** (2 * digits)
    train = [problem.id for problem in islice(task.train(0), task.num_train)]
    demonstrations = [problem.id for problem, _ in task.demonstrations(everything, seed=1)]
    others = [problem.id for problem in task.test(everything) + task.tuning(everything)]
    ids = train + demonstrations + others
    assert len(ids) == len(set(ids)) == everything


@given(seed=st.integers(0, 5), start=st.integers(0, 10**8))
@settings(max_examples=30)
def test_addition_never_trains_on_what_is_held_out(seed, start):
    task = AdditionTask(seed=seed)
    for problem in islice(task.train(start), 20):
        a, b = problem.content.strip().split("+")
        assert task.split_of(int(a), int(b)) == "train"
        assert problem.answer == f"{int(a) + int(b):05d}"
    assert {task.split_of(*map(int, problem.content.split("+"))) for problem in task.test(20)} == {"test"}


def test_held_out_problems_do_not_depend_on_the_seed():
    one, other = AdditionTask(seed=0), AdditionTask(seed=1)
    assert one.test(50) == other.test(50)
    assert one.tuning(50) == other.tuning(50)
    assert list(islice(one.train(0), 50)) != list(islice(other.train(0), 50))


# Streams


@given(cursor=st.integers(0, 200), seed=st.integers(0, 3), kind=st.sampled_from(["addition", "prompts"]))
@settings(max_examples=40)
def test_a_stream_resumes_at_its_cursor(tmp_path_factory, cursor, seed, kind):
    if kind == "addition":
        config = TaskConfig(digits=1)
    else:
        path = tmp_path_factory.mktemp("resume") / "p.jsonl"
        config = prompts(write_jsonl(path, [{"prompt": f"question {n}"} for n in range(60)]))
    whole = list(islice(build_task(config, seed).train(0), cursor + 10))
    assert list(islice(build_task(config, seed).train(cursor), 10)) == whole[cursor:]


@pytest.mark.parametrize("kind", ["addition", "prompts"])
def test_an_epoch_has_every_problem_once_and_the_next_another_order(tmp_path, kind):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {n}"} for n in range(60)])
    task = build_task(TaskConfig(digits=1) if kind == "addition" else prompts(path), 0)
    ids = [problem.id for problem in islice(task.train(0), 2 * task.num_train)]
    first, second = ids[: task.num_train], ids[task.num_train :]
    assert len(set(first)) == task.num_train
    assert set(first) == set(second)
    assert first != second


# Files


@given(order=st.permutations(range(40)))
@settings(max_examples=20)
def test_what_is_held_out_does_not_depend_on_the_order_of_the_file(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    records = [{"prompt": f"question {n}", "key": f"q{n}"} for n in range(40)]
    sets = []
    for name, ordered in (("sorted", records), ("shuffled", [records[n] for n in order])):
        path = write_jsonl(folder / f"{name}.jsonl", ordered)
        task = build_task(prompts(path, test_fraction=0.3, id_field="key"), 0)
        held_out = {problem.content for problem in task.test(40)}
        assert held_out.isdisjoint(problem.content for problem in islice(task.train(0), task.num_train))
        assert len(held_out) + task.num_train == 40
        sets.append(held_out)
    assert sets[0] == sets[1]


def test_a_question_asked_twice_stands_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {n % 30}"} for n in range(60)])
    task = build_task(prompts(path, test_fraction=0.5), 0)
    train = {problem.content for problem in islice(task.train(0), task.num_train)}
    assert train.isdisjoint(problem.content for problem in task.test(60))


def test_a_small_file_holds_out_at_least_one_prompt(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    task = build_task(prompts(path, test_fraction=0.01), 0)
    assert (task.num_train, len(task.test(9))) == (1, 1)


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    records = [{"q": chat, "a": "4", "n": "first"}, {"q": chat[1:], "a": "5", "n": "second"}]
    write_jsonl(tmp_path / "p.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    fields = {"prompt_field": "q", "answer_field": "a", "id_field": "n", "test_fraction": 0.0}
    one, other = (build_task(prompts(tmp_path / f"p.{kind}", **fields), 0) for kind in ("jsonl", "parquet"))
    plain = [[(p.id, p.content, p.answer) for p in islice(task.train(0), 2)] for task in (one, other)]
    assert plain[0] == plain[1]
    first = next(p for p in one.train(0) if p.id == "p/first")
    assert first.content == (Message(role="system", content="Be brief."), Message(role="user", content="2+2?"))
    assert one.has_answers
    assert one.locate("p/second").endswith("p.jsonl, line 2")
    assert other.locate("p/second").endswith("p.parquet, row 2")


def test_gsm8k_takes_the_final_answer(tmp_path):
    solution = "She sells 48/2 = <<48/2=24>>24 clips.\n#### 1,024"
    path = write_jsonl(tmp_path / "g.jsonl", [{"question": "How many?", "answer": solution}])
    task = build_task(TaskConfig(kind="gsm8k", path=str(path), prompt_field="question", test_fraction=0), 0)
    problem = next(task.train(0))
    assert (problem.content, problem.answer, task.has_answers) == ("How many?", "1024", True)


GOOD = b'{"prompt": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b"", None, "has no records"),
        (b"\n\n", None, "has no records"),
        (GOOD + b'{"prompt": "x"\n', "line 2", "not JSON"),
        (GOOD + b'\n{"prompt": 3}\n', "line 3", r"'prompt' is a number \(3\), but must be a text"),
        (GOOD + b'["x"]\n', "line 2", "must be an object"),
        (GOOD + b'{"promt": "x"}\n', "line 2", "'prompt' is missing; found 'promt'"),
        (GOOD + b'{"prompt": null}\n', "line 2", "'prompt' is null"),
        (GOOD + b'{"prompt": "  "}\n', "line 2", "'prompt' is empty"),
        (GOOD + b'{"prompt": "caf\xe9"}\n', "line 2", "not UTF-8: byte 0xe9"),
        (GOOD + b'{"prompt": "a\0b"}\n', "line 2", "NUL byte"),
        (GOOD + b'{"prompt": "a\\u0000b"}\n', "line 2", "NUL character at position 2"),
        (GOOD + b'{"prompt": "a\\ud800b"}\n', "line 2", "surrogate pair"),
        (GOOD + b"[" * 100_000 + b"\n", "line 2", "not usable JSON"),
        (GOOD + b'{"prompt": []}\n', "line 2", "a chat without messages"),
        (GOOD + b'{"prompt": [{"role": "user"}]}\n', "line 2", r"message 1 has the fields \['role'\]"),
        (GOOD + b'{"prompt": [{"role": "bot", "content": "x"}]}\n', "line 2", "message 1 has the role a text"),
        (GOOD + b'{"prompt": [{"role": "user", "content": 7}]}\n', "line 2", "message 1, 'content' is a number"),
        (GOOD + b'{"prompt": [{"role": "assistant", "content": "x"}]}\n', "line 2", "ends with the role 'assistant'"),
        ("{}".encode("utf-16"), "line 1", "UTF-16"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(tmp_path, content, place, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        build_task(prompts(path), 0)
    assert str(caught.value).startswith(f"{path}, {place}: " if place else f"{path}: ")


@pytest.mark.parametrize(
    ("records", "changes", "words"),
    [
        ([{"prompt": "a", "k": "x"}, {"prompt": "b", "k": "x"}], {"id_field": "k"}, r"line 2: .*'x'.*line 1"),
        ([{"prompt": "a", "k": 1.5}], {"id_field": "k"}, r"line 1: field 'k' is a number \(1.5\)"),
        ([{"prompt": "a"}], {"answer_field": "answer"}, "line 1: field 'answer' is missing"),
        ([{"prompt": "a", "answer": True}], {"answer_field": "answer"}, "'answer' is true or false"),
        ([{"prompt": "a"}], {"test_fraction": 0.9}, "all 1 prompts are held out"),
    ],
)
def test_ids_answers_and_shares_are_checked(tmp_path, records, changes, words):
    path = write_jsonl(tmp_path / "p.jsonl", records)
    with pytest.raises(DataError, match=words):
        build_task(prompts(path, **changes), 0)


def test_files_that_are_not_there_or_not_theirs(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.path"):
        build_task(TaskConfig(kind="prompts"), 0)
    with pytest.raises(DataError, match="no such file"):
        build_task(prompts(tmp_path / "none.jsonl"), 0)
    (tmp_path / "p.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        build_task(prompts(tmp_path / "p.csv"), 0)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        build_task(prompts(tmp_path / "folder.jsonl"), 0)
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        build_task(prompts(tmp_path / "p.parquet"), 0)


def test_a_prompt_cannot_be_trained_on_and_held_out(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "c"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: .*test\.jsonl, line 2"):
        build_task(prompts(train, test_path=str(test)), 0)


def test_a_gsm8k_solution_without_its_marker_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "24 clips"}])
    with pytest.raises(DataError, match="line 1: field 'answer' has no final answer after '####'"):
        build_task(TaskConfig(kind="gsm8k", path=str(path), prompt_field="question"), 0)
