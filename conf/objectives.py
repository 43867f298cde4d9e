"""What the rest of the system must know of each objective, without loading torch (`learners/losses/` has the code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import LossConfig


_PAIR = ("tail_weight", "weighting")
"""What every term of pairs reads."""
_BETA = (*_PAIR, "beta", "beta_scaling")
"""And one with a beta of each pair."""
_LABELS = ("labels", "label_smoothing")
"""What a term reads that changes when chosen and rejected change places, with their scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Facts of one preference term.

    Example: ``Objective(unit="group", reference=False, reads=("beta",))``
    """

    unit: str = "pair"
    """`pair`: one value a pair; `group`: one a prompt, whose pairs must then share a batch."""
    reference: bool = True
    """Whether the loss depends on a reference policy."""
    coupled: bool = False
    """Whether a value depends on the other pairs of the global batch, or on earlier batches."""
    mismatched: bool = False
    """Whether it needs completions that answer another prompt."""
    graded: bool = False
    """Whether it regresses on the pair's scores or its label: a tie is then a target like any other."""
    by_rank: bool = False
    """Whether a value belongs to a rank in the global batch and to no pair, so that pairs must weigh the same."""
    on_policy: bool = False
    """Whether the reference must be the policy that sampled."""
    reads: tuple[str, ...] = (*_BETA, *_LABELS)
    """Keys of `loss.*` that change it; a test compares with what the code does."""


def _group(*reads: str, reference: bool = True) -> Objective:
    return Objective(unit="group", reference=reference, reads=reads)


_P3O = Objective(on_policy=True, graded=True, reads=(*_PAIR, *_LABELS, "score_scale", "clip"))
_AOT = Objective(coupled=True, by_rank=True, reads=("tail_weight", "beta", *_LABELS))

OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(),
    "ln_dpo": Objective(),
    "dpop": Objective(reads=(*_BETA, *_LABELS, "penalty")),
    "ipo": Objective(),
    "ipo_sum": Objective(),
    "hinge": Objective(),
    "slic": Objective(reference=False, reads=(*_PAIR, *_LABELS, "gamma")),
    "sppo": Objective(graded=True, reads=_BETA),
    "sppo_hard": Objective(),
    "gpo": Objective(graded=True, reads=(*_BETA, "score_scale")),
    "kto": Objective(coupled=True, mismatched=True, reads=(*_BETA, *_LABELS, "desirable_weight", "undesirable_weight")),
    "bco": Objective(coupled=True),
    "bco_pair": Objective(),
    "simpo": Objective(reference=False, reads=(*_BETA, *_LABELS, "gamma")),
    "cpo": Objective(reference=False),
    "orpo": Objective(reference=False),
    "asft": Objective(reference=False, reads=(*_PAIR, *_LABELS)),
    "apo_zero": Objective(),
    "apo_down": Objective(),
    "nca_pair": Objective(),
    "nca": _group("beta", "score_scale"),
    "infonca": _group("beta", "score_scale"),
    "exo_pair": Objective(reads=(*_BETA, *_LABELS, "floor")),
    "exo": _group("beta", "score_scale"),
    "aot": _AOT,
    "aot_unpaired": _AOT,
    "discopop": Objective(),
    "f_dpo": Objective(reads=(*_BETA, *_LABELS, "divergence", "divergence_alpha")),
    "rebel": Objective(graded=True, reads=(*_PAIR, "score_scale")),
    "irepo": Objective(graded=True, reads=(*_BETA, "floor")),
    "copg": _group("beta", "score_scale"),
    "p3o": _P3O,
    "p3o_separate": _P3O,
    "trpa": Objective(reads=(*_BETA, *_LABELS, "anisotropy")),
    "trpa_sum": Objective(reads=(*_BETA, *_LABELS, "anisotropy")),
    "pro": _group("score_scale", reference=False),
    "aft": _group("beta", reference=False),
    "d2o": _group("beta", "negative_weight"),
}

COUPLED_LABELS = ("denoised", "posterior")
"""Choices of `loss.labels` that depend on the global batch and on earlier ones."""
PAIR_LABELS = ("soft", *COUPLED_LABELS)
"""Choices of `loss.labels` that differ from pair to pair."""


def is_coupled(config: LossConfig) -> bool:
    """Whether a pair's loss depends on the other pairs of the global batch, or on earlier batches."""
    chosen = OBJECTIVES[config.name]
    return chosen.coupled or config.labels in COUPLED_LABELS or config.beta_scaling == "implicit"


def takes_sides(config: LossConfig) -> bool:
    """Whether a pair is trained on as chosen over rejected, whatever probability its label gives that."""
    chosen = OBJECTIVES[config.name]
    return config.labels != "soft" and chosen.unit == "pair" and not chosen.graded


def needs_reference(config: LossConfig) -> bool:
    """Whether the composed loss depends on a reference policy."""
    return (
        OBJECTIVES[config.name].reference
        or config.exploration == "selm"
        or config.kl_weight > 0
        or (config.labels == "denoised" or config.beta_scaling == "implicit")
    )


def loss_keys_read(config: LossConfig) -> frozenset[str]:
    """Names of the keys of `loss.*` that change the composed loss beside the others."""
    found = {
        "name",
        "importance_clip",
        "include_prompt",
        "sft_weight",
        "exploration",
        "kl_weight",
        *OBJECTIVES[config.name].reads,
    }
    if config.sft_weight:
        found |= {"sft_target"} | ({"tail_weight"} if config.sft_target == "chosen" else set())
    if config.exploration != "none":
        found |= {"exploration_weight", "tail_weight"}
    if config.exploration == "selm":
        found |= {"beta", "beta_scaling"}
    if "beta_scaling" in found and config.beta_scaling != "none":
        found |= {"beta_scale", "beta_slope" if config.beta_scaling == "margin" else "noise_decay"}
    if "labels" in found and config.labels == "posterior":
        found |= {"noise_decay"}
    if config.labels == "soft":
        found -= {"label_smoothing"}
    if config.divergence != "alpha":
        found -= {"divergence_alpha"}
    return frozenset(found)
