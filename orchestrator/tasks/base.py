"""What a task is: problems with an order that can be resumed, and problems that are held out.

A problem is a question before any template or tokenizer has touched it; `orchestrator/prompts.py` turns it into a
`Prompt`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat. Example: ``Message(role="user", content="What is 2+2?")``."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    r"""One question.

    Example: ``Problem(id="addition/5305+2471", content="5305+2471\n", answer="07776", source="addition")``
    """

    id: str
    """Unique within the task and stable across runs."""
    content: str | tuple[Message, ...]
    """A text, or the turns of a chat that the model is to continue."""
    answer: str | None = None
    """Reference answer for verifiers; None when the task has none."""
    source: str
    """Where it came from, for messages to people: ``prompts.jsonl, line 17``."""


class Task(Protocol):
    """A source of problems."""

    name: str
    has_answers: bool
    """Whether every problem has a reference answer."""
    num_train: int
    """Problems of one epoch of `train`."""

    def train(self, cursor: int) -> Iterator[Problem]:
        """The endless training stream from its `cursor`-th problem on (0 is the first).

        The order depends on the task's seed and is drawn anew in each epoch of `num_train` problems; within an epoch
        no problem comes twice. ``train(k)`` is what ``train(0)`` yields after k problems: a cursor is all there is to
        save.
        """

    def tuning(self, n: int) -> list[Problem]:
        """Up to n problems, none of them a test problem, on which settings may be chosen. The same for every seed."""

    def test(self, n: int) -> list[Problem]:
        """Up to n held-out problems, which `train` never yields. The same for every seed."""

    def locate(self, problem_id: str) -> str:
        """Where a problem came from (`Problem.source`), for messages to people."""
