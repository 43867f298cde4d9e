"""What an objective is given, and what it returns.

An objective is one file: a pure function of a `LossInput` and the `LossConfig`, with its paper and equation in the
docstring, an entry in `learners/losses/__init__.py` and its facts in `conf/objectives.py`. It returns one value a pair,
or one a group (a prompt with its completions); it neither weights nor averages them: `objective` composes, and the
step averages over the global batch.

Shapes: C completion tokens, S completions, G groups, K most completions of a group, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from conf.schema import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossInput:
    """Completions with their log-probs, and the pairs and groups they form.

    Sums are over completion tokens, the terminating EOS included, in nats: h is a log-ratio log pi - log pi_ref, a bar
    its mean per token, w the chosen and l the rejected completion, Delta = h_w - h_l.
    """

    logprobs: Tensor
    """[C] log pi of each token, completions end to end; carries the gradient."""
    reference: Tensor
    """[C] log pi_ref of each token; zeros without a reference."""
    lengths: Tensor
    """[S] tokens, int64, at least 1."""
    groups: Tensor
    """[S] group of each completion, int64, from 0, non-decreasing."""
    chosen: Tensor
    """[P] index of the chosen completion among the S, int64."""
    rejected: Tensor
    """[P] index of the rejected completion, int64."""
    labels: Tensor
    """[P] probability that chosen is the better one."""
    weights: Tensor
    """[P] multiplies the pair's loss."""
    score_chosen: Tensor
    """[P] in the scorer's units; a win probability for objectives that regress to one."""
    score_rejected: Tensor
    """[P]"""
    beta: Tensor
    """[P] strength of the pull towards the reference."""
    mismatched: Tensor
    """[G] index of a completion that answers another prompt, or [0]: for KL baselines."""
    log_collision: Tensor | None = None
    """[C] log of the sum of squared probabilities of the vocabulary at each token; for WPO."""
    chosen_token_weights: Tensor | None = None
    """[tokens of all chosen, pair after pair]; None: all 1."""
    rejected_token_weights: Tensor | None = None
    """[tokens of all rejected, pair after pair]; None: all 1."""

    @property
    def logprob(self) -> Tensor:
        """[S] log pi(completion)."""
        return _sums(self.logprobs, self.lengths)

    @property
    def log_ratio(self) -> Tensor:
        """[S] h."""
        return _sums(self.logprobs - self.reference, self.lengths)

    @property
    def logprob_chosen(self) -> Tensor:
        """[P] log pi(chosen), tokens weighted."""
        return self._side(self.logprobs, self.chosen, self.chosen_token_weights)

    @property
    def logprob_rejected(self) -> Tensor:
        """[P] log pi(rejected), tokens weighted."""
        return self._side(self.logprobs, self.rejected, self.rejected_token_weights)

    @property
    def reference_chosen(self) -> Tensor:
        """[P] log pi_ref(chosen), tokens weighted."""
        return self._side(self.reference, self.chosen, self.chosen_token_weights)

    @property
    def reference_rejected(self) -> Tensor:
        """[P] log pi_ref(rejected), tokens weighted."""
        return self._side(self.reference, self.rejected, self.rejected_token_weights)

    @property
    def log_ratio_chosen(self) -> Tensor:
        """[P] h_w."""
        return self.logprob_chosen - self.reference_chosen

    @property
    def log_ratio_rejected(self) -> Tensor:
        """[P] h_l."""
        return self.logprob_rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """[P] Delta, without beta."""
        return self.log_ratio_chosen - self.log_ratio_rejected

    @property
    def length_chosen(self) -> Tensor:
        """[P] tokens, as float."""
        return self.lengths[self.chosen].to(self.logprobs.dtype)

    @property
    def length_rejected(self) -> Tensor:
        """[P] tokens, as float."""
        return self.lengths[self.rejected].to(self.logprobs.dtype)

    @property
    def mean_chosen(self) -> Tensor:
        """[P] log pi(chosen) a token."""
        return self.logprob_chosen / self.length_chosen

    @property
    def mean_rejected(self) -> Tensor:
        """[P] log pi(rejected) a token."""
        return self.logprob_rejected / self.length_rejected

    @property
    def mean_margin(self) -> Tensor:
        """[P] mean of h_w per token minus that of h_l."""
        return self.log_ratio_chosen / self.length_chosen - self.log_ratio_rejected / self.length_rejected

    @property
    def score_margin(self) -> Tensor:
        """[P] score of chosen minus score of rejected, in the scorer's units."""
        return self.score_chosen - self.score_rejected

    @property
    def num_groups(self) -> int:
        """G."""
        return int(self.groups[-1]) + 1

    @property
    def scores(self) -> Tensor:
        """[S] the score of each completion, as its pairs tell it; 0 for one that is in none."""
        scores = torch.zeros_like(self.lengths, dtype=self.logprobs.dtype)
        scores = scores.index_copy(0, self.chosen, self.score_chosen)
        return scores.index_copy(0, self.rejected, self.score_rejected)

    def swapped(self) -> LossInput:
        """The same pairs with the opposite labels."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            labels=1 - self.labels,
            score_chosen=self.score_rejected,
            score_rejected=self.score_chosen,
            chosen_token_weights=self.rejected_token_weights,
            rejected_token_weights=self.chosen_token_weights,
        )

    def to(self, device: torch.device | str) -> LossInput:
        """The same on another device, without gradient."""
        moved: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            moved[name] = None if value is None else value.detach().to(device)
        return LossInput(**moved)

    def by_group(self, values: Tensor, fill: float) -> Tensor:
        """[G, K] of [S] values, each group's completions side by side and then `fill`."""
        sizes = torch.bincount(self.groups, minlength=self.num_groups)
        place = torch.arange(len(self.groups), device=values.device) - (sizes.cumsum(0) - sizes)[self.groups]
        table = torch.full((self.num_groups, int(sizes.max())), fill, dtype=values.dtype, device=values.device)
        return table.index_put((self.groups, place), values)

    def group_mean(self, values: Tensor) -> Tensor:
        """[G] means of [P] values over the pairs of each group."""
        groups = self.groups[self.chosen]
        zeros = torch.zeros(self.num_groups, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, groups, values) / zeros.index_add(0, groups, torch.ones_like(values)).clamp(min=1)

    def tokens_of(self, completions: Tensor) -> Tensor:
        """Indices into [C] of the tokens of each of `completions` [n], one after the other."""
        lengths = self.lengths[completions]
        starts = (self.lengths.cumsum(0) - self.lengths)[completions]
        shift = starts - (lengths.cumsum(0) - lengths)
        total = int(lengths.sum())
        return torch.repeat_interleave(shift, lengths) + torch.arange(total, device=lengths.device)

    def _side(self, values: Tensor, completions: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return _sums(values, self.lengths).index_select(0, completions)
        return _sums(values[self.tokens_of(completions)] * weights, self.lengths[completions])


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[n] sums of the values of n runs that lie end to end."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0)


def concatenate(inputs: list[LossInput]) -> LossInput:
    """One input of several, as if their batches had been one."""
    completions = [len(part.lengths) for part in inputs]
    groups = [part.num_groups for part in inputs]
    first = [sum(completions[:index]) for index in range(len(inputs))]
    first_group = [sum(groups[:index]) for index in range(len(inputs))]

    def joined(name: str, offsets: list[int] | None = None) -> Tensor:
        parts = [getattr(part, name) for part in inputs]
        return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=True)] if offsets else parts)

    def optional(name: str) -> Tensor | None:
        return joined(name) if all(getattr(part, name) is not None for part in inputs) else None

    return LossInput(
        logprobs=joined("logprobs"),
        reference=joined("reference"),
        lengths=joined("lengths"),
        groups=joined("groups", first_group),
        chosen=joined("chosen", first),
        rejected=joined("rejected", first),
        labels=joined("labels"),
        weights=joined("weights"),
        score_chosen=joined("score_chosen"),
        score_rejected=joined("score_rejected"),
        beta=joined("beta"),
        mismatched=joined("mismatched", first),
        log_collision=optional("log_collision"),
        chosen_token_weights=optional("chosen_token_weights"),
        rejected_token_weights=optional("rejected_token_weights"),
    )


Loss = Callable[[LossInput, "LossConfig"], Tensor]
"""[P] or [G] losses, before weights and before any mean."""
