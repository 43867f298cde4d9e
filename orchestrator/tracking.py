"""Who is told what happens in a run: the terminal, wandb, and `metrics.jsonl`, which is always written."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.files import atomic_file, dump_json, read_json_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.ledger import RunStatus
    from orchestrator.types import PreferencePair


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What is known when a run starts or goes on.

    Example: ``RunInfo(recipe="iterative_dpo", seed=0, run_dir=Path("runs/x"), iterations=8)``
    """

    recipe: str
    seed: int
    run_dir: Path
    iterations: int
    """Planned."""
    start_iteration: int = 0
    """The first that will run: 0 for a new run, one more than the last finished one for a run that is resumed."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain dicts, lists and scalars."""


class Tracker:
    """Told what happens, from one thread. What a tracker does not override does nothing."""

    interval_s: float = math.inf
    """How often `progress` is of use to it, seconds."""

    def start(self, run: RunInfo) -> None:
        """The run starts, or goes on."""

    def rewind(self, iteration: int) -> None:
        """What was logged of this iteration and of those behind it is undone: they will run again."""

    def stage(self, iteration: int, stage: str) -> None:
        """A stage of an iteration starts."""

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """`done` of `total` units (0: unknown) of the running stage, with so many tokens generated or computed."""

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Scalars, named as in docs/metrics.md; `step` counts the run's optimizer steps."""

    def pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """The pairs an iteration trains on; a tracker shows a sample of them."""

    def message(self, text: str) -> None:
        """A line for people."""

    def finish(self, status: RunStatus) -> None:
        """The run stopped; everything is written out and let go. Safe to call twice, or without `start`."""


class Trackers(Tracker):
    """Tells several trackers, in their order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self.interval_s = min((tracker.interval_s for tracker in self._trackers), default=math.inf)

    def start(self, run: RunInfo) -> None:
        """Starts all of them."""
        for tracker in self._trackers:
            tracker.start(run)

    def rewind(self, iteration: int) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.rewind(iteration)

    def stage(self, iteration: int, stage: str) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.stage(iteration, stage)

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.progress(stage, done, total, tokens)

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.log(metrics, iteration=iteration, step=step)

    def pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.pairs(pairs)

    def message(self, text: str) -> None:
        """Tells all of them."""
        for tracker in self._trackers:
            tracker.message(text)

    def finish(self, status: RunStatus) -> None:
        """Finishes every one of them, even when another one raises: the terminal must be given back."""
        with ExitStack() as stack:
            for tracker in reversed(self._trackers):
                stack.callback(tracker.finish, status)


class JsonlTracker(Tracker):
    """`<run>/metrics.jsonl`: one JSON object a log, handed to the system when `log` returns.

    Keys: `iteration`, `step`, `time` (seconds since the epoch) and the metrics; a figure that is not finite is null.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path: Path | None = None

    def start(self, run: RunInfo) -> None:
        """Opens the file. Lines of iterations that will run again, and a torn last line, are removed."""
        self._path = run.run_dir / "metrics.jsonl"
        self.rewind(run.start_iteration)

    def rewind(self, iteration: int) -> None:
        """Removes the lines of iterations that will run again."""
        if self._path is None:
            return
        if self._file is not None:
            self._file.close()
        kept = [line for line in read_json_lines(self._path) if line.get("iteration", 0) < iteration]
        with atomic_file(self._path) as file:
            file.writelines(dump_json(line).encode() + b"\n" for line in kept)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Writes a line."""
        if self._file is not None:
            line = {"iteration": iteration, "step": step, "time": time.time(), **metrics}
            self._file.write(dump_json(line) + "\n")
            self._file.flush()

    def finish(self, status: RunStatus) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
