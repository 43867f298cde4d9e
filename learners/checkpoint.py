"""Folders of tensors (safetensors) and facts (JSON) that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from orchestrator.errors import ModelError
from orchestrator.files import sync

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FACTS = "trainer.json"


def write_folder(folder: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write each entry of `tensors` as `<entry>.safetensors` and `facts` as JSON; replaces a folder of that name.

    Everything is written and synced beside the target and renamed last, so a process killed at any instant leaves the
    old folder, none, or the new one.
    """
    target = Path(folder)
    partial = target.with_name(f".{target.name}.partial")
    retired = target.with_name(f".{target.name}.retired")
    for leftover in (partial, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, entry in tensors.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in entry.items()}, partial / f"{name}.safetensors")
    (partial / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    for path in [*partial.iterdir(), partial]:
        sync(path)
    if target.exists():
        target.rename(retired)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def read_folder(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and facts that `write_folder` wrote.

    Raises:
        ModelError: the folder is missing, incomplete or damaged.
    """
    target = Path(folder)
    try:
        facts: dict[str, Any] = json.loads((target / _FACTS).read_text())
        tensors = {path.stem: load_file(path) for path in sorted(target.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{target} is not a checkpoint of the learner: {error}") from error
    return tensors, facts
