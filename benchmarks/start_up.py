"""What a run takes of the machine's cores from its command to its first sampling.

    python -m benchmarks.start_up

The run is the one of `time_to_accuracy`. Nobody computes for it yet: the time goes to Python's imports (torch and
transformers in the fork server, Ray in each actor) and to Ray's own processes. The ratio is how much of what all cores
could have done in that time was done.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.report import Comparison, report
from benchmarks.time_to_accuracy import AGON, LIMIT_S, ROOT
from conf.schema import ModelConfig, TinyConfig
from launch.initial_model import ensure_tiny_model
from orchestrator.ledger import LedgerReader
from orchestrator.tasks.addition import AdditionTask

REPETITIONS = 5
ROLES = {
    "ray::Learner": "learner",
    "ray::Generator": "generator",
    "ray::ScorerActor": "scorer",
    "ray::QueueActor": "queue",
    "launch.fork_server": "fork server",
}
"""What a process is called -> role. Ray names a worker after its actor's class once it is up."""
INTERVAL_S = 0.05

Snapshot = tuple[float, dict[psutil.Process, float]]
"""When, and the processor seconds of each process until then."""


def watch(command: list[str]) -> tuple[list[Snapshot], dict[psutil.Process, str]]:
    """Runs it to its end; what its processes took meanwhile, and who they were."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    driver, taken = psutil.Process(process.pid), dict[psutil.Process, float]()
    snapshots, names = [(time.time(), dict(taken))], {driver: "driver"}
    end = time.monotonic() + LIMIT_S
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"the run has not ended after {LIMIT_S:.0f} s")
        with suppress(psutil.NoSuchProcess):
            for one in driver.children(recursive=True):
                names.setdefault(one, "Ray")
                with suppress(psutil.NoSuchProcess):
                    taken[one] = _processor_seconds(one)
                    title = " ".join(one.cmdline())
                    names[one] = next((role for name, role in ROLES.items() if name in title), names[one])
            taken[driver] = _processor_seconds(driver)
        snapshots.append((time.time(), dict(taken)))
        time.sleep(INTERVAL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return snapshots, names


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def start_up(folder: Path) -> dict[str, float]:
    """Seconds of a run's start, and processor seconds by role."""
    run_dir = folder / "run"
    settings = ["seed=0", *AGON, "pipeline.iterations=1", f"run_dir={run_dir}"]
    snapshots, names = watch([sys.executable, "-m", "launch", "run", *settings])
    with LedgerReader(run_dir) as ledger:
        first = min(phase.started for phase in ledger.phases() if phase.phase == "collect")
    until, taken = max((one for one in snapshots if one[0] <= first), key=lambda one: one[0])
    found = {"wall": first - snapshots[0][0], "all processes": sum(taken.values())}
    for role in ("driver", "Ray", *ROLES.values()):
        found[role] = sum(seconds for one, seconds in taken.items() if names[one] == role)
    print(f"{until - snapshots[0][0]:.1f} s:", {name: round(value, 2) for name, value in found.items()}, flush=True)
    return found


def main() -> int:
    """Measures and keeps the ratio."""
    ensure_tiny_model(ModelConfig(tiny=TinyConfig(seed=0)), AdditionTask(seed=0))
    sides: dict[str, list[float]] = {}
    for _ in range(REPETITIONS):
        with tempfile.TemporaryDirectory() as folder:
            for name, value in start_up(Path(folder)).items():
                sides.setdefault(name, []).append(value)
    cores = len(os.sched_getaffinity(0))
    return report(
        Comparison(
            key="start_up_busy",
            title="Processor time until the first sampling, of all that the cores have",
            unit="s",
            sides=sides,
            ratio=statistics.median(sides["all processes"]) / (cores * statistics.median(sides["wall"])),
            notes=__doc__.partition("start_up\n")[2].strip(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
