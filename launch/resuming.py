"""Refuses to go on with a run that cannot go on: told from its ledger and the headers of its checkpoint's files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.model_files import read_header, read_json
from learners.manifest import check_sizes
from orchestrator import ledger
from orchestrator.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from conf.schema import Config


def check_resumable(config: Config, run_dir: Path) -> None:
    """Whether the last iteration that counts is within the plan, and its checkpoint whole.

    Raises:
        DataError: the ledger cannot be read.
        ConfigError: more iterations are finished than are asked for.
        ModelError: a file of the checkpoint is missing, damaged or cut short.
    """
    if not (run_dir / ledger.FILE_NAME).exists():
        return  # it stopped before it began
    with ledger.LedgerReader(run_dir) as reader:
        last = reader.resume_point()
    if last is None:
        return
    if last.iteration > config.pipeline.iterations:
        raise ConfigError(
            f"pipeline.iterations={config.pipeline.iterations}: {run_dir} has finished {last.iteration} iterations"
            f" already: ask for {last.iteration} or more, or export an earlier one: agon export {run_dir} OUT"
            f" --iteration {config.pipeline.iterations}"
        )
    if last.checkpoint is not None:
        _check_checkpoint(run_dir / last.checkpoint)


def _check_checkpoint(folder: Path) -> None:
    """Sizes and headers; the learner reads and checks what the files hold."""
    try:
        for name in check_sizes(folder):
            if name.endswith(".safetensors"):
                read_header(folder / name)
            else:
                read_json(folder / name)
    except ModelError as error:
        raise ModelError(
            f"{error}. This is the checkpoint of the last iteration, without which the run cannot go on; or start"
            " a new run: agon run --config"
            f" {folder.parent.parent / 'config.yaml'} run_dir=..."
        ) from error
