"""`agon export`: a finished iteration as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from conf.compose import compose
from launch.initial_model import initial_model
from launch.machines import existing_parent
from learners.checkpoint import Checkpoint
from learners.policy import DTYPES, load_model
from orchestrator.errors import ModelError
from orchestrator.ledger import LedgerReader

if TYPE_CHECKING:
    from orchestrator.ledger import FinishedIteration


def export(run: Path, out: Path, iteration: int | None = None, *, replace: bool = False) -> Path:
    """Writes the policy of an iteration with its tokenizer; transformers and vLLM load the folder.

    Args:
        run: the run folder.
        out: where to write; must not exist, or be empty.
        iteration: which one; None: the last that has a checkpoint, or the initial model where none was promoted.
        replace: take the place of what `out` holds, once the new folder is whole.

    Raises:
        ConfigError: `run` holds no run.
        ModelError: the run has no checkpoint of that iteration, it is damaged, or `out` holds something.
    """
    out = out.absolute()
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is not empty: name a folder that does not exist yet")
    if not os.access(existing_parent(out), os.W_OK):
        raise ModelError(f"{out} cannot be made: {existing_parent(out)} is not writable for you")
    config = compose([], run / "config.yaml")
    model_dir = initial_model(config, run)
    checkpoint = _find(run, iteration)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    disable_progress_bar()
    model = load_model(model_dir)
    if checkpoint is not None:
        _load_weights(model, run / checkpoint, model_dir)
    model.to(DTYPES[config.model.dtype]).save_pretrained(partial)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def _load_weights(model: Any, checkpoint: Path, model_dir: Path) -> None:
    live = dict(model.named_parameters())
    weights = Checkpoint(checkpoint).read("weights")
    if weights.keys() != live.keys():
        raise ModelError(f"{checkpoint} was saved from another model than {model_dir}")
    with torch.no_grad():
        for name, tensor in weights.items():
            live[name].copy_(tensor)


def _find(run: Path, iteration: int | None) -> Path | None:
    """The checkpoint of an iteration; None is the initial model, where all that was trained was given up."""
    with LedgerReader(run) as ledger:
        finished = ledger.finished()
    if iteration is None and len(finished) > 1 and finished[-1].checkpoint is None:
        return None
    saved = [done for done in finished if done.checkpoint and (run / done.checkpoint).is_dir()]
    if not saved:
        raise ModelError(f"{run} has no checkpoint yet: no iteration was finished")
    chosen: FinishedIteration | None = saved[-1]
    if iteration is not None:
        chosen = next((done for done in saved if done.iteration == iteration), None)
    if chosen is None or chosen.checkpoint is None:
        have = ", ".join(str(done.iteration) for done in saved)
        raise ModelError(
            f"{run} keeps no checkpoint of iteration {iteration}; it has {have} (pipeline.keep_checkpoints)"
        )
    return Path(chosen.checkpoint)
