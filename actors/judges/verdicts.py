"""What a judge's words mean: the verdict is the last line of its reply, or there is none.

A judge quotes what it judges. Only a last line that is a verdict and nothing else counts, so that no quotation before
it does; and a reply that was cut off has no last line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_POINTS = 5
"""Of the additive rubric (Yuan et al. 2024, arXiv:2401.10020, figure 2)."""

_SCORE = re.compile(r"score\s*:\s*(\d{1,3}(?:\.\d{1,6})?)(?:\s*/\s*5)?\.?", re.IGNORECASE | re.ASCII)
_CHOICE = re.compile(r"verdict\s*:\s*(A|B|tie)\.?", re.IGNORECASE | re.ASCII)
_FIRST_WINS = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One judgement of one question, or why there is none.

    Example: ``Verdict(value=4.0)`` or ``Verdict(value=None, failure="no verdict in its last line: 'A nice answer.'")``
    """

    value: float | None
    """Points in [0, 5], or the probability in [0, 1] that the answer that was shown first is the better one."""
    failure: str = ""
    """What the judge said instead; empty where there is a value."""


def parse_score(reply: str) -> float | None:
    """Points of a last line `Score: <n>` with n in [0, 5]; None for anything else."""
    found = _SCORE.fullmatch(_last_line(reply))
    if found is None:
        return None
    points = float(found[1])
    return points if points <= MAX_POINTS else None


def parse_choice(reply: str) -> float | None:
    """1, 0 or 1/2 (first, second, tie) of a last line `Verdict: A|B|tie`; None for anything else."""
    found = _CHOICE.fullmatch(_last_line(reply))
    return None if found is None else _FIRST_WINS[found[1].lower()]


def _last_line(reply: str) -> str:
    """The last line that is not blank, without emphasis. Only a newline ends a line: quoted text holds other signs."""
    return reply.strip().rpartition("\n")[2].replace("*", "").strip()
