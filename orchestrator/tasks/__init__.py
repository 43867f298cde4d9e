"""Tasks by the name of `task.kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError
from orchestrator.tasks.addition import AdditionTask
from orchestrator.tasks.files import FileTask

if TYPE_CHECKING:
    from conf.schema import TaskConfig
    from orchestrator.tasks.base import Task


def build_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` describes; `seed` orders its training stream.

    Raises:
        ConfigError: An unknown kind, or files without a path.
        DataError: A file or a record in it is refused.
    """
    if config.kind == "addition":
        return AdditionTask(digits=config.digits, seed=seed)
    if config.kind in ("prompts", "gsm8k"):
        return FileTask(config, seed=seed)
    raise ConfigError(f"task.kind={config.kind!r} is not known; choose addition, prompts or gsm8k.")
