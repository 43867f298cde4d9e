"""The batches of an iteration, as its pairs come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf.objectives import OBJECTIVES
from orchestrator import batching
from orchestrator.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conf.schema import Config
    from orchestrator.types import PreferencePair


class BatchPlan:
    """Which pairs are trained on together, and in which order: the same for the same parts, whenever they come.

    The last batch of a part waits for the next part, whose pairs fill it up. Passes over the pairs behind the first one
    are made when all of them are there.

    Args:
        config: of the run.
        iteration: number of the iteration.
        parts: its pairs.
        note: told of all batches so far whenever there are more.
    """

    def __init__(
        self,
        config: Config,
        iteration: int,
        parts: Iterator[Sequence[PreferencePair]],
        note: Callable[[int, Sequence[Sequence[PreferencePair]]], None],
    ) -> None:
        self.batches: list[list[PreferencePair]] = []
        self.is_complete = False
        self._config = config
        self._iteration = iteration
        self._parts = parts
        self._note = note
        self._num_parts = 0
        self._pairs: list[PreferencePair] = []
        self._waiting: list[PreferencePair] = []

    def more(self) -> bool:
        """Waits for pairs until there are more batches; False where there will be none. Raises what `parts` raises."""
        before = len(self.batches)
        while len(self.batches) == before and not self.is_complete:
            part = next(self._parts, None)
            if part is None:
                self._finish()
            else:
                self._add(part)
        self._note(self._iteration, self.batches)
        return len(self.batches) > before

    def reaches(self, number: int) -> bool:
        """Whether there is a batch of this number; waits for pairs where that is not known yet."""
        while number >= len(self.batches) and self.more():
            pass
        return number < len(self.batches)

    def complete(self) -> None:
        """Waits for all pairs."""
        while self.more():
            pass

    def _add(self, part: Sequence[PreferencePair]) -> None:
        self._pairs += part
        *ready, self._waiting = self._cut([*self._waiting, *part], self._num_parts) or [[]]
        self.batches += ready
        self._num_parts += 1

    def _finish(self) -> None:
        self.is_complete = True
        if self._waiting:
            self.batches.append(self._waiting)
        for epoch in range(1, self._config.learner.epochs):
            self.batches += self._cut(self._pairs, 0, epoch)

    def _cut(self, pairs: Sequence[PreferencePair], part: int, epoch: int = 0) -> list[list[PreferencePair]]:
        name = ("shuffle", self._iteration, part) if part else ("shuffle", self._iteration)
        return batching.batches(
            pairs,
            batch_pairs=self._config.learner.batch_pairs,
            seed=derive_seed(self._config.seed, *name),
            epoch=epoch,
            whole_groups=OBJECTIVES[self._config.loss.name].unit == "group",
        )
