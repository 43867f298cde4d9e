"""The model a run starts from."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from launch.model_files import find_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conf.schema import Config

FOLDER = "initial_model"


def initial_model(config: Config, run_dir: Path) -> Path:
    """Its folder: the one the user named, or the run's own copy of the tiny model.

    Raises:
        ModelError: there is none.
    """
    if config.model.kind == "tiny":
        return run_dir / FOLDER
    return find_model(str(config.model.path))


def prepare_initial_model(
    config: Config, run_dir: Path, progress: Callable[[int, int, float, float], None] | None = None
) -> Path:
    """Makes the tiny model where it is asked for, and copies it into the run folder, which then needs no cache.

    Args:
        config: of the run.
        run_dir: its folder.
        progress: see `ensure_tiny_model`.
    """
    folder = initial_model(config, run_dir)
    if config.model.kind == "tiny" and not folder.is_dir():
        from launch.warm_start import ensure_tiny_model
        from orchestrator.tasks.addition import AdditionTask

        made = ensure_tiny_model(config.model, AdditionTask(digits=config.task.digits), progress=progress)
        partial = folder.with_name(f".{FOLDER}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial)
        partial.rename(folder)
    return folder
