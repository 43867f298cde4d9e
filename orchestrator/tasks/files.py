"""Tasks from files: prompts of one's own, and GSM8K.

A held-out file may be given; otherwise a share of the training file is held out by a hash of each prompt, so that the
choice depends neither on the order of the file nor on how a problem is called, and one question asked twice never
stands on both sides.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from orchestrator.errors import ConfigError, DataError
from orchestrator.tasks.base import Message, Problem
from orchestrator.tasks.records import SHOWN, describe, read_records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conf.schema import TaskConfig
    from orchestrator.tasks.records import Record

ROLES = ("system", "user", "assistant", "tool")
GSM8K_MARKER = "####"
HASH_RANGE = 2**64


class FileTask:
    """Problems of a file, or of a training and a test file.

    Args:
        config: Names the files, their fields and the share to hold out.
        seed: Orders the training stream.

    Raises:
        ConfigError: `task.path` is not set.
        DataError: A file or a record in it is refused; the message says where and what would be right.
    """

    def __init__(self, config: TaskConfig, *, seed: int = 0) -> None:
        if config.path is None:
            raise ConfigError(f"task.kind={config.kind} needs task.path, a .jsonl or .parquet file with the prompts.")
        self.name = Path(config.path).stem
        self.seed = seed
        self.has_answers = config.kind == "gsm8k" or config.answer_field is not None
        problems = _load(Path(config.path), config, prefix=self.name)
        if config.test_path is None:
            self._train, self._test = _hold_out(problems, config.test_fraction)
        else:
            self._train = problems
            self._test = _load(Path(config.test_path), config, prefix=f"{self.name}/test")
            _refuse_overlap(self._train, self._test)
        if not self._train:
            raise DataError(
                f"{config.path}: all {len(problems)} prompts are held out and none is left to train on. "
                "Give more prompts, a lower task.test_fraction, or held-out prompts of their own in task.test_path."
            )
        self.num_train = len(self._train)
        self._sources = {problem.id: problem.source for problem in (*self._train, *self._test)}

    def train(self, cursor: int) -> Iterator[Problem]:
        """See `Task.train`."""
        while True:
            epoch, start = divmod(cursor, self.num_train)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_train)
            for index in order[start:]:
                yield self._train[index]
            cursor = (epoch + 1) * self.num_train

    def tuning(self, n: int) -> list[Problem]:
        """See `Task.tuning`. Files are too precious for a third part: these may be trained on as well."""
        return sorted(self._train, key=_hash)[:n]

    def test(self, n: int) -> list[Problem]:
        """See `Task.test`. Empty where `task.test_fraction` is 0."""
        return sorted(self._test, key=_hash)[:n]

    def locate(self, problem_id: str) -> str:
        """See `Task.locate`."""
        return self._sources[problem_id]


_OTHERWISE = ", or name the right field in `task`; where no record has an answer, task.answer_field=null"


def _load(path: Path, config: TaskConfig, prefix: str) -> list[Problem]:
    """All problems of a file; their ids are unique within it and carry `prefix`."""
    parse = _parse_gsm8k if config.kind == "gsm8k" else _parse_prompt
    problems: dict[str, Problem] = {}
    for found in read_records(path):
        record = replace(found, otherwise=_OTHERWISE)
        key = f"{prefix}/{_id(record, config)}"
        if key in problems:
            raise record.error(
                f"the id {_id(record, config)!r} in field {config.id_field!r} was used before "
                f"({problems[key].source}); ids must be unique."
            )
        content, answer = parse(record, config)
        problems[key] = Problem(id=key, content=content, answer=answer, source=record.place)
    return list(problems.values())


def _id(record: Record, config: TaskConfig) -> str:
    if config.id_field is None:
        return str(record.number)
    value = record.value(config.id_field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return record.clean(value, f"field {config.id_field!r}")


def _parse_prompt(record: Record, config: TaskConfig) -> tuple[str | tuple[Message, ...], str | None]:
    content = parse_content(record, config.prompt_field)
    return content, None if config.answer_field is None else _parse_answer(record, config.answer_field)


def parse_content(record: Record, field: str) -> str | tuple[Message, ...]:
    """The text or chat in a field of a record. Raises DataError saying what is wrong with it."""
    value = record.value(field)
    where = f"field {field!r}"
    return _parse_chat(record, value, where) if isinstance(value, list) else record.clean(value, where)


def _parse_chat(record: Record, turns: list[Any], where: str) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        what = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise record.error(f"{what} is {describe(turn)}, but must be an object with 'role' and 'content'.")
        known = {key: value for key, value in turn.items() if value is not None}
        if set(known) != {"role", "content"}:
            raise record.error(f"{what} has the fields {sorted(known)}, but must have 'role' and 'content' alone.")
        if known["role"] not in ROLES:
            raise record.error(f"{what} has the role {describe(known['role'])}; known are {', '.join(ROLES)}.")
        messages.append(Message(role=known["role"], content=record.clean(known["content"], f"{what}, 'content'")))
    if not messages:
        raise record.error(f"{where} is a chat without messages.")
    if messages[-1].role not in ("user", "tool"):
        raise record.error(
            f"{where} ends with the role {messages[-1].role!r}; the model can only answer a user or tool."
        )
    return tuple(messages)


def _parse_answer(record: Record, field: str) -> str:
    value = record.value(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return record.clean(value, f"field {field!r}").strip()


def _parse_gsm8k(record: Record, config: TaskConfig) -> tuple[str, str]:
    answer_field = config.answer_field or "answer"
    question, solution = record.text(config.prompt_field), record.text(answer_field)
    _, marker, final = solution.rpartition(GSM8K_MARKER)
    answer = final.strip().replace(",", "")
    if not marker or not answer:
        raise record.error(
            f"field {answer_field!r} has no final answer after {GSM8K_MARKER!r}: it ends in {solution[-SHOWN:]!r}. "
            "A GSM8K solution ends in a line such as '#### 72'."
        )
    return question, answer


def _hold_out(problems: list[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems; where a fraction is asked for at least one prompt is held out."""
    if fraction == 0:
        return problems, []
    bound = max(fraction * HASH_RANGE, min(map(_hash, problems)) + 1)
    train = [problem for problem in problems if _hash(problem) >= bound]
    return train, [problem for problem in problems if _hash(problem) < bound]


def _refuse_overlap(train: list[Problem], test: list[Problem]) -> None:
    """Raises DataError when a held-out prompt is also a training prompt."""
    held_out = {problem.content: problem for problem in test}
    shared = [problem for problem in train if problem.content in held_out]
    if shared:
        raise DataError(
            f"{shared[0].source}: the same prompt is held out for the test ({held_out[shared[0].content].source}); "
            f"{len(shared)} training prompts are. Remove them from one of the two files."
        )


def _hash(problem: Problem) -> int:
    """A number in [0, 2**64) that depends on the prompt alone."""
    content = problem.content
    plain = content if isinstance(content, str) else json.dumps([[turn.role, turn.content] for turn in content])
    return xxhash.xxh3_64_intdigest(plain.encode())
