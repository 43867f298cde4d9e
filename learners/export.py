"""A policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from learners.checkpoint import Checkpoint
from learners.loading import tokenizer_of
from learners.policy import DTYPES, load_model
from orchestrator.errors import ModelError


def write_model(model_dir: str, checkpoint: str | None, dtype: str, folder: str) -> None:
    """Writes a policy with its tokenizer.

    Args:
        model_dir: the initial model.
        checkpoint: holds the trained weights; None: the initial ones.
        dtype: "float32" or "bfloat16", of the weights that are written.
        folder: where; made.

    Raises:
        ModelError: the checkpoint is damaged, or of another model.
    """
    disable_progress_bar()
    model: Any = load_model(model_dir)
    if checkpoint is not None:
        _load_weights(model, checkpoint, model_dir)
    model.to(DTYPES[dtype]).save_pretrained(folder)
    tokenizer_of(model_dir).save_pretrained(folder)


def _load_weights(model: Any, checkpoint: str, model_dir: str) -> None:
    live = dict(model.named_parameters())
    weights = Checkpoint(checkpoint).read("weights")
    if weights.keys() != live.keys():
        raise ModelError(f"{checkpoint} was saved from another model than {model_dir}")
    with torch.no_grad():
        for name, tensor in weights.items():
            live[name].copy_(tensor)
