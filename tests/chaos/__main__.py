"""`make chaos`: every role dies at every point of a run, and an independent check finds nothing lost or repeated.

python -m tests.chaos                                   all cells, three times each
python -m tests.chaos --cells "generator while scoring" --repetitions 1
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

from tests.chaos.cells import MODES, Cell, Outcome, play, reference_run
from tests.chaos.saboteur import POINTS, ROLES


def main() -> int:
    """Plays the cells; 1 where anything was lost, repeated, stale or otherwise wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    every = [Cell(point=point, role=role) for role, point in product(ROLES, POINTS)]
    parser.add_argument("--cells", nargs="+", help='such as "learner while optimizer step"; all if not given')
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mode", default="sync", choices=tuple(MODES), help="pipeline.mode of the runs")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--jobs", type=int, default=2, help="cells at once; two keep two cores busy")
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one if not given")
    options = parser.parse_args()
    cells = [cell for cell in every if not options.cells or str(cell) in options.cells]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return play_all(cells, options, folder)


def play_all(cells: list[Cell], options: argparse.Namespace, folder: Path) -> int:
    """Prints a line a cell and the sums; returns the exit code."""
    chosen = {"folder": folder, "engine": options.engine, "mode": options.mode}
    chosen["expected"] = reference_run(**chosen)

    def repeat(numbered: tuple[int, Cell]) -> list[Outcome]:
        number, cell = numbered
        return [
            play(cell, name=f"{number:02d}-{visit}", visit=visit, **chosen)
            for visit in range(1, options.repetitions + 1)
        ]

    every: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for cell, outcomes in zip(cells, pool.map(repeat, enumerate(cells)), strict=True):
            every += outcomes
            seconds = [outcome.recovery_s for outcome in outcomes if not math.isnan(outcome.recovery_s)]
            times = f"after {median(seconds):.1f} s (at most {max(seconds):.1f})" if seconds else "never"
            print(f"{cell}: recovered {times}", flush=True)
            for finding in (finding for outcome in outcomes for finding in outcome.findings):
                print(f"    {finding}", flush=True)
    lost, repeated, stale = (sum(getattr(one, name) for one in every) for name in ("lost", "repeated", "stale"))
    print(f"chaos: {len(cells)} cells, {len(every)} runs, {lost} lost, {repeated} repeated, {stale} stale")
    return int(any(outcome.findings for outcome in every))


if __name__ == "__main__":
    sys.exit(main())
