"""The terminal shows what happened, at any width, and is given back whatever happens."""

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.console import LinesConsole, LiveConsole, QuietConsole, make_console
from launch.view import RunView, show_seconds, sparkline
from orchestrator.ledger import RunStatus
from orchestrator.tracking import RunInfo
from tests.records import completion, pair

RUN = RunInfo(recipe="iterative_dpo", seed=3, run_dir=Path("runs/x"), iterations=8)
PARTS = ("value", "low", "high", "n")
ACCURACY = {"greedy": (0.891, 0.85, 0.925, 256.0), "sampled": (0.5, 0.44, 0.56, 256.0)}
EVALUATED = {
    "time/collect_s": 4.0,
    "throughput/collect_tokens_per_s": 9120.0,
    "throughput/train_tokens_per_s": 4300.0,
    "pairs/kept": 213.0,
    **{f"eval/{kind}_{part}": v for kind, vs in ACCURACY.items() for part, v in zip(PARTS, vs, strict=True)},
}
PAIR = pair(completion(1), completion(2))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def view_in_the_middle(clock):
    """Iteration 3 of 8, in its collect; iterations 1 and 2 took 30 s and 50 s, the start 60 s."""
    view = RunView(clock=clock)
    view.start(RUN)
    view.stage(0, "evaluate")
    view.log(EVALUATED | {"eval/sampled_value": 0.0}, iteration=0, step=0)
    for iteration, begin in ((1, 160.0), (2, 190.0), (3, 240.0)):
        clock.now = begin
        view.stage(iteration, "collect")
        view.pairs([PAIR] * 5)
        view.log({"step/loss": 0.5}, iteration=iteration, step=iteration)
        view.log(EVALUATED, iteration=iteration, step=iteration)
    clock.now = 250.0
    view.progress("collect", 600, 1000, 6000)
    return view


def picture(view, width, encoding="utf-8"):
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=raw, width=width)
    console.print(view.render(width, ascii_only=console.options.ascii_only))
    raw.flush()
    return raw.buffer.getvalue().decode(encoding)


def test_the_view_shows_the_run():
    shown = picture(view_in_the_middle(Clock()), 100)
    for part in (
        "iterative_dpo  seed 3",
        "iteration  3 of 8",
        "collect",
        "60%",
        "89.1% [85.0, 92.5]  ████",
        "50.0% [44.0, 56.0]  ▁▅▅▅",
        "5, 15 in all",
        "generator 600, learner 4,300",  # 6000 tokens in the 10 s of this stage
        "2:30, about 3:50 left",  # 40 s for each of the six iterations 3 to 8, of which 10 s are gone
    ):
        assert part in shown


@pytest.mark.parametrize("width", [40, 41, 60, 80, 100, 101, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_line_fits(width, encoding):
    lines = picture(view_in_the_middle(Clock()), width, encoding).splitlines()
    assert {len(line) for line in lines} == {min(width, 100)}
    assert len(lines) == 9
    assert "89.1% [85.0, 92.5]" in "".join(lines)


def test_nothing_is_estimated_before_an_iteration_was_seen_whole():
    clock = Clock()
    view = RunView(clock=clock)
    view.start(RunInfo(recipe="r", seed=0, run_dir=Path("x"), iterations=4, start_iteration=3))
    view.stage(2, "publish")
    clock.now += 60
    view.stage(3, "collect")
    assert view.seconds_left is None
    clock.now += 20
    view.stage(4, "collect")
    assert view.seconds_left == 20
    clock.now += 30
    assert view.seconds_left == 0
    view.finish(RunStatus.FINISHED)
    clock.now += 1000
    assert (view.seconds_left, view.seconds) == (None, 110)


def test_sparkline_keeps_the_newest_on_a_fixed_scale():
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([0.0, 0.5, 1.0], 2) == "▅█"
    assert sparkline([0.0, 0.5, 1.0], 0) == sparkline([0.5], -3) == ""


def test_seconds():
    assert [show_seconds(s) for s in (-1, 0.4, 59.6, 3600, 36610)] == ["0:00", "0:00", "1:00", "1:00:00", "10:10:10"]


def test_choice():
    pipe, terminal = (
        Console(file=io.StringIO()),
        Console(file=io.StringIO(), force_terminal=True, force_interactive=True),
    )
    assert isinstance(make_console("auto", pipe), LinesConsole)
    assert isinstance(make_console("auto", terminal), LiveConsole)
    assert isinstance(make_console("lines", terminal), LinesConsole)
    assert isinstance(make_console("live", pipe), LiveConsole)
    assert isinstance(make_console("quiet", terminal), QuietConsole)


def test_lines():
    stream = io.StringIO()
    console = LinesConsole(stream)
    console.start(RUN)
    console.stage(1, "collect")
    console.progress("collect", 1, 2, 3)
    console.message("generator-0 died, restarted")
    console.log({"step/loss": 0.5}, iteration=1, step=1)
    console.log(EVALUATED, iteration=1, step=4)
    console.finish(RunStatus.FAILED)
    console.finish(RunStatus.FAILED)
    assert stream.getvalue().splitlines() == [
        "agon: iterative_dpo, seed 3, 8 iterations, in runs/x",
        "[1/8] collect",
        "generator-0 died, restarted",
        "[1/8] greedy 89.1% [85.0, 92.5], sampled 50.0% [44.0, 56.0], 213 pairs, step 4, 0:00 so far",
        "agon: failed after 0:00",
    ]


def test_lines_of_a_stage_that_takes_long(monkeypatch):
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("launch.console.time.monotonic", lambda: clock[0])
    console = LinesConsole(stream)
    console.start(RUN)
    console.stage(0, "warm start")
    for clock[0] in (1.0, 14.0, 16.0, 20.0, 31.5):
        console.progress("warm start", int(clock[0] * 100), 4000, 0)
    assert stream.getvalue().splitlines()[2:] == [
        "[0/8] warm start: 1,600 of 4,000",
        "[0/8] warm start: 3,150 of 4,000",
    ]


# --- a real terminal

SCRIPT = r"""
import os, signal, sys, time
from pathlib import Path
from launch.console import make_console
from orchestrator.ledger import RunStatus
from orchestrator.tracking import RunInfo
console = make_console("auto")
console.start(RunInfo(recipe="[red]r", seed=0, run_dir=Path("x"), iterations=2))
console.stage(1, "train")
console.message("[bold]as it is[/bold] \N{SNOWMAN}")
print("printed meanwhile")
ending = sys.argv[1]
if ending == "error":
    raise RuntimeError("boom")
if ending == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so do we
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
console.finish(RunStatus.FINISHED)
"""
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


def start(ending, terminal, encoding="utf-8"):
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "70", "PYTHONIOENCODING": encoding}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, ending],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        cwd=Path(__file__).parent.parent,
        env=environment,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_without_unicode_does_not_end_the_run(encoding):
    process = start("finish", subprocess.PIPE, encoding)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"[bold]as it is[/bold]" in output


@pytest.mark.parametrize("ending", ["finish", "error", "interrupt"])
def test_the_terminal_is_given_back(ending):
    master, slave = pty.openpty()
    process = start(ending, slave)
    os.close(slave)
    output = b""
    while select.select([master], [], [], 60)[0]:
        try:
            output += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert (process.wait(60) == 0) == (ending == "finish")
    assert HIDE in output
    assert output.rindex(SHOW) > output.rindex(HIDE)
    for text in (b"[bold]as it is[/bold]", b"printed meanwhile", b"[red]r"):
        assert text in output
