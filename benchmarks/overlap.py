"""Collecting while the learner is trained, against the larger of the two alone, and against taking turns.

    python -m benchmarks.overlap

The embedded task (column addition, a Llama of 0.8M parameters), 96 prompts x 8 completions an iteration.

    alone      sync; one core for the generator and one for the learner: how long an iteration's pairs and updates take
    overlap    async with the same cores: how long an iteration takes
    both       async; both cores for whoever needs them: two generators, two threads of the learner
    waves      semi_online with one core each, two waves an iteration
    turns      sync, the default; both cores for whoever has the turn: two generators, or two threads of the learner

Runs take turns. The first two iterations of each, in which files and memory are touched first, and the last one, which
is evaluated, do not count. Ratio: overlap / max(collect, train) of alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.report import Comparison, report
from conf.compose import compose
from launch.run import run
from orchestrator.ledger import LedgerReader
from orchestrator.profiling import read_profile
from orchestrator.waits import acquainted

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS, ITERATIONS, UNCOUNTED = 5, 6, 2
CORES = {"generator": 0, "learner": 1}
SETTINGS = [
    f"pipeline.iterations={ITERATIONS}",
    "pipeline.prompts_per_iteration=96",
    "evaluation.problems=64",
    "evaluation.final_problems=64",
    f"evaluation.every={ITERATIONS}",
    "evaluation.kl_prompts=0",
    "scorer.num_actors=1",
    "tracking=disabled",
    "tracking.console=quiet",
]
PINNED = ["generator.num_actors=1", "learner.num_threads=1"]
SIDES = {
    "alone": [*PINNED, "pipeline.mode=sync"],
    "overlap": [*PINNED, "pipeline.mode=async"],
    "both": ["generator.num_actors=2", "learner.num_threads=2", "pipeline.mode=async", "cluster.num_cpus=4"],
    "waves": [*PINNED, "pipeline.mode=semi_online", "pipeline.wave_prompts=48"],
    "turns": ["generator.num_actors=2", "learner.num_threads=2", "pipeline.mode=sync", "cluster.num_cpus=4"],
}


@contextmanager
def pinned() -> Iterator[None]:
    """Generator and learner of the run within the block stay on one core each, whenever they come up."""
    over = threading.Event()

    def pin() -> None:
        while not over.wait(0.5):
            for peer in acquainted():
                if peer.role in CORES and peer.where is not None:
                    with suppress(psutil.NoSuchProcess, ProcessLookupError):
                        for thread in psutil.Process(peer.where.pid).threads():
                            os.sched_setaffinity(thread.id, {CORES[peer.role]})

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(folder: Path, name: str, number: int) -> dict[str, list[float]]:
    """Seconds of each iteration that counts, of its collect and train stages, and idle shares of both actors."""
    run_dir = folder / f"{name}-{number}"
    config = compose([f"run_dir={run_dir}", *SETTINGS, *SIDES[name]])
    if name in ("turns", "both"):
        code = run(config)
    else:
        with pinned():
            code = run(config)
    if code:
        raise RuntimeError(f"the run {name} ended with code {code}")
    with LedgerReader(run_dir) as ledger:
        done = ledger.finished()
    counted = list(pairwise(done))[UNCOUNTED:-1]
    window = (counted[0][0].finished, counted[-1][1].finished)
    return {
        "iteration": [after.finished - before.finished for before, after in counted],
        "collect": [after.metrics["time/collect_s"] for _, after in counted],
        "train": [after.metrics["time/train_s"] for _, after in counted],
        **{f"idle {role}": [idle(run_dir, role, *window)] for role in CORES},
    }


def idle(run_dir: Path, role: str, start: float, end: float) -> float:
    """The share of the time in which an actor did nothing."""
    busy = 0.0
    for line in read_profile(run_dir):
        if line["role"] == role:
            busy += sum(max(0.0, min(end, since + length) - max(start, since)) for _, since, length in line["spans"])
    return max(0.0, 1 - busy / (end - start))


def main() -> int:
    """Measures and keeps the ratio."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name in SIDES:
                for what, values in measure(Path(folder), name, number).items():
                    found[name].setdefault(what, []).extend(values)
    alone, overlap, both, waves, turns = (found[name] for name in SIDES)
    sides = {
        "overlap": overlap["iteration"],
        "overlap, both cores": both["iteration"],
        "waves": waves["iteration"],
        "collect alone": alone["collect"],
        "train alone": alone["train"],
        "turns, both cores": turns["iteration"],
        "turns, one core each": alone["iteration"],
    }
    medians = {name: statistics.median(values) for name, values in sides.items()}
    shares = ", ".join(
        f"{name}: {role} {statistics.median(found[name][f'idle {role}']):.0%}"
        for name in ("overlap", "both", "waves", "turns")
        for role in CORES
    )
    fastest = min(("overlap", "overlap, both cores", "waves", "turns, both cores"), key=medians.__getitem__)
    return report(
        Comparison(
            key="overlap",
            title="Collecting while the learner is trained",
            unit="s an iteration",
            sides=sides,
            ratio=medians["overlap"] / max(medians["collect alone"], medians["train alone"]),
            most=1.15,
            notes=f"{__doc__.partition('    python')[0].strip()} Idle: {shares}. Fastest on these cores: {fastest}.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
