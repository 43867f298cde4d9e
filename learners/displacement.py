"""How likely training on a pair makes the chosen completion less probable, seen in the hidden states of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The centered hidden embedding similarity of pairs: <s_w, s_l> - |s_w|^2, [P].

    The higher, the more a step that pushes the rejected completion away takes the chosen one with it. With sums this is
    the CHES score of Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference
    Optimization" (arXiv:2410.08847); with means over each completion's tokens, its length-normalized form.

    Args:
        chosen: [P, D] sums, or means, of the last hidden states that predict each chosen completion's tokens.
        rejected: [P, D] the same of the rejected ones.
    """
    return ((rejected - chosen) * chosen).sum(-1)
