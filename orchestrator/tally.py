"""Figures that are gathered in parts: each knows how to join what it is of one wave with what it is of the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_MEAN, _SUM, _MAX = "mean", "sum", "max"


class Tally(Mapping[str, float]):
    """Scalars by name, which join with `+` as if all of it had been counted at once.

    Example: ``tally.mean("judge/tie_fraction", [True, False]); tally["judge/tie_fraction"] == 0.5``
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, float, float]] = {}
        """By name: how it joins, the value (of a mean: the sum), the number of things it is a mean of."""

    def mean(self, name: str, values: Iterable[float]) -> None:
        """The mean of `values`; nothing where there are none."""
        listed = [float(value) for value in values]
        if listed:
            self._parts[name] = (_MEAN, sum(listed), len(listed))

    def ratio(self, name: str, part: float, whole: float) -> None:
        """`part` of `whole`; nothing where the whole is 0."""
        if whole:
            self._parts[name] = (_MEAN, float(part), float(whole))

    def sum(self, name: str, value: float) -> None:
        """A count."""
        self._parts[name] = (_SUM, float(value), 1)

    def max(self, name: str, value: float) -> None:
        """The largest of something."""
        self._parts[name] = (_MAX, float(value), 1)

    def __add__(self, other: Tally) -> Tally:
        joined = Tally()
        joined._parts = dict(self._parts)
        for name, (how, value, count) in other._parts.items():
            known = joined._parts.get(name)
            if known is None:
                joined._parts[name] = (how, value, count)
            elif how == _MAX:
                joined._parts[name] = (how, max(known[1], value), 1)
            else:
                joined._parts[name] = (how, known[1] + value, known[2] + count)
        return joined

    def __getitem__(self, name: str) -> float:
        how, value, count = self._parts[name]
        return value / count if how == _MEAN else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Tally({dict(self)})"

    def renamed(self, old: str, new: str) -> Tally:
        """The same figures with the first `old` of each name replaced by `new`."""
        tally = Tally()
        tally._parts = {name.replace(old, new, 1): part for name, part in self._parts.items()}
        return tally

    def dump(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {name: list(part) for name, part in self._parts.items()}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Tally:
        """What `dump` gave."""
        tally = cls()
        tally._parts = {name: (str(how), float(value), float(count)) for name, (how, value, count) in dumped.items()}
        return tally
