"""One optimizer step, from a packed batch to moved weights.

    split -> (log-probs -> sums -> pair losses -> backward) each micro-batch -> clip -> AdamW

The loss is the weighted sum of pair losses over the pairs of the *global* batch, so micro-batches of any sizes add up
to the gradient of the one big batch.

Shapes: S completions, C completion tokens, P pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from learners.losses import LossInput, pair_losses
from orchestrator.batching import split
from orchestrator.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import LearnerConfig, LossConfig
    from learners.policy import Policy
    from orchestrator.types import PreferenceBatch


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: PreferenceBatch,
    *,
    loss: LossConfig,
    learner: LearnerConfig,
    lr: float,
    version: int,
    replay: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Take one step on an annotated batch.

    Args:
        policy: whose weights move.
        optimizer: over the policy's parameters.
        batch: the global batch, with reference log-probs.
        loss: the objective.
        learner: `micro_batch_tokens` and `max_grad_norm` are read.
        lr: learning rate of this step.
        version: number of the learner's own policy version, for staleness.
        replay: adds the gradient of seed data and returns their loss (`Replay.backward`); None: there is none.

    Returns:
        Metrics by name. Log-probs, ratios and margin are sums over tokens in nats, means over pairs.

    Raises:
        ValueError: the batch has no reference log-probs.
        TrainingError: loss or gradient norm is not finite; the weights are untouched and gradients dropped.
    """
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for part in split(batch, learner.micro_batch_tokens):
        inputs = loss_input(policy(part), part)
        losses = pair_losses(inputs, loss) * _column(part.weights, policy)
        (losses.sum() / batch.num_pairs).backward()  # type: ignore[no-untyped-call]
        for name, values in _observe(inputs, losses).items():
            totals[name] = totals.get(name, 0.0) + values.detach().sum()
    replayed = {} if replay is None else {"replay_nll": replay()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, learner.max_grad_norm)
    metrics = {name: float(total) / batch.num_pairs for name, total in totals.items()}
    metrics |= replayed
    metrics["grad_norm"] = float(norm)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} on a batch of {batch.num_pairs} pairs "
            f"(first {batch.pair_ids[0]}); the weights were not changed. Lower learner.lr or raise loss.beta, and look "
            "at the pairs' log-probs."
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    staleness = version - batch.data_versions
    return metrics | {"lr": lr, "staleness_mean": float(staleness.mean()), "staleness_max": float(staleness.max())}


def loss_input(logprobs: Tensor, batch: PreferenceBatch) -> LossInput:
    """What losses are made of, from token log-probs [C] under the policy and the batch's own under the reference.

    Raises:
        ValueError: the batch has no reference log-probs.
    """
    if batch.reference_logprobs is None:
        raise ValueError("the batch has no reference log-probs; annotate it first")
    chosen, rejected = (torch.tensor(index, device=logprobs.device) for index in (batch.chosen, batch.rejected))
    lengths = torch.tensor(batch.completion_lengths, device=logprobs.device, dtype=torch.int64)
    reference = torch.tensor(batch.reference_logprobs, device=logprobs.device)
    policy_sums, reference_sums = (_sums(values, lengths) for values in (logprobs, reference))
    return LossInput(
        logprob_chosen=policy_sums.index_select(0, chosen),
        logprob_rejected=policy_sums.index_select(0, rejected),
        reference_chosen=reference_sums.index_select(0, chosen),
        reference_rejected=reference_sums.index_select(0, rejected),
        length_chosen=lengths.index_select(0, chosen).float(),
        length_rejected=lengths.index_select(0, rejected).float(),
        score_chosen=torch.tensor(batch.chosen_scores, device=logprobs.device),
        score_rejected=torch.tensor(batch.rejected_scores, device=logprobs.device),
        score_margin=torch.tensor(batch.chosen_scores - batch.rejected_scores, device=logprobs.device),
    )


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[S] sums of token values [C] over each completion."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0)


def _column(values: NDArray[np.float32], policy: Policy) -> Tensor:
    return torch.tensor(values, device=policy.device)


def _observe(inputs: LossInput, losses: Tensor) -> dict[str, Tensor]:
    """The metrics that are means over pairs, [P] each."""
    return {
        "loss": losses,
        "logprob_chosen": inputs.logprob_chosen,
        "logprob_rejected": inputs.logprob_rejected,
        "log_ratio_chosen": inputs.log_ratio_chosen,
        "log_ratio_rejected": inputs.log_ratio_rejected,
        "margin": inputs.margin,
        "accuracy": (inputs.margin > 0).float(),
        "length_chosen": inputs.length_chosen,
        "length_rejected": inputs.length_rejected,
    }
