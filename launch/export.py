"""`agon export`: a finished iteration as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import compose
from launch.initial_model import initial_model
from launch.machines import existing_parent
from orchestrator.errors import ModelError
from orchestrator.ledger import LedgerReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.ledger import FinishedIteration

    Write = Callable[[str, str | None, str, str], object]


def export(
    run: Path, out: Path, iteration: int | None = None, *, replace: bool = False, write: Write | None = None
) -> Path:
    """Writes the policy of an iteration with its tokenizer; transformers and vLLM load the folder.

    Args:
        run: the run folder.
        out: where to write; must not exist, or be empty.
        iteration: which one; None: the last that has a checkpoint, or the initial model where none was promoted.
        replace: take the place of what `out` holds, once the new folder is whole.
        write: does what `learners.export.write_model` does, in another process; None: in this one.

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
    partial = out.with_name(f".{out.name}.partial")
    if write is None:
        from learners.export import write_model

        write = write_model
    checkpoint = _find(run, iteration)
    while True:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write(str(model_dir), str(run / checkpoint) if checkpoint else None, config.model.dtype, str(partial))
            break
        except ModelError:
            before, checkpoint = checkpoint, _find(run, iteration)
            if checkpoint == before:  # else the run goes on, and has let go of the one that was being read
                raise
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


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
