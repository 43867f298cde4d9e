"""`agon train-judge`: from pairs of answers to the folder of a preference or reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from learners.preference.data import hold_out, make_groups, read_labelled_pairs
from learners.preference.folder import new_model, save_model
from learners.preference.training import measure, train
from orchestrator.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from learners.preference.config import HeadConfig
    from learners.preference.training import TrainingConfig


def train_judge(
    files: Sequence[Path],
    out: Path,
    *,
    model_dir: Path,
    head: HeadConfig,
    training: TrainingConfig,
    max_length: int,
    held_out: float,
) -> str:
    """Trains, measures, saves, and says how good the judge is.

    Args:
        files: pairs of runs, or JSONL or Parquet files with prompt, chosen, rejected and maybe label.
        out: a folder that does not exist yet.
        model_dir: of the causal language model that it starts from.
        head: which kind of model.
        training: how it is trained.
        max_length: context of the model, tokens; longer pairs are left out and counted.
        held_out: share of the prompts it is measured on and not trained on.

    Raises:
        UserError: a file, a pair or the model is refused, or `out` exists.
    """
    if out.exists():
        raise ModelError(f"{out} exists: name a folder that does not exist yet")
    pairs = [pair for path in files for pair in read_labelled_pairs(path)]
    parts = hold_out(pairs, held_out)
    for what, part in zip(("to train on", "to measure on"), parts, strict=True):
        if not part:
            raise DataError(f"of {len(pairs)} pairs none is left {what}: change --held-out={held_out:g} or give more")
    disable_progress_bar()
    torch.manual_seed(training.seed)
    model, encoder = new_model(model_dir, head, max_length=max_length)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    groups, dropped = zip(
        *(make_groups(part, encoder, side_by_side=head.kind == "preference_model") for part in parts), strict=True
    )
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=None)

        def show(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training  loss {loss:.3f}")

        train(model, groups[0], training, show)
    quality = measure(model, groups[1])
    digest = save_model(model, encoder, out.absolute())
    left_out = f", {sum(dropped)} pairs too long" if sum(dropped) else ""
    return "\n".join(
        [
            f"held out        {quality.comparisons} comparisons of {len(groups[1])} prompts{left_out}",
            f"accuracy        {quality.accuracy:.3f}",
            f"loss            {quality.loss:.3f} nats a comparison (a coin flip: 0.693)",
            f"calibration     {quality.calibration_error:.3f} expected error of its probabilities",
            f"{head.kind:<15} {out}  version {digest[:8]}",
        ]
    )
