"""Self-consistency: an answer is as good as it is common (Wang et al. 2022, arXiv:2203.11171). Needs no reference."""

from __future__ import annotations

import operator
import threading
from typing import TYPE_CHECKING, Any

from actors.judges.reliability import Reliability
from actors.judges.verifier import MATH_TIMEOUT_S
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conf.schema import ScorerConfig
    from orchestrator.tally import Tally
    from orchestrator.types import Completion, RolloutGroup


class Majority:
    """Scores a completion by the share of its group's completions that have the same final answer.

    A completion that has none, or did not end by itself, is abstained on; it agrees with nobody, but counts among the
    completions.

    Args:
        name: of the way in which answers are found.
        extract: the final answer of a text, None where there is none.
        same: whether two answers are one.
    """

    def __init__(
        self,
        name: str,
        extract: Callable[[str], Any],
        same: Callable[[Any, Any], bool] = operator.eq,
    ) -> None:
        self.name = f"majority:{name}@1"
        self._extract, self._same = extract, same
        self._reliability = Reliability()

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`."""
        scored = [ScoredGroup(group=group, scores=self._scores(group), scorer=self.name) for group in groups]
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> Tally:
        """See `Judge.metrics`."""
        return self._reliability.report()

    def _scores(self, group: RolloutGroup) -> tuple[Score, ...]:
        answers = [self._answer(completion) for completion in group.completions]
        classes: list[list[Any]] = []
        owners: list[int | None] = []
        for answer in answers:
            owners.append(None if answer is None else self._class(answer, classes))
        return tuple(
            Score(value=None, reason="it has no final answer")
            if owner is None
            else Score(value=len(classes[owner]) / len(answers))
            for owner in owners
        )

    def _answer(self, completion: Completion) -> Any:
        ended = completion.finish_reason in (FinishReason.EOS, FinishReason.STOP)
        return self._extract(completion.text) if ended else None

    def _class(self, answer: Any, classes: list[list[Any]]) -> int:
        """The number of the class of this answer, which is put into it; a new one where it is like none."""
        for number, members in enumerate(classes):
            if self._same(members[0], answer):
                members.append(answer)
                return number
        classes.append([answer])
        return len(classes) - 1


def build_majority(config: ScorerConfig) -> Majority:
    """The vote over final answers as `scorer.verifier` finds them.

    Raises:
        ConfigError: `scorer.verifier` is a function, which says how good an answer is and not what it is.
    """
    match config.verifier:
        case "final_answer":
            return Majority("final_answer", lambda text: behind_marker(text, config.marker))
        case "exact":
            return Majority("exact", lambda text: text.strip() or None)
        case "math":
            return Majority("math", read_math, same_math)
        case other:
            raise ConfigError(
                f"scorer.verifier={other}: gives scorer.kind=majority no final answer: choose final_answer, exact or"
                " math"
            )


def behind_marker(text: str, marker: str) -> str | None:
    """What follows the last marker, spaces aside; None where there is no marker or nothing behind it."""
    _, found, answer = text.rpartition(marker)
    return (answer.strip() or None) if found else None


def read_math(text: str) -> Any:
    """The last number or formula of the text as math-verify reads it; None where there is none."""
    from math_verify import parse

    return parse(text, parsing_timeout=_time_limit()) or None


def same_math(first: Any, second: Any) -> bool:
    """Whether two answers of `read_math` are mathematically equal; one that takes too long to tell is not."""
    from math_verify import verify

    return bool(verify(first, second, timeout_seconds=_time_limit()))


def _time_limit() -> int | None:
    """math-verify breaks off by a signal alarm, which only the main thread can have."""
    return MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
