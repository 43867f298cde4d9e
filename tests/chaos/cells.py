"""Cells of the chaos matrix: a run in which a role dies at a point, or several do, and what became of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.audit import audit
from orchestrator.events import EventKind, read_events
from tests.chaos.saboteur import FOLDER
from tests.runs import overrides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

RUN_S = 600.0
"""One process of a run must end after so long."""
MAX_RESUMES = 5
ADDRESS = re.compile(r"[\w.]+:\d+")
SETTINGS = {
    "generator__num_actors": 2,
    # Two waves an iteration and checkpoints within it, so that there is something between all points.
    "pipeline__wave_prompts": 4,
    "learner__checkpoint_steps": 2,
    "learner__batch_pairs": 4,
    "pipeline__iterations": 3,
    "tracking": "disabled",
}
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "semi_online": {"pipeline__mode": "semi_online", "learner__schedule": "constant"},
    "async": {"pipeline__mode": "async", "pipeline__iterations": 4},
}
"""What each choice of `pipeline.mode` has beside them."""
VICTIM = "from tests.chaos.victim import main; main()"


EVENT_ROLES = {"generator": "generator", "judge": "verifier", "queue": "learner", "learner": "learner"}
"""The role that events name; those of the queue are told by whoever fills it."""
LATE = ("checkpoint", "publication", "evaluating")
"""Points at whose last visits nobody but the controller may be asked again, and so be missed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Who dies where."""

    point: str
    role: str

    def __str__(self) -> str:
        return f"{self.role} while {self.point}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a run."""

    findings: list[str]
    """Of the audit, and whatever else is not as it should be; empty where nothing is."""
    lost: int
    repeated: int
    stale: int
    recovery_s: float
    """From the death until another was in place, seconds; of a controller, until the resumed run was in a stage.

    The longest where several died; NaN where nobody's place was taken, which is no finding at a run's last visits.
    """


def reference_run(folder: Path, engine: str, mode: str) -> dict[str, bytes] | None:
    """Pairs and weights of a run that nothing disturbs; None where time decides which weights sample what."""
    if mode == "async":
        return None
    run_dir = folder / f"reference-{mode}"
    _run(["run", *overrides(folder, run_dir, engine=engine, **SETTINGS, **MODES[mode])], {})
    return products(run_dir)


def products(run_dir: Path) -> dict[str, bytes]:
    """What two equal runs have in common, byte for byte: pairs and trained weights."""
    paths = [*sorted((run_dir / "pairs").iterdir()), run_dir / "model" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in paths}


def play(
    *cells: Cell, folder: Path, name: str, visit: int, engine: str, mode: str, expected: dict[str, bytes] | None
) -> Outcome:
    """Plays cells in one run to its end, resuming it where its controller dies.

    Args:
        *cells: who dies where.
        folder: of all runs; holds model and prompts.
        name: of this run.
        visit: the how manieth time that a process comes to the point.
        engine: of the generators.
        mode: `pipeline.mode`.
        expected: what `reference_run` gave.
    """
    run_dir, chaos = folder / name, folder / f"{name}.chaos"
    (chaos / "armed").mkdir(parents=True)
    for cell in cells:
        armed = {"point": cell.point, "role": cell.role, "visit": visit}
        (chaos / "armed" / f"{cell}.json").write_text(json.dumps(armed))
    environment = {FOLDER: str(chaos)}
    settings = overrides(folder, run_dir, engine=engine, **SETTINGS | MODES[mode])
    with nodes(chaos) if any(cell.role == "node" for cell in cells) else nullcontext([]) as cluster:
        code = _run(["run", *settings, *cluster], environment, may_fail=True)
        resumes = 0
        while code == -signal.SIGKILL and resumes < MAX_RESUMES:
            resumes += 1
            code = _run(["run", "--resume", str(run_dir), *cluster], environment, may_fail=True)
    return _outcome(cells, run_dir, chaos, code, expected)


@contextmanager
def nodes(chaos: Path) -> Iterator[list[str]]:
    """A cluster of several nodes (`tests/chaos/nodes.py`); gives the settings that use it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.nodes"],
        env=os.environ | {FOLDER: str(chaos)},  # which nodes hand on to their actors
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        addresses = (line.strip() for line in process.stdout)
        yield [f"cluster.address={next(line for line in addresses if ADDRESS.fullmatch(line))}"]
    finally:
        process.stdin.close()
        process.wait(RUN_S)


def _outcome(
    cells: Sequence[Cell], run_dir: Path, chaos: Path, code: int, expected: dict[str, bytes] | None
) -> Outcome:
    findings, recovered = [], []
    events = read_events(run_dir)
    if code:
        findings.append(f"the run ended with code {code}: {(chaos / 'output.txt').read_text()[-2000:]}")
    findings += [event["text"] for event in events if event["kind"] == EventKind.STOPPED]
    for cell in cells:
        fired = chaos / "fired" / f"{cell}.json"
        if not fired.exists():
            findings.append(f"{cell}: nobody was killed")
            continue
        died = json.loads(fired.read_text())["time"]
        recovered.append(_recovered(cell, events, died) - died)
        if math.isnan(recovered[-1]) and (cell.point not in LATE or cell.role == "controller"):
            findings.append(f"{cell}: nobody took its place")
    lost = sum(event["kind"] == EventKind.LOST for event in events)
    if lost > len(cells) and all(cell.role != "node" for cell in cells):
        findings.append(f"{lost} died where {len(cells)} were killed")
    found = audit(run_dir)
    findings += found.findings
    if not code and expected is not None and products(run_dir) != expected:
        findings.append("pairs or weights differ from those of a run that nothing disturbed")
    return Outcome(
        findings=findings,
        lost=len(found.lost) + len(found.damaged),
        repeated=len(found.repeated) + len(found.rejudged),
        stale=len(found.stale),
        recovery_s=max((seconds for seconds in recovered if not math.isnan(seconds)), default=math.nan),
    )


def _recovered(cell: Cell, events: list[dict[str, Any]], died: float) -> float:
    """When the role was in place again, of a node its first actor; where the run ended before, its work elsewhere."""
    role = EVENT_ROLES.get(cell.role)
    kinds = (EventKind.RESUMED,) if cell.role == "controller" else (EventKind.REPLACED, EventKind.MOVED)
    for kind in kinds:
        times = [
            event["time"]
            for event in events
            if event["time"] > died and event["kind"] == kind and role in (None, event.get("role"))
        ]
        if times:
            return min(times)
    return math.nan


def _run(arguments: list[str], environment: dict[str, str], *, may_fail: bool = False) -> int:
    command = [sys.executable, "-c", VICTIM] if environment else [sys.executable, "-m", "launch"]
    with open(f"{environment[FOLDER]}/output.txt" if environment else os.devnull, "a") as output:
        process = subprocess.Popen(
            [*command, *arguments], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        code = process.wait(timeout=RUN_S)
    if code and not may_fail:
        raise RuntimeError(f"agon {' '.join(arguments)} ended with code {code}")
    return code
