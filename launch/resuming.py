"""Refuses to go on with a run that cannot go on: told from its ledger.

A checkpoint that is damaged refuses nothing: the learner goes on from the one before (`orchestrator/learning.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator import ledger
from orchestrator.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from conf.schema import Config


_LEFT = ("checkpoints", "pairs", "rollouts")


def check_resumable(config: Config, run_dir: Path) -> None:
    """Whether the last iteration that counts is within the plan.

    Raises:
        DataError: the ledger cannot be read, or is gone where there is what only a run with a ledger leaves.
        ConfigError: more iterations are finished than are asked for.
    """
    if not (run_dir / ledger.FILE_NAME).exists():
        left = [name for name in _LEFT if any((run_dir / name).glob("*"))]
        if left:
            raise DataError(
                f"{run_dir} has no {ledger.FILE_NAME}, which says what of its {' and '.join(left)} counts: bring it"
                " back from where the folder was copied from, or start a new run"
            )
        return  # it stopped before it began
    with ledger.LedgerReader(run_dir) as reader:
        reader.check()
        last = reader.resume_point()
    if last is None:
        return
    if last.iteration > config.pipeline.iterations:
        raise ConfigError(
            f"pipeline.iterations={config.pipeline.iterations}: {run_dir} has finished {last.iteration} iterations"
            f" already: ask for {last.iteration} or more, or export an earlier one: agon export {run_dir} OUT"
            f" --iteration {config.pipeline.iterations}"
        )
