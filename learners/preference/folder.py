"""A preference model as a folder, and back.

    config.json           the backbone's, with `preference_model`: the head, max_length and the digest of the weights
    model.safetensors     the backbone
    readout.safetensors   the head
    tokenizer files

`AutoModelForSequenceClassification` with one label is read as well: that is how reward models are published.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from learners.loading import load, tokenizer_of
from learners.preference.config import SECTION, HeadConfig, read_config, weights_digest
from learners.preference.encoding import Encoder
from learners.preference.model import Classifier, PreferenceModel
from orchestrator.errors import ModelError

READOUT = "readout.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A preference model that is ready to read."""

    model: PreferenceModel
    encoder: Encoder
    digest: str
    """xxh3-64 of its weights, 16 hex digits: its version."""


def new_model(folder: str | Path, head: HeadConfig, *, max_length: int) -> tuple[PreferenceModel, Encoder]:
    """A model to be trained: the backbone of a model folder in fp32, dropout off, under a fresh head.

    The head's weights come from torch's global generator: seed it.

    Raises:
        ModelError: the folder holds no model of the kind that is needed, or a tokenizer without an end of sequence.
    """
    loader = AutoModelForCausalLM if head.likelihood else AutoModel
    model = PreferenceModel(load(loader, folder, torch.float32), head)
    return model, Encoder(load_tokenizer(folder), max_length)


def save_model(model: PreferenceModel, encoder: Encoder, folder: Path) -> str:
    """Writes a folder that `load_model` reads, whole or not at all; what was there is replaced. Returns the digest."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.backbone.save_pretrained(partial)
    head = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith("backbone")}
    save_file(head, partial / READOUT)
    encoder.tokenizer.save_pretrained(partial)
    digest = weights_digest(partial)
    path = partial / "config.json"
    section = asdict(model.head) | {"max_length": encoder.max_length, "digest": digest}
    path.write_text(json.dumps(json.loads(path.read_text()) | {SECTION: section}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return digest


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Reads what `save_model` or transformers wrote: safetensors only, no code that comes with the model.

    Raises:
        ModelError: the folder holds neither, or its weights are not those that were saved with its config.
    """
    config = read_config(folder)
    if SECTION not in config:
        return _load_classifier(folder, config, dtype)
    section = dict(config[SECTION])
    digest, max_length = section.pop("digest"), section.pop("max_length")
    if (found := weights_digest(folder)) != digest:
        raise ModelError(
            f"{folder}: its weights have the digest {found}, but config.json says {digest}: files of two models are"
            " mixed or one was cut short; fetch the folder again"
        )
    head = HeadConfig(**section)
    loader = AutoModelForCausalLM if head.likelihood else AutoModel
    model = PreferenceModel(load(loader, folder, dtype), head)
    head_weights = load_file(Path(folder) / READOUT)
    model.load_state_dict(head_weights | {f"backbone.{name}": w for name, w in model.backbone.state_dict().items()})
    return LoadedModel(model=model.eval(), encoder=Encoder(load_tokenizer(folder), max_length), digest=digest)


def _load_classifier(folder: str | Path, config: dict[str, Any], dtype: torch.dtype) -> LoadedModel:
    classifier: Any = load(AutoModelForSequenceClassification, folder, dtype)
    tokenizer = load_tokenizer(folder)
    if classifier.config.num_labels != 1:
        raise ModelError(
            f"{folder}: a classifier of {classifier.config.num_labels} classes; a reward model has one label"
        )
    if classifier.config.pad_token_id is None:
        classifier.config.pad_token_id = tokenizer.pad_token_id
    if classifier.config.pad_token_id is None:
        raise ModelError(f"{folder / Path('config.json')}: no pad_token_id, by which the model finds an answer's end")
    max_length = config.get("max_position_embeddings") or config.get("n_positions") or tokenizer.model_max_length
    return LoadedModel(
        model=Classifier(classifier).eval(), encoder=Encoder(tokenizer, max_length), digest=weights_digest(folder)
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder. Raises ModelError where it cannot be loaded or has no end of sequence."""
    tokenizer = tokenizer_of(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no end-of-sequence token, by which an answer's end is read")
    return tokenizer
