"""What the rest of the system must know of each objective, without loading torch (`learners/losses/` has the code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Facts of one preference term.

    Example: ``Objective(unit="group", reference=False)``
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


_GROUP = Objective(unit="group")
_OWN = Objective(reference=False)

OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(),
    "ln_dpo": Objective(),
    "dpop": Objective(),
    "ipo": Objective(),
    "ipo_sum": Objective(),
    "hinge": Objective(),
    "slic": _OWN,
    "sppo": Objective(graded=True),
    "sppo_hard": Objective(),
    "gpo": Objective(graded=True),
    "kto": Objective(coupled=True, mismatched=True),
    "bco": Objective(coupled=True),
    "bco_pair": Objective(),
    "simpo": _OWN,
    "cpo": _OWN,
    "orpo": _OWN,
    "asft": _OWN,
    "apo_zero": Objective(),
    "apo_down": Objective(),
    "nca_pair": Objective(),
    "nca": _GROUP,
    "infonca": _GROUP,
    "exo_pair": Objective(),
    "exo": _GROUP,
    "aot": Objective(coupled=True),
    "aot_unpaired": Objective(coupled=True),
    "discopop": Objective(),
    "f_dpo": Objective(),
    "rebel": Objective(graded=True),
    "irepo": Objective(graded=True),
    "copg": _GROUP,
    "p3o": Objective(graded=True),
    "p3o_separate": Objective(graded=True),
    "trpa": Objective(),
    "pro": Objective(unit="group", reference=False),
    "aft": Objective(unit="group", reference=False),
    "d2o": _GROUP,
}

COUPLED_LABELS = ("denoised", "posterior")
"""Choices of `loss.labels` that depend on the global batch and on earlier ones."""


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
