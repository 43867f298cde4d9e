"""What `tests/fuzz.py` fuzzes: for each reader valid inputs to start from, and what must hold of what it accepts."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import xxhash

from actors.judges.reading import Words
from actors.judges.verdicts import parse_choice, parse_score
from conf.compose import compose, flatten, resolved_yaml
from conf.layers import groups, knobs
from conf.schema import TaskConfig
from conf.validate import problems
from launch.model_files import read_header
from learners.manifest import check_content, check_sizes
from orchestrator.tasks import build_task
from orchestrator.types import Completion, FinishReason, SamplingParams
from tests.records import V0

NASTY = [
    *(
        "",
        " ",
        "\0",
        "\n",
        "\r\n",
        "\u2028",
        "\ufeff",
        "\ud800",
        "\U0001f600",
        "\x1b[2J",
        "../../etc/passwd",
        "${seed}",
    ),
    *(
        "${oc.env:HOME}",
        "???",
        "null",
        "1e999",
        "-0",
        "NaN",
        "Infinity",
        "9" * 400,
        "9" * 5000,
        "0x10",
        "1_000",
        "[" * 2000,
    ),
    *("{}", "[]", "true", "!!python/object:os.system", "&a [*a]", "Score: 5", "Verdict: A", "**", "\uff15", "\u0665"),
]
VALUES = [
    *NASTY,
    None,
    True,
    False,
    0,
    -1,
    1,
    2**63,
    2**64,
    10**30,
    1.5,
    -0.0,
    math.inf,
    math.nan,
    [],
    {},
    [[]],
    [None],
]


@dataclass(frozen=True)
class Target:
    """A reader under test."""

    share: float
    """Of all inputs."""
    inputs_a_case: int
    cases: Callable[[Random, Path], Iterator]
    run: Callable[..., int]
    """Reads a case; the number of inputs accepted. An AssertionError is a wrong acceptance."""


def damaged(data: bytes, random: Random) -> bytes:
    """Bytes after one to three cuts, repeats, splices or changes."""
    for _ in range(random.randint(1, 3)):
        at, to = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
        match random.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[to:]
            case 2:
                data = data[:to] + data[at:]
            case 3:
                data = data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
            case 4:
                data = data[:at] + random.choice(NASTY).encode("utf-8", "surrogatepass") + data[at:]
            case _:
                data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :] if at < to else data
    return data


def changed(value, random):
    """A JSON value with something in it replaced, dropped or added."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        match random.randrange(5):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return {**value, random.choice(NASTY): random.choice(VALUES)}
            case _:
                return {**value, key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        return [*value[:at], changed(value[at], random), *value[at + random.randrange(2) :]]
    return random.choice(VALUES)


# Prompt files: the first line of each is good, so that what a case asks is the second.

GOOD = b'{"id": "good", "prompt": "fine", "answer": "1"}\n'
RECORDS = [
    {"id": "q1", "prompt": "What is 1 + 1?", "answer": "2"},
    {
        "id": 17,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "answer": 4,
    },
    {"id": "gut", "prompt": "caf\u00e9 \U0001f600\n", "answer": "\u4e8c"},
]


def prompt_cases(random, folder):
    while True:
        record = random.choice(RECORDS)
        if random.random() < 0.6:
            record = changed(record, random)
        line = json.dumps(record, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
        if random.random() < 0.5:
            line = damaged(line, random)
        yield folder / "prompts.jsonl", GOOD + line + random.choice((b"\n", b"", b"\r\n", b"\n" + line))


def read_prompts(case):
    path, content = case
    path.write_bytes(content)
    fields = {"id_field": "id", "answer_field": "answer", "test_fraction": 0.0}
    task = build_task(TaskConfig(kind="prompts", path=str(path), **fields), 0)
    stream = task.train(0)
    found = [next(stream) for _ in range(task.num_train)]
    assert len({problem.id for problem in found}) == len(found)
    for problem in found:
        texts = [problem.content] if isinstance(problem.content, str) else [turn.content for turn in problem.content]
        for text in (*texts, problem.answer, problem.id):
            assert isinstance(text, str)
            assert text.strip()
            assert "\0" not in text
            text.encode()
        assert task.locate(problem.id).startswith(f"{path}, line ")
    return task.num_train - 1


# Judges' words

REPLIES = [
    "It is right.\n\nScore: 4",
    "Score: 3.5 / 5.",
    "**Score:** 5",
    "A is better.\nVerdict: A",
    "*Verdict: tie*",
    "B",
]
_READ = Words(None, parse_score, SamplingParams(max_tokens=9), votes=1, seed=0)


def verdict_cases(random, _):
    while True:
        yield damaged(random.choice(REPLIES).encode(), random).decode("utf-8", "surrogateescape")


def read_verdicts(reply):
    """A number must stand in the last line, as it was written there, and within its scale."""
    last = reply.strip().split("\n")[-1]
    points, first = parse_score(reply), parse_choice(reply)
    if points is not None:
        assert 0 <= points <= 5
        written = re.findall(r"[0-9]+(?:\.[0-9]+)?", last.replace("*", ""))
        assert points in map(float, written)
        assert "score" in last.replace("*", "").lower()
    if first is not None:
        word = re.search(r"(?i)verdict\s*:\s*(a|b|tie)", last.replace("*", ""))[1].lower()
        assert first == {"a": 1.0, "tie": 0.5, "b": 0.0}[word]
    assert points is None or first is None
    for finish in (FinishReason.EOS, FinishReason.LENGTH):
        completion = Completion(token_ids=(1,), text=reply, logprobs=(0.0,), finish_reason=finish, policy=V0)
        verdict = _READ._verdict(completion)
        assert verdict.value == (points if finish is FinishReason.EOS else None)
        assert (verdict.value is None) == bool(verdict.failure)
        assert len(verdict.failure) < 2500
    return (points is not None) + (first is not None)


# Configurations


def config_cases(random, folder):
    keys, choices = list(knobs()), [f"{group}={choice}" for group, found in groups().items() for choice in found]
    whole = resolved_yaml(compose([])).encode()
    while True:
        if random.random() < 0.9:
            given = []
            for _ in range(random.randint(1, 3)):
                if random.random() < 0.2:
                    given.append(random.choice(choices))
                else:
                    key = random.choice(keys)
                    usual = [*knobs()[key].choices, str(random.randint(-2, 500)), str(random.random())]
                    given.append(f"{key}={random.choice([*usual, random.choice(NASTY)])}")
            if random.random() < 0.2:
                given = [
                    damaged(each.encode("utf-8", "surrogatepass"), random).decode(errors="replace") for each in given
                ]
            yield given, None, None
        else:
            yield [], folder / "config.yaml", damaged(whole, random)


def read_configs(case):
    """Accepted values are within their limits, none is of the environment, and what is written is read back."""
    given, path, content = case
    if path is not None:
        path.write_bytes(content)
    config = compose(given, path)
    assert not problems(config)
    flat = flatten(
        {**config.__dict__} | {name: vars(part) for name, part in vars(config).items() if hasattr(part, "__dict__")}
    )
    for value in flat.values():
        assert not isinstance(value, float) or math.isfinite(value)
        assert "${oc." not in str(value)
    return 1


# Checkpoints

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
TRAINER = {"step": 3, "rng": [1, 2, 3], "name": "x"}


def checkpoint_cases(random, folder):
    folder = folder / "checkpoint"
    folder.mkdir()
    while True:
        header = changed(HEADER, random) if random.random() < 0.6 else HEADER
        whole = {"weights.safetensors": written(header), "trainer.json": json.dumps(TRAINER).encode()}
        records = {name: {"size": len(data), "digest": xxhash.xxh3_64_hexdigest(data)} for name, data in whole.items()}
        manifest = {"files": changed(records, random) if random.random() < 0.3 else records}
        files = {**whole, "manifest.json": json.dumps(manifest).encode()}
        for name in files:
            if random.random() < 0.3:
                files[name] = damaged(files[name], random)
        yield folder, files


def written(header):
    table = json.dumps(header).encode()
    return struct.pack("<Q", len(table)) + table + bytes(22)


def read_checkpoints(case):
    """Only what was written is accepted, and tensors of an accepted file lie within it, one behind the other."""
    folder, files = case
    for name, data in files.items():
        (folder / name).write_bytes(data)
    records = check_sizes(folder)
    check_content(folder, records, sorted(records))
    assert all(xxhash.xxh3_64_hexdigest(files[name]) == record.digest for name, record in records.items())
    weights = files["weights.safetensors"]
    shapes = read_header(folder / "weights.safetensors")
    length = int.from_bytes(weights[:8], "little")
    table = json.loads(weights[8 : 8 + length])
    for name, shape in shapes.items():
        begin, end = table[name]["data_offsets"]
        assert 0 <= begin <= end <= len(weights) - 8 - length
        assert all(type(size) is int and size >= 0 for size in shape)
    assert (
        sum(end - begin for begin, end in (table[name]["data_offsets"] for name in shapes)) == len(weights) - 8 - length
    )
    return 1


TARGETS = {
    "prompts": Target(0.4, 1, prompt_cases, read_prompts),
    "verdicts": Target(0.45, 1, verdict_cases, read_verdicts),
    "configs": Target(0.01, 1, config_cases, read_configs),
    "checkpoints": Target(0.14, 1, checkpoint_cases, read_checkpoints),
}
