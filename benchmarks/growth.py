"""What the controller costs as generators are added, from 10 to 10,000 of them, under a simulated clock.

    python -m benchmarks.growth

The pool, its slots and dispatcher with over-issue, and the leases of the queue are the real code; generators and
learner are simulated (`benchmarks/simulated.py`): completions of heavy-tailed lengths (log-normal, cut at 2,048
tokens), generators that die every 100 hours, a learner that grows with the generators. Each generator has 2 prompts x 4
completions in an iteration; a batch has 10 pairs. Collecting runs at most two iterations ahead, as `max_staleness=2`
has it, and takes about two thirds of the learner's time. Of 10,000 generators three die in each wave.

    cost     processor time of the controller for each batch, Ray's own included: sampling and the queue, not judging
    busy     share of the time in which the learner is trained, from the second iteration on

Ratio: the largest cost over the smallest.
"""

from __future__ import annotations

import argparse
import gc
import io
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from matplotlib import pyplot
from rich.console import Console

from benchmarks.report import FOLDER, Comparison, report
from benchmarks.simulated import Generator, Learner, Speeds, World, simulated
from conf.compose import compose
from launch.console import make_console
from orchestrator.pools import ActorPool
from orchestrator.rollouts import Draw, Rollouts
from orchestrator.types import Completion, GenerationRequest, Prompt, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIZES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
REPETITIONS = 5
MAX_STALENESS, LEAST_BUSY = 2, 0.95
PROMPTS, COMPLETIONS, BATCH_PAIRS = 2, 4, 10
"""Prompts of a generator in an iteration; completions of a prompt; a prompt makes one pair."""
BATCHES, ITERATIONS = 400, 8
"""How long a simulation is, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one simulation."""

    cost_ms: float
    """A batch."""
    busy: float
    deaths: int


def simulate(size: int, seed: int, speeds: Speeds) -> Outcome:
    """A run with `size` generators."""
    world, config = World(speeds, seed), compose(["pipeline.mode=async"])
    console = make_console("lines", Console(file=io.StringIO()))
    learner = Learner(world, config.pipeline.queue_capacity)
    prompts = [Prompt(id=str(number), text="", token_ids=(1,)) for number in range(PROMPTS * size)]
    sampling = SamplingParams(temperature=1.0, max_tokens=speeds.max_tokens)
    batches = -(-len(prompts) // BATCH_PAIRS)
    iterations = max(ITERATIONS, -(-BATCHES // batches))
    with simulated(world):
        pool: ActorPool[GenerationRequest, Completion] = ActorPool(
            role="generator",
            make=lambda index: Generator(world, index),
            num_actors=size,
            restarts=10**9,
            start_deadline_s=600.0,
        )
        pool.wait_ready()
        rollouts = Rollouts(cast("Any", SimpleNamespace(generators=pool)), config, console, quarantined={})
        gc.collect()
        world.controller_s = 0.0
        for number in range(1, iterations + 1):
            world.run_until(partial(learner.has_finished, number - 1 - MAX_STALENESS))
            draw = Draw(purpose="rollout", iteration=number, num_samples=COMPLETIONS, sampling=sampling)
            rollouts.sample(prompts, [draw])
            with world.outside():
                learner.offer(batches)
        world.run_until(partial(learner.has_finished, iterations))
    counted = learner.busy[batches:]
    start, end = counted[0][0], counted[-1][1]
    return Outcome(
        cost_ms=world.controller_s / learner.batches * 1e3,
        busy=sum(after - before for before, after in counted) / (end - start),
        deaths=10**9 - pool.restarts_left,
    )


def main() -> int:
    """Simulates all sizes, in turn, and keeps the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    options = parser.parse_args()
    found: dict[int, list[Outcome]] = {size: [] for size in options.sizes}
    for seed in range(options.repetitions):
        for size in options.sizes:
            found[size].append(simulate(size, seed, Speeds()))
            print(f"{size:,} generators: {found[size][-1]}", flush=True)
    costs = {size: [one.cost_ms for one in outcomes] for size, outcomes in found.items()}
    busy = {size: statistics.median(one.busy for one in outcomes) for size, outcomes in found.items()}
    medians = [statistics.median(values) for values in costs.values()]
    draw(costs, busy)
    deaths = sum(one.deaths for outcomes in found.values() for one in outcomes)
    code = report(
        Comparison(
            key="control_growth",
            title="The controller as generators are added",
            unit="ms a batch",
            sides={f"{size:,} generators": values for size, values in costs.items()},
            ratio=max(medians) / min(medians),
            most=2.0,
            notes=f"{__doc__.partition('    python')[0].strip()} {__doc__.partition('growth')[2].strip()}"
            f" {deaths} generators died. Learner busy: {min(busy.values()):.3f} at least, {max(busy.values()):.3f} at"
            " most.",
        )
    )
    return code or int(min(busy.values()) < LEAST_BUSY)


def draw(costs: Mapping[int, Sequence[float]], busy: Mapping[int, float]) -> None:
    """Draws docs/images/growth.svg."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    middle = [statistics.median(values) for values in costs.values()]
    spread = [[one - min(values), max(values) - one] for one, values in zip(middle, costs.values(), strict=True)]
    left.errorbar(list(costs), middle, yerr=list(zip(*spread, strict=True)), marker="o", capsize=3)
    left.set(ylabel="controller, ms a batch", ylim=(0, 2 * max(middle)))
    right.plot(list(busy), list(busy.values()), marker="o")
    right.axhline(LEAST_BUSY, linestyle=":", color="gray")
    right.set(ylabel="learner busy", ylim=(0, 1.05))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="generators")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER.parent / "docs" / "images" / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
