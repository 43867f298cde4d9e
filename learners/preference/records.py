"""What a preference model reads: one prompt with its answers, and which of them are compared.

Shapes: K answers of a group, P comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two answers of one group. Example: ``Comparison(first=0, second=3, label=1.0)``."""

    first: int
    second: int
    label: float = 1.0
    """Probability that `first` is the better one; only training reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt with K answers, in tokens of the preference model.

    Example: ``Group(prompt=(1, 8, 6, 17), answers=((9, 2), (4, 2)), comparisons=(Comparison(first=0, second=1),))``
    """

    prompt: Tokens
    answers: tuple[Tokens, ...]
    comparisons: tuple[Comparison, ...]
    """[P]"""
