r"""Column addition, one step a line: a reasoning task that needs no data and can be verified.

    question   5305+2471\n
    solution   5+1+0=06\n0+7+0=07\n3+4+0=07\n5+2+0=07\n#07776

Each line adds one column, from the right: digit + digit + carry = two digits. The final answer follows ``#``.

Train, tuning, demonstration and test problems are disjoint by construction. A keyed bijection hashes the operand pair
(a, b) to a slot (row, column); the row modulo 10 decides the split. Because the hash can be inverted, each split can
also be counted through without repetition and entered anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from random import Random
from typing import TYPE_CHECKING

import xxhash

from orchestrator.tasks.base import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

# Residues of the slot's row modulo 10 that belong to each split.
SPLITS = {"test": (0,), "tuning": (1,), "demonstrations": (2,), "train": (3, 4, 5, 6, 7, 8, 9)}
ROUNDS = 4
WRONG_SUMS = 0.8  # share of all slips
SLIPS = (0.0, 0.3, 0.6)
"""Shares of flawed lines in the solutions that teach judging: far more than a policy makes, so that they teach fast."""


def worked_solution(a: int, b: int, digits: int) -> str:
    """The column-by-column solution of ``a + b``, final answer included."""
    lines, carry = [], 0
    for place in range(digits):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        lines.append(f"{left}+{right}+{carry}={total:02d}\n")
        carry = total // 10
    return "".join(lines) + "#" + format_answer(a + b, digits)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedStep:
    """One line of a solution and what a careful reader says of it.

    Example: ``JudgedStep(line="0+7+0=08", result="07", right=False)``
    """

    line: str
    """Without its line end."""
    result: str
    """What should stand behind its ``=`` or ``#``, given the question and the lines before."""
    right: bool


def flawed_solution(a: int, b: int, digits: int, *, rate: float, random: Random) -> list[JudgedStep]:
    """A solution with slips, judged line by line.

    Most slips are sums that are a little off, as a policy's are; the others are wrong digits that are added up rightly.
    What is written is carried on.

    Args:
        a: first summand.
        b: second summand.
        digits: of each.
        rate: probability of a slip in a column; a quarter of that in the final answer.
        random: draws them.
    """
    steps, carry, written = [], 0, ""
    for place in range(digits):
        figures = [a // 10**place % 10, b // 10**place % 10, carry]
        right = total = sum(figures)
        slipped = random.random() < rate
        if slipped and random.random() < WRONG_SUMS:
            total = random.choice([near for off in (-10, -2, -1, 1, 2, 10) if 0 <= (near := total + off) < 20])
        elif slipped:
            where = random.randrange(2)
            figures[where] = (figures[where] + random.randrange(1, 10)) % 10
            total = sum(figures)
        line = f"{figures[0]}+{figures[1]}+{figures[2]}={total:02d}"
        steps.append(JudgedStep(line=line, result=f"{right:02d}", right=not slipped))
        carry, written = total // 10, f"{total % 10}{written}"
    right_answer = answer = f"{carry}{written}"
    if random.random() < rate / 4:
        where = random.randrange(len(answer))
        wrong = (int(answer[where]) + random.randrange(1, 10)) % 10
        answer = f"{answer[:where]}{wrong}{answer[where + 1 :]}"
    return [*steps, JudgedStep(line=f"#{answer}", result=right_answer, right=answer == right_answer)]


def format_answer(total: int, digits: int) -> str:
    """The sum, zero-padded to one digit more than the summands have."""
    return f"{total:0{digits + 1}d}"


class AdditionTask:
    """Addition of two zero-padded numbers; see the module for the format and the splits.

    Args:
        digits: Digits of each summand, 1 to 9.
        seed: Orders the training stream. The splits, and the order of the other three, do not depend on it.
    """

    name = "addition"
    has_answers = True

    def __init__(self, *, digits: int = 4, seed: int = 0) -> None:
        self.digits = digits
        self.seed = seed
        self.base: int = 10**digits
        self.num_train = self._size("train")

    def train(self, cursor: int) -> Iterator[Problem]:
        """See `Task.train`."""
        while True:
            epoch, position = divmod(cursor, self.num_train)
            yield self._problem("train", position, f"{self.seed}/{epoch}")
            cursor += 1

    def tuning(self, n: int) -> list[Problem]:
        """See `Task.tuning`."""
        return self._first("tuning", n, "fixed")

    def test(self, n: int) -> list[Problem]:
        """See `Task.test`. The settings in `conf/tuned/` were chosen on other problems of this split."""
        return self._first("test", n, "unseen")

    def demonstrations(self, n: int, seed: int) -> list[tuple[Problem, str]]:
        """Up to n problems with worked solutions for a warm start; no other split has them."""
        problems = self._first("demonstrations", n, str(seed))
        return [(problem, self._solve(problem)) for problem in problems]

    def judged_solutions(self, n: int, seed: int) -> list[tuple[Problem, list[JudgedStep]]]:
        """Problems with solutions that are judged line by line, a third of them without a slip.

        They come from the problems of `demonstrations`, and teach judging in a warm start.
        """
        random, problems = Random(f"judged/{seed}"), self._first("demonstrations", n, f"judged/{seed}")
        return [
            (problem, flawed_solution(*self._summands(problem), self.digits, rate=random.choice(SLIPS), random=random))
            for problem in problems
        ]

    def locate(self, problem_id: str) -> str:
        """See `Task.locate`."""
        return f"generated problem {problem_id}"

    def split_of(self, a: int, b: int) -> str:
        """The split to which the problem ``a+b`` belongs."""
        for step in range(ROUNDS):
            a, b = b, (a + self._mix(step, b)) % self.base
        return next(split for split, residues in SPLITS.items() if a % 10 in residues)

    def _operands(self, row: int, column: int) -> tuple[int, int]:
        """The operands whose hash is (row, column): the Feistel rounds of `split_of`, backwards."""
        a, b = row, column
        for step in reversed(range(ROUNDS)):
            a, b = (b - self._mix(step, a)) % self.base, a
        return a, b

    def _mix(self, step: int, value: int) -> int:
        return int(xxhash.xxh3_64_intdigest(value.to_bytes(8, "little"), seed=step))

    def _size(self, split: str) -> int:
        return len(SPLITS[split]) * (self.base // 10) * self.base

    def _problem(self, split: str, position: int, order: str) -> Problem:
        """The problem at `position` of the split under one of its orders (a full cycle through all its slots)."""
        size, residues = self._size(split), SPLITS[split]
        start = xxhash.xxh3_64_intdigest(f"{split}/{order}/start".encode()) % size
        stride = xxhash.xxh3_64_intdigest(f"{split}/{order}/stride".encode()) % size
        while gcd(stride, size) != 1:
            stride += 1
        block, column = divmod((start + position * stride) % size, self.base)
        tens, unit = divmod(block, len(residues))
        a, b = self._operands(10 * tens + residues[unit], column)
        question = f"{a:0{self.digits}d}+{b:0{self.digits}d}"
        return Problem(
            id=f"addition/{question}",
            content=question + "\n",
            answer=format_answer(a + b, self.digits),
            source="generated",
        )

    def _first(self, split: str, n: int, order: str) -> list[Problem]:
        return [self._problem(split, position, order) for position in range(min(n, self._size(split)))]

    def _solve(self, problem: Problem) -> str:
        return worked_solution(*self._summands(problem), self.digits)

    def _summands(self, problem: Problem) -> tuple[int, int]:
        a, b = problem.id.removeprefix("addition/").split("+")
        return int(a), int(b)
