"""What the `config.json` of a preference or reward model says; loads no torch, so that a run can refuse at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from orchestrator.errors import ModelError

KINDS = ("preference_model", "gpm", "reward_model")
SECTION = "preference_model"
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What is put on the backbone. Example: ``HeadConfig(kind="gpm", dim=4, temperature=0.1, likelihood=False)``."""

    kind: str
    """One of `KINDS`."""
    dim: int = 2
    """Width of a gpm's embedding, even; the others have a scalar."""
    temperature: float = 0.1
    """tau of a gpm, above 0. Scores of two-dimensional embeddings lie in [-1, 1]: 0.1 lets P reach sigmoid(10)."""
    likelihood: bool = False
    """Also read how likely the backbone, a causal language model, finds the answer. Published heads do not; a backbone
    of a million parameters has no room to tell right from wrong in its last hidden state alone."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"{self.kind!r} is no kind of preference model; choose {', '.join(KINDS)}")
        if self.dim < 2 or self.dim % 2:
            raise ModelError(
                f"a gpm's embedding has blocks of two; found dim={self.dim}: choose an even number above 0"
            )

    @property
    def width(self) -> int:
        """Of the readout."""
        return self.dim if self.kind == "gpm" else 1


def read_config(folder: str | Path) -> dict[str, Any]:
    """The object in `config.json` of a preference or reward model.

    Raises:
        ModelError: there is none, or it is of another kind of model.
    """
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); name a folder that agon train-judge wrote") from error
    if SECTION not in config and not any(name.endswith(CLASSIFIER) for name in config.get("architectures") or []):
        raise ModelError(
            f"{path}: neither a model of agon train-judge nor a sequence classifier, but"
            f" {config.get('architectures')}: train one from it with agon train-judge"
        )
    return config


def model_kind(folder: str | Path) -> str:
    """One of `KINDS`. Raises ModelError as `read_config` does."""
    section = read_config(folder).get(SECTION)
    return "reward_model" if section is None else str(section["kind"])


def weights_digest(folder: str | Path) -> str:
    """xxh3-64 over the bytes of all safetensors files, in the order of their names."""
    digest = xxhash.xxh3_64()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
