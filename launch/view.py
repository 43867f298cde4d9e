"""What the terminal shows of a run: a small state that events change, and its picture."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich import box
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.metrics import Accuracy, read_accuracy
from orchestrator.tracking import RunInfo, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import RenderableType

    from orchestrator.ledger import RunStatus
    from orchestrator.types import PreferencePair

_MAX_WIDTH, _LABEL_WIDTH, _FRAME = 100, 11, 4
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_SPEEDS = {"collect": "generator", "train": "learner"}


@dataclass(slots=True)
class RunView(Tracker):
    """The state. Times are seconds of `clock`."""

    clock: Callable[[], float] = time.monotonic
    run: RunInfo | None = None
    status: str | None = None
    """None while it runs."""
    iteration: int = 0
    current_stage: str = "starting"
    done: int = 0
    total: int = 0
    tokens: int = 0
    num_pairs: int = 0
    """Of the latest iteration."""
    total_pairs: int = 0
    speeds: dict[str, float] = field(default_factory=dict)
    """Tokens per second of stages, as last measured."""
    accuracies: dict[str, list[Accuracy]] = field(default_factory=lambda: {"greedy": [], "sampled": []})
    iteration_seconds: list[float] = field(default_factory=list)
    """Of the iterations that ended under these eyes."""
    started: float = 0.0
    ended: float = 0.0
    stage_started: float = 0.0
    iteration_started: float | None = None
    """None before the first one begins under these eyes."""

    def start(self, run: RunInfo) -> None:
        """The clock starts."""
        self.run = run
        self.iteration = max(0, run.start_iteration - 1)
        self.started = self.stage_started = self.clock()

    def stage(self, iteration: int, stage: str) -> None:
        """A new stage; a higher iteration ends the one before."""
        now = self.clock()
        if iteration > self.iteration:
            # What was begun before this view began, or is no iteration (start, first evaluation), does not count.
            if self.iteration_started is not None:
                self.iteration_seconds.append(now - self.iteration_started)
            self.iteration, self.iteration_started = iteration, now
        self.current_stage, self.stage_started = stage, now
        self.done = self.total = self.tokens = 0

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Within the stage."""
        self.done, self.total, self.tokens = done, total, tokens
        elapsed = self.clock() - self.stage_started
        if tokens and elapsed > 0:
            self.speeds[stage] = tokens / elapsed

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Accuracies and speeds are picked out."""
        for kind, history in self.accuracies.items():
            if accuracy := read_accuracy(metrics, kind):
                history.append(accuracy)
        for stage in _SPEEDS:
            self.speeds[stage] = metrics.get(f"throughput/{stage}_tokens_per_s", self.speeds.get(stage, 0.0))

    def pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Counted."""
        self.num_pairs = len(pairs)
        self.total_pairs += len(pairs)

    def finish(self, status: RunStatus) -> None:
        """The clock stops."""
        if self.status is None:
            self.status, self.ended = status, self.clock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return (self.ended if self.status else self.clock()) - self.started

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the iterations that ended; None before the first has."""
        if self.run is None or self.status or self.iteration_started is None or not self.iteration_seconds:
            return None
        mean = sum(self.iteration_seconds) / len(self.iteration_seconds)
        current = min(self.clock() - self.iteration_started, mean)
        return mean * (self.run.iterations - self.iteration + 1) - current

    def render(self, width: int, *, ascii_only: bool = False) -> RenderableType:
        """The picture, `width` columns wide or a hundred."""
        width = min(width, _MAX_WIDTH)
        room = max(8, width - _FRAME - _LABEL_WIDTH)
        rows = Table.grid(padding=0)
        rows.add_column(width=_LABEL_WIDTH, style="dim", no_wrap=True)
        rows.add_column(width=room, no_wrap=True, overflow="crop" if ascii_only else "ellipsis")
        for label, value in self._rows(room, ascii_only):
            rows.add_row(label, value)
        title = Text("agon", style="bold")
        if self.run is not None:
            title.append(f"  {self.run.recipe}  seed {self.run.seed}", style="not bold")
        return Panel(rows, title=title, title_align="left", width=width, box=box.ROUNDED, border_style="dim")

    def _rows(self, room: int, ascii_only: bool) -> list[tuple[str, RenderableType]]:
        of = f" of {self.run.iterations}" if self.run else ""
        rows: list[tuple[str, RenderableType]] = [("iteration", Text(f"{self.iteration}{of}", style="bold"))]
        rows += [("stage", self._stage_row(room)), ("time", self._time_row())]
        for kind, history in self.accuracies.items():
            if history:
                shown = Text(show_accuracy(history[-1]), style="green")
                values = [accuracy.value for accuracy in history]
                shown.append("  " + sparkline(values, room - len(shown) - 2, ascii_only=ascii_only), style="cyan")
                rows.append((kind, shown))
        if self.total_pairs:
            rows.append(("pairs", Text(f"{self.num_pairs:,}, {self.total_pairs:,} in all")))
        speeds = [f"{role} {self.speeds[stage]:,.0f}" for stage, role in _SPEEDS.items() if self.speeds.get(stage)]
        if speeds:
            rows.append(("tokens/s", Text(", ".join(speeds))))
        return rows

    def _stage_row(self, room: int) -> RenderableType:
        if self.status is not None:
            return Text(self.status, style="bold")
        name = Text(self.current_stage)
        if not self.total:
            return name.append(f"  {show_seconds(self.clock() - self.stage_started)}", style="dim")
        figures = Text(f"  {min(1.0, self.done / self.total):4.0%}", style="dim")
        row = Table.grid()
        bar = ProgressBar(total=self.total, completed=self.done, width=max(4, min(40, room - 10 - len(figures))))
        row.add_column(width=10, no_wrap=True)
        row.add_row(name, bar, figures)
        return row

    def _time_row(self) -> Text:
        left = self.seconds_left
        text = show_seconds(self.seconds)
        return Text(text if left is None else f"{text}, about {show_seconds(left)} left")


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The newest `width` of some shares in [0, 1], a character each, on a scale from 0 to 1."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    newest = values[-width:] if width > 0 else []
    return "".join(blocks[min(len(blocks) - 1, max(0, int(value * len(blocks))))] for value in newest)


def show_accuracy(accuracy: Accuracy) -> str:
    """In per cent, with its interval."""
    return f"{accuracy.value:.1%} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def show_seconds(seconds: float) -> str:
    """As m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
