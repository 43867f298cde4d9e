"""What deaths say of the work that the dead had: which keys are suspected, and which are set aside for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SUSPECT_DEATHS = 2
"""From so many deaths on, a key is given to a worker alone: one by one takes long, and one death may be chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Poisoned:
    """In place of a result: work that kills whoever does it.

    Example: ``Poisoned(key="addition/train/17", deaths=3, last_words="Worker exit type: SYSTEM_ERROR ...")``
    """

    key: str
    deaths: int
    """Workers that died while it was in work; the last of them had nothing else."""
    last_words: str
    """Of that last one."""


class Blame:
    """Of the items of one call.

    Args:
        keys: of the items; None: nothing is ever held against them.
    """

    def __init__(self, keys: Sequence[str] | None) -> None:
        self._keys = keys
        self._deaths: Counter[str] = Counter()
        self._charged: list[frozenset[str]] = []
        """The suspects of each death that the restart budget has paid for."""
        self._poisoned: dict[str, Poisoned] = {}

    def keys_of(self, positions: Iterable[int]) -> frozenset[str]:
        """Of these items."""
        return frozenset() if self._keys is None else frozenset(self._keys[position] for position in positions)

    def found_out(self, keys: frozenset[str]) -> bool:
        """Whether one of them is set aside already."""
        return not self._poisoned.keys().isdisjoint(keys)

    def suspect(self, keys: frozenset[str]) -> None:
        """A worker died that had these."""
        self._deaths.update(keys)

    def charge(self, suspects: Iterable[frozenset[str]]) -> None:
        """The restart budget has paid for deaths."""
        self._charged += suspects

    def is_suspected(self, positions: Iterable[int]) -> bool:
        """Whether somebody died of one of these, perhaps."""
        return not self._deaths.keys().isdisjoint(self.keys_of(positions))

    def goes_alone(self, position: int) -> bool:
        """Whether an item is to be given to a worker that has nothing else."""
        return self._keys is not None and self._deaths[self._keys[position]] >= _SUSPECT_DEATHS

    def set_aside(self, key: str, last_words: str) -> tuple[Poisoned, int]:
        """What stands in place of its results, and how many deaths are to be given back to the restart budget."""
        self._poisoned[key] = Poisoned(key=key, deaths=self._deaths[key], last_words=last_words)
        forgiven = sum(key in suspects for suspects in self._charged)
        self._charged = [suspects for suspects in self._charged if key not in suspects]
        return self._poisoned[key], forgiven

    def word_on(self, position: int) -> Poisoned | None:
        """In place of an item's result, if its key is set aside."""
        return None if self._keys is None else self._poisoned.get(self._keys[position])
