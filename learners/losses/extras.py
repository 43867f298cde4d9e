"""Terms that are added to any objective, one value a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def extras(inputs: LossInput, config: LossConfig) -> Tensor | None:
    """[P] the sum of the terms that are switched on, or None."""
    terms = []
    if config.sft_weight:
        terms.append(config.sft_weight * sft(inputs, config))
    if config.exploration != "none":
        terms.append(config.exploration_weight * exploration(inputs, config))
    if config.kl_weight:
        terms.append(config.kl_weight * kl(inputs))
    return torch.stack(terms).sum(0) if terms else None


def sft(inputs: LossInput, config: LossConfig) -> Tensor:
    """[P] mean negative log-likelihood per token, nats, of the chosen completion, or of the best of its prompt.

    Added with weight eta to DPO it is RPO (Liu et al. 2024, "Provably Mitigating Overoptimization in RLHF: Your SFT
    Loss is Implicitly an Adversarial Regularizer", eq. 4.4 with the token mean of the authors' code). It holds the
    likelihood of chosen completions up, which DPO alone lets fall. CPO, ORPO and SLiC-HF have it as well; TPO takes a
    third completion, better than both: `loss.sft_target=best`.
    """
    if config.sft_target == "chosen":
        return -inputs.mean_chosen
    means = inputs.by_group(-inputs.logprob / inputs.lengths, 0.0)
    # Completions that are in no pair have no score; the best of a group is always a chosen one.
    scores = inputs.by_group(inputs.scores, -torch.inf)
    chosen = torch.zeros_like(inputs.lengths, dtype=torch.bool).index_fill(0, inputs.chosen, True)
    scores = scores.masked_fill(~inputs.by_group(chosen.to(scores.dtype), 0.0).bool(), -torch.inf)
    best = means.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return best[inputs.groups[inputs.chosen]]


def exploration(inputs: LossInput, config: LossConfig) -> Tensor:
    """[P] how likely the policy makes what it would have said anyway; weighted, it drives the policy elsewhere.

        selm  beta h(y): Zhang et al. 2024, "Self-Exploring Language Models" (arXiv:2405.19332), equation 8
        xpo   log pi(y): Xie et al. 2024, "Exploratory Preference Optimization" (arXiv:2405.21046), algorithm 1

    y is a sample of the reference. Both completions of a pair are, where the reference is the data policy, and the term
    is their mean; the released code of SELM decodes a greedy y, that of XPO samples one of the two from the reference.
    """
    if config.exploration == "selm":
        return inputs.beta * (inputs.log_ratio_chosen + inputs.log_ratio_rejected) / 2
    return (inputs.logprob_chosen + inputs.logprob_rejected) / 2


def kl(inputs: LossInput) -> Tensor:
    """[P] KL(pi || pi_ref) per token over the two completions, nats, by the estimate exp(-h_t) - 1 + h_t.

    Schulman 2020, "Approximating KL Divergence" (k3). The trust region of TRPA, whose reference is the data policy.
    """
    log_ratio = inputs.logprobs - inputs.reference
    tokens = torch.expm1(-log_ratio) + log_ratio
    sums = torch.segment_reduce(tokens, "sum", lengths=inputs.lengths, axis=0)
    lengths = inputs.lengths[inputs.chosen] + inputs.lengths[inputs.rejected]
    return (sums[inputs.chosen] + sums[inputs.rejected]) / lengths
