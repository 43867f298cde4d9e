"""Longer trials: a controller killed at random instants, and a run that loses somebody every minute for hours.

python -m tests.chaos.endurance --kills 20          one sync run, its controller killed and resumed so many times
python -m tests.chaos.endurance --soak-minutes 120  one run, a random role killed each minute; what it holds is flat
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, mean, pvariance
from typing import TYPE_CHECKING

import psutil

from launch.audit import audit
from orchestrator.events import EventKind, read_events
from orchestrator.ledger import LedgerReader
from tests.chaos.cells import SETTINGS, VICTIM, products
from tests.chaos.saboteur import FOLDER, kill, living
from tests.runs import overrides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 900.0
"""Without a new stage for so long, a run is stuck."""
END_S = 120.0
"""A run that is asked to end must have ended after so long."""
ITERATIONS_A_KILL = 20
SOAK_ROLES = ("generator", "judge", "queue", "learner")
CONTROLLER_LIFE = 40
"""Kills of others, one a minute, for each of the controller."""


@contextmanager
def victims(chaos: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Starts runs with a saboteur that is armed with nothing: their processes are known by role. None outlives it."""
    started: list[subprocess.Popen[bytes]] = []
    chaos.mkdir(parents=True)

    def start(arguments: list[str]) -> subprocess.Popen[bytes]:
        with open(chaos / "output.txt", "a") as output:
            command = [sys.executable, "-c", VICTIM, *arguments]
            environment = os.environ | {FOLDER: str(chaos)}
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait(END_S)


def stages(run_dir: Path) -> int:
    """Stages that were begun in the run; 0 where there is no ledger yet."""
    if not (run_dir / "ledger.sqlite").exists():
        return 0
    with LedgerReader(run_dir) as ledger:
        return len(ledger.phases())


def wait_for_work(process: subprocess.Popen[bytes], run_dir: Path, since: float) -> None:
    """Waits until a stage was begun after `since` (seconds since the epoch), or the process has ended."""
    end = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < end:
        if (run_dir / "ledger.sqlite").exists():
            with LedgerReader(run_dir) as ledger:
                if any(phase.started > since for phase in ledger.phases()):
                    return
        time.sleep(0.1)


def kill_controller(folder: Path, *, kills: int, engine: str, seed: int) -> int:
    """Kills the controller at random instants, resumes each time, and compares the end with an undisturbed run's.

    Each process gets on average half its share of the run's work, so that there is work left for the last one.
    """
    lots = random.Random(seed)
    # Weights move, and yet there is something to learn to the end.
    settings = {**SETTINGS, "pipeline__iterations": kills * ITERATIONS_A_KILL, "learner__lr": 1e-5}
    run_dir, chaos, whole = folder / "killed", folder / "killed.chaos", folder / "whole"
    with victims(chaos) as start:
        start(["run", *overrides(folder, whole, engine=engine, **settings)]).wait(DEADLINE_S)
        with LedgerReader(whole) as ledger:
            share_s = sum(phase.seconds or 0.0 for phase in ledger.phases()) / kills
        codes, since = [], time.time()
        process = start(["run", *overrides(folder, run_dir, engine=engine, **settings)])
        for number in range(kills):
            wait_for_work(process, run_dir, since)
            instant = lots.uniform(0, share_s)
            with suppress(subprocess.TimeoutExpired):
                process.wait(instant)
            process.kill()
            codes.append(process.wait())
            done = stages(run_dir)
            print(
                f"kill {number + 1}: {instant:.1f} s into the work, {done} stages begun, code {codes[-1]}", flush=True
            )
            since = time.time()
            process = start(["run", "--resume", str(run_dir)])
        code = process.wait(DEADLINE_S)
    found, same = audit(run_dir), products(run_dir) == products(whole)
    killed = codes.count(-signal.SIGKILL)  # others had ended by themselves, which is no kill
    print(found)
    print(f"kills: {killed} of {kills}, exit code {code}, pairs and weights {'identical' if same else 'DIFFERENT'}")
    return int(bool(code or found.findings or not same or killed < kills))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What is held at one moment; MiB where it is memory."""

    seconds: float
    controller_mib: float
    queue_mib: float
    descriptors: int
    """Of the controller."""
    processes: int
    """Of the run's process tree."""
    shared_mib: float
    """Used in /dev/shm."""


def soak(folder: Path, *, minutes: float, engine: str, seed: int) -> int:
    """Kills a random role each minute. Figures of the controller are compared within the life of each controller."""
    lots, run_dir, chaos = random.Random(seed), folder / "soak", folder / "soak.chaos"
    # So little is learned that there is something to learn for hours.
    settings = {**SETTINGS, "pipeline__iterations": 100_000, "learner__lr": 1e-9}
    settings |= {f"{section}__restarts": 100_000 for section in ("generator", "scorer", "learner")}
    with victims(chaos) as start:
        process = start(["run", *overrides(folder, run_dir, engine=engine, **settings)])
        shared = psutil.disk_usage("/dev/shm").used
        kills, lives, wrong, end = 0, [[]], list[str](), time.monotonic() + minutes * 60
        done, moved = 0, time.monotonic()
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            if stages(run_dir) > done:
                done, moved = stages(run_dir), time.monotonic()
            elif time.monotonic() - moved > DEADLINE_S:
                wrong.append(f"no stage was begun for {DEADLINE_S:g} s after {done}")
                break
            if process.poll() is not None:
                if process.returncode != -signal.SIGKILL:
                    wrong.append(f"the controller ended with code {process.returncode}")
                process = start(["run", "--resume", str(run_dir)])
                lives.append([])
                continue
            lives[-1].append(measure(process.pid, chaos, shared))
            # A controller dies seldom, so that there is something to see between its deaths.
            role = "controller" if kills % CONTROLLER_LIFE == CONTROLLER_LIFE - 1 else lots.choice(SOAK_ROLES)
            with suppress(RuntimeError, psutil.NoSuchProcess):
                kill(role, chaos, str(kills))
                kills += 1
            print(f"{role:<10} killed; {lives[-1][-1]}, {stages(run_dir)} stages", flush=True)
        process.send_signal(signal.SIGINT)
        code = process.wait(END_S)
    time.sleep(10)
    every = psutil.process_iter(["cmdline"])
    left = [process.pid for process in every if str(run_dir) in " ".join(process.info["cmdline"] or [])]
    found = audit(run_dir)
    wrong += found.findings
    wrong += [event["text"] for event in read_events(run_dir) if event["kind"] == EventKind.STOPPED]
    if kills < minutes / 2:
        wrong.append(f"only {kills} were killed")
    if left or code != 130:
        wrong.append(f"{len(left)} processes are left, exit code {code}")
    (folder / "soak.json").write_text(json.dumps([[asdict(sample) for sample in life] for life in lives]))
    print(found)
    for name in ("controller_mib", "queue_mib", "descriptors", "processes", "shared_mib"):
        print(f"{name}: {describe(lives, name)}")
    for text in wrong:
        print(text)
    print(f"soak: {minutes:g} minutes, {kills} kills, {done} stages, {len(wrong)} findings")
    return int(bool(wrong))


def measure(pid: int, chaos: Path, shared: int) -> Sample:
    """Looks at the controller, its queue and what they hold."""
    controller = psutil.Process(pid)
    queues = []
    for queue in living("queue", chaos):
        with suppress(psutil.NoSuchProcess):  # one that has just died
            queues.append(queue.memory_info().rss)
    return Sample(
        seconds=time.monotonic(),
        controller_mib=controller.memory_info().rss / 2**20,
        queue_mib=max(queues, default=0) / 2**20,
        descriptors=controller.num_fds(),
        processes=len(controller.children(recursive=True)),
        shared_mib=(psutil.disk_usage("/dev/shm").used - shared) / 2**20,
    )


def describe(lives: list[list[Sample]], name: str) -> str:
    """Mean, and growth in the latter half of each controller's life, when what is made once has been made."""
    values, slopes = [], []
    for life in lives:
        latter = life[len(life) // 2 :]
        values += [getattr(sample, name) for sample in life[1:]]  # the first is still starting
        if len(latter) > 4:
            slopes.append(growth([sample.seconds for sample in latter], [getattr(one, name) for one in latter]))
    if not values:
        return "never seen"
    told = ", ".join(f"{slope:+.1f} ± {error:.1f}" for slope, error in slopes) or "no life was long enough"
    return f"mean {mean(values):.1f}, largest {max(values):.1f}; growth an hour in each life: {told}"


def growth(seconds: list[float], values: list[float]) -> tuple[float, float]:
    """Least squares an hour, and twice its standard error."""
    slope, intercept = linear_regression(seconds, values)
    residuals = sum((value - slope * x - intercept) ** 2 for x, value in zip(seconds, values, strict=True))
    error = math.sqrt(residuals / (len(values) - 2) / (pvariance(seconds) * len(values)))
    return slope * 3600, 2 * error * 3600


def main() -> int:
    """Runs one of the trials; 1 where it failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.endurance")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--soak-minutes", type=float, default=0)
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one if not given")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        if options.kills:
            return kill_controller(folder, kills=options.kills, engine=options.engine, seed=options.seed)
        return soak(folder, minutes=options.soak_minutes, engine=options.engine, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
