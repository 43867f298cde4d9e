"""The model a run starts from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from launch.model_cache import made_once
from launch.model_files import find_model
from orchestrator.tasks import addition
from orchestrator.tasks.addition import AdditionTask

if TYPE_CHECKING:
    from collections.abc import Callable

    from conf.schema import Config, ModelConfig

    Progress = Callable[[int, int, float, float], None]
    """Called after each step with (step, most steps, loss, last accuracy seen)."""

FOLDER = "initial_model"


def initial_model(config: Config, run_dir: Path) -> Path:
    """Its folder: the one the user named, or the run's own copy of the tiny model.

    Raises:
        ModelError: there is none.
    """
    if config.model.kind == "tiny":
        return run_dir / FOLDER
    return find_model(str(config.model.path))


def prepare_initial_model(config: Config, run_dir: Path, progress: Progress | None = None) -> Path:
    """Makes the tiny model where it is asked for, and copies it into the run folder, which then needs no cache.

    Args:
        config: of the run.
        run_dir: its folder.
        progress: see `ensure_tiny_model`.
    """
    folder = initial_model(config, run_dir)
    if config.model.kind == "tiny" and not folder.is_dir():
        made = ensure_tiny_model(config.model, AdditionTask(digits=config.task.digits), progress=progress)
        partial = folder.with_name(f".{FOLDER}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial)
        partial.rename(folder)
    return folder


def ensure_tiny_model(
    model: ModelConfig, task: AdditionTask, *, progress: Progress | None = None, cache: Path | None = None
) -> Path:
    """The folder of the warm-started tiny model, made on first use.

    Args:
        model: `kind="tiny"`; its size, seed and target accuracy.
        task: Gives demonstrations and tuning problems; its training and test problems are never touched.
        progress: Called after each step; not called when the model is in the cache.
        cache: Where models are kept; None: `default_cache`.

    Raises:
        ModelError: The target accuracy was not reached within `model.tiny.max_steps`.
    """

    def make(folder: Path) -> None:
        from launch.warm_start import make_tiny_model  # and with it torch: a second, where the model has to be made

        make_tiny_model(model, task, progress, folder)

    return made_once(_fingerprint(model, task), make, cache=cache)


def _fingerprint(model: ModelConfig, task: AdditionTask) -> str:
    """Changes with the settings and with the code that the model is made by."""
    made_by = [Path(addition.__file__), *map(Path(__file__).with_name, ("tiny.py", "warm_start.py"))]
    if model.tiny.judge_steps:
        made_by.append(Path(__file__).with_name("judge_start.py"))
    settings = asdict(model.tiny) | {"max_length": model.max_length, "digits": task.digits}
    digest = xxhash.xxh3_64(json.dumps(settings, sort_keys=True).encode())
    for source in made_by:
        digest.update(source.read_bytes())
    return f"tiny-{digest.hexdigest()}"
