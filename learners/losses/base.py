"""What a preference loss is given, and what it returns.

A loss is one file: a pure function of a `LossInput` and the `LossConfig` that returns one value a pair, with its paper
and equation in the docstring, and an entry in `learners/losses/__init__.py`. It neither weights nor averages pairs:
the step does, over the global batch.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from conf.schema import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossInput:
    """The quantities of P pairs that preference losses are made of. Log-probs are sums over completion tokens, fp32.

    Example: the pair that tests work out by hand is ``logprob_chosen=-20, logprob_rejected=-25.2, reference_chosen=-21,
    reference_rejected=-22.5, length_chosen=10, length_rejected=12``.
    """

    logprob_chosen: Tensor
    """[P] log pi(chosen), nats; carries the gradient."""
    logprob_rejected: Tensor
    """[P] log pi(rejected), nats; carries the gradient."""
    reference_chosen: Tensor
    """[P] log pi_ref(chosen), nats."""
    reference_rejected: Tensor
    """[P] log pi_ref(rejected), nats."""
    length_chosen: Tensor
    """[P] tokens, the terminating EOS included, as float."""
    length_rejected: Tensor
    """[P] tokens, as float."""
    score_chosen: Tensor
    """[P] score of chosen, in the scorer's units; a win probability for losses that regress to one."""
    score_rejected: Tensor
    """[P] score of rejected."""
    score_margin: Tensor
    """[P] score of chosen minus score of rejected, in the scorer's units."""

    @property
    def log_ratio_chosen(self) -> Tensor:
        """[P] h_w = log pi(chosen) - log pi_ref(chosen)."""
        return self.logprob_chosen - self.reference_chosen

    @property
    def log_ratio_rejected(self) -> Tensor:
        """[P] h_l = log pi(rejected) - log pi_ref(rejected)."""
        return self.logprob_rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """[P] Delta = h_w - h_l, without beta."""
        return self.log_ratio_chosen - self.log_ratio_rejected


PairLoss = Callable[[LossInput, "LossConfig"], Tensor]
"""[P] losses of P pairs, before weights and before any mean."""
