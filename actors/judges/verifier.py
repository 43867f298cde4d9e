"""Judges by rule: a completion is right (1) or wrong (0).

The rules with a reference answer also ask that the completion ended by itself: one that was cut off is wrong, however
it begins, since a policy would otherwise learn to ramble on after its answer. An aborted completion is nobody's fault
and is not judged.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import TYPE_CHECKING

from actors.judges.unit_tests import TestScorer
from actors.judges.user_function import FunctionScorer
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from conf.schema import ScorerConfig
    from orchestrator.types import Completion, Prompt, RolloutGroup

    Rule = Callable[[str, str], bool]
    """(text of the completion, reference answer) -> whether it is right; raises Undecided."""

MATH_TIMEOUT_S = 5
_WORDS = re.compile(r"[A-Za-z][A-Za-z\s'-]+")


class Undecided(Exception):  # noqa: N818 - it is no error, but an answer
    """A rule cannot say; the reason is the argument."""


class RuleScorer:
    """Compares each completion with the prompt's reference answer."""

    def __init__(self, name: str, rule: Rule) -> None:
        self.name = name
        self._rule = rule

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """See `Scorer.score`."""
        scores = tuple(self._judge(group.prompt, completion) for completion in group.completions)
        return ScoredGroup(group=group, scores=scores, scorer=self.name)

    def _judge(self, prompt: Prompt, completion: Completion) -> Score:
        if prompt.answer is None:
            return Score(value=None, reason="the prompt has no reference answer")
        if completion.finish_reason is FinishReason.ABORTED:
            return Score(value=None, reason="the completion was aborted")
        ended = completion.finish_reason is not FinishReason.LENGTH
        try:
            return Score(value=float(ended and self._rule(completion.text, prompt.answer)))
        except Undecided as undecided:
            return Score(value=None, reason=str(undecided))


def build_verifier(config: ScorerConfig) -> RuleScorer | FunctionScorer | TestScorer:
    """The verifier of `scorer.verifier`. Raises ConfigError where it is not known or its function cannot be used."""
    if config.verifier == "function":
        return FunctionScorer(config)
    if config.verifier == "tests":
        return TestScorer(config)
    rules: dict[str, Rule] = {
        "final_answer": lambda text, answer: final_answer(text, answer, marker=config.marker),
        "exact": exact,
        "math": math_equal,
    }
    if config.verifier not in rules:
        known = ", ".join([*rules, "tests", "function"])
        raise ConfigError(f"scorer.verifier={config.verifier!r} is not known; choose one of {known}.")
    if config.verifier == "final_answer" and not config.marker:
        raise ConfigError("scorer.verifier=final_answer needs scorer.marker, the text that the final answer follows.")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each call that a timeout is off
    return RuleScorer(f"verifier:{config.verifier}@1", rules[config.verifier])


def final_answer(text: str, answer: str, *, marker: str) -> bool:
    """Whether what follows the last `marker` is the answer, spaces around it aside."""
    _, found, final = text.rpartition(marker)
    return bool(found) and final.strip() == answer.strip()


def exact(text: str, answer: str) -> bool:
    """Whether the whole text is the answer, spaces around it aside."""
    return text.strip() == answer.strip()


def math_equal(text: str, answer: str) -> bool:
    """Whether the last number or formula of the text equals the answer, by math-verify.

    A policy may write a number that no computer can evaluate. math-verify breaks off by a signal alarm, which only the
    main thread can have (where Ray runs the methods of an actor); elsewhere it runs without a limit, and
    `scorer.deadline_s` is what remains.

    Raises:
        Undecided: the reference is a word or nothing that math-verify can read, or the comparison took too long.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    if exact(text, answer):
        return True
    if _WORDS.fullmatch(answer.strip()):  # math-verify would take a word for a product of its letters
        raise Undecided(f"the reference answer {answer!r} is no mathematics")

    limit = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    # Dollar signs say that the reference is mathematics as a whole: `1/2` is a fraction and not the number 2.
    try:
        expected = parse(f"${answer}$", parsing_timeout=limit, raise_on_error=True)
        if not expected:
            raise Undecided(f"the reference answer {answer!r} is no mathematics")
        found = parse(text, parsing_timeout=limit)
        return bool(verify(expected, found, timeout_seconds=limit, raise_on_error=True))
    except TimeoutException:
        raise Undecided(f"the comparison took over {MATH_TIMEOUT_S} s") from None
    except Undecided:
        raise
    except Exception as error:  # SymPy raises what it likes on what others wrote
        raise Undecided(f"math-verify fails on {answer!r}: {type(error).__name__}") from error
