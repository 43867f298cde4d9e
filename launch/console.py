"""The terminal of a run: a live view, plain lines where there is no terminal, or nothing.

The live view gives the terminal back in `finish`, and at the latest when the interpreter exits.
"""

from __future__ import annotations

import atexit
import sys
import time
from io import TextIOWrapper
from threading import Lock
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.view import RunView, show_accuracy, show_seconds
from orchestrator.metrics import read_accuracy
from orchestrator.printable import printable
from orchestrator.tracking import RunInfo, Tracker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from orchestrator.ledger import RunStatus
    from orchestrator.types import PreferencePair

_REFRESHES_PER_S = 4
_SILENCE_S = 15.0
"""After so long without a line a log says how far the stage is."""


def make_console(choice: str, console: Console | None = None) -> Tracker:
    """The tracker for `tracking.console`: `auto` (live on a terminal, else lines), `live`, `lines` or `quiet`."""
    console = console or Console()
    if isinstance(console.file, TextIOWrapper):
        # A character that the terminal has no byte for must not end the run.
        console.file.reconfigure(errors="replace")
    if choice == "auto":
        choice = "live" if console.is_interactive and not console.is_dumb_terminal else "lines"
    if choice == "live":
        return LiveConsole(console)
    return LinesConsole(console.file) if choice == "lines" else QuietConsole()


class QuietConsole(Tracker):
    """Says nothing."""


class LiveConsole(Tracker):
    """A panel that is redrawn in place, by a thread of its own so that clocks go on."""

    interval_s = 0.5

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view = RunView()
        self._lock = Lock()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=_REFRESHES_PER_S)

    def start(self, run: RunInfo) -> None:
        """Takes the terminal."""
        with self._lock:
            self._view.start(run)
        atexit.register(self._live.stop)
        self._live.start()

    def stage(self, iteration: int, stage: str) -> None:
        """Shown at the next redraw."""
        with self._lock:
            self._view.stage(iteration, stage)

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Shown at the next redraw."""
        with self._lock:
            self._view.progress(stage, done, total, tokens)

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Shown at the next redraw."""
        with self._lock:
            self._view.log(metrics, iteration=iteration, step=step)

    def pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Shown at the next redraw."""
        with self._lock:
            self._view.pairs(pairs)

    def message(self, text: str) -> None:
        """Printed above the panel, where it stays."""
        self._console.print(Text(printable(text), style="yellow"))

    def finish(self, status: RunStatus) -> None:
        """Draws the last picture, which stays, and gives the terminal back."""
        with self._lock:
            self._view.finish(status)
        self._live.stop()
        atexit.unregister(self._live.stop)

    def _render(self) -> RenderableType:
        with self._lock:
            return self._view.render(self._console.width, ascii_only=self._console.options.ascii_only)


class LinesConsole(Tracker):
    """One line a stage, and one an iteration with its figures: for log files and pipes."""

    interval_s = _SILENCE_S

    def __init__(self, stream: IO[str] = sys.stdout) -> None:
        self._stream = stream
        self._view = RunView()
        self._spoke = time.monotonic()
        self._iteration = 0

    def start(self, run: RunInfo) -> None:
        """Says which run."""
        self._view.start(run)
        self._write(f"agon: {run.recipe}, seed {run.seed}, {run.iterations} iterations, in {run.run_dir}")

    def stage(self, iteration: int, stage: str) -> None:
        """Says which stage."""
        self._view.stage(iteration, stage)
        self._iteration = iteration
        self._write(f"{self._where(iteration)} {stage}")

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Says how far a stage is that takes long."""
        if total and time.monotonic() - self._spoke >= _SILENCE_S:
            self._write(f"{self._where(self._iteration)} {stage}: {done:,} of {total:,}")

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Says what an iteration brought; the metrics of single steps are passed over."""
        self._view.log(metrics, iteration=iteration, step=step)
        if not any(name.startswith("time/") for name in metrics):
            return
        rates = {kind: read_accuracy(metrics, kind) for kind in ("greedy", "sampled")}
        figures = [f"{kind} {show_accuracy(rate)}" for kind, rate in rates.items() if rate]
        if "pairs/kept" in metrics:
            figures.append(f"{metrics['pairs/kept']:,.0f} pairs")
        figures.append(f"step {step}")
        figures.append(f"{show_seconds(self._view.seconds)} so far")
        left = self._view.seconds_left
        if left is not None:
            figures.append(f"about {show_seconds(left)} left")
        self._write(f"{self._where(iteration)} {', '.join(figures)}")

    def message(self, text: str) -> None:
        """A line of its own."""
        self._write(text)

    def finish(self, status: RunStatus) -> None:
        """Says how it ended, once."""
        if self._view.run is not None and self._view.status is None:
            self._view.finish(status)
            self._write(f"agon: {status} after {show_seconds(self._view.seconds)}")

    def _where(self, iteration: int) -> str:
        return f"[{iteration}/{self._view.run.iterations if self._view.run else '?'}]"

    def _write(self, line: str) -> None:
        self._stream.write(printable(line) + "\n")
        self._stream.flush()
        self._spoke = time.monotonic()
