"""The preference terms by name: a new one is a file beside these, a line here and its facts in `conf/objectives.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learners.losses.aot import aot, aot_unpaired
from learners.losses.apo import apo_down, apo_zero
from learners.losses.bco import bco, bco_pair
from learners.losses.discopop import discopop
from learners.losses.dpo import dpo, dpop, ln_dpo
from learners.losses.exo import exo, exo_pair
from learners.losses.f_dpo import f_dpo
from learners.losses.hinge import hinge, slic
from learners.losses.ipo import ipo, ipo_sum
from learners.losses.kto import kto
from learners.losses.nca import infonca, nca, nca_pair
from learners.losses.p3o import p3o, p3o_separate
from learners.losses.ranking import aft, d2o, pro
from learners.losses.regression import copg, irepo, rebel
from learners.losses.simpo import asft, cpo, orpo, simpo
from learners.losses.sppo import gpo, sppo, sppo_hard
from learners.losses.trpa import trpa, trpa_sum
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import Loss, LossInput
    from learners.losses.state import LossState

LOSSES: dict[str, Loss] = {
    "dpo": dpo,
    "ln_dpo": ln_dpo,
    "dpop": dpop,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "hinge": hinge,
    "slic": slic,
    "sppo": sppo,
    "sppo_hard": sppo_hard,
    "gpo": gpo,
    "kto": kto,
    "bco_pair": bco_pair,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "asft": asft,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "nca_pair": nca_pair,
    "nca": nca,
    "infonca": infonca,
    "exo_pair": exo_pair,
    "exo": exo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "f_dpo": f_dpo,
    "rebel": rebel,
    "irepo": irepo,
    "copg": copg,
    "p3o": p3o,
    "p3o_separate": p3o_separate,
    "trpa": trpa,
    "trpa_sum": trpa_sum,
    "pro": pro,
    "aft": aft,
    "d2o": d2o,
}
"""By `LossConfig.name`; those that remember stand in `STATEFUL`."""

STATEFUL = {"bco": bco}


def term(inputs: LossInput, config: LossConfig, state: LossState) -> Tensor:
    """[P] or [G] values of the configured preference term.

    Raises:
        ConfigError: it has no such name.
    """
    if config.name in STATEFUL:
        return STATEFUL[config.name](inputs, config, state)
    if config.name not in LOSSES:
        known = ", ".join(sorted([*LOSSES, *STATEFUL]))
        raise ConfigError(f"loss.name is {config.name!r}; it must be one of {known}")
    return LOSSES[config.name](inputs, config)
