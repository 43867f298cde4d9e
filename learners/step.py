"""One optimizer step, from a packed batch to moved weights.

    split -> (log-probs -> loss -> backward) each micro-batch -> sum over ranks -> clip -> AdamW

The loss is a weighted sum over the items of the *global* batch divided by their number, so micro-batches of any sizes,
on any number of ranks, add up to the gradient of the one big batch. That holds as well for objectives whose items
depend on each other. For those log-probs are computed first, without gradient and of all micro-batches of all ranks;
the loss of the global batch is differentiated with respect to this rank's token log-probs; and each micro-batch is then
run again to carry its part of that gradient on to the weights (the gradient cache of Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983).

Shapes: S completions, C completion tokens, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from conf.objectives import OBJECTIVES, is_coupled
from learners import ranks
from learners.displacement import ches
from learners.losses import LossInput, LossState, advance, concatenate, losses
from learners.losses.staleness import importance
from learners.memory import ERRORS, within_memory
from learners.spikes import why_skipped
from orchestrator.batching import split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import LearnerConfig, LossConfig
    from learners.policy import Policy
    from orchestrator.types import PreferenceBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What came of one batch.

    Example: ``Step(metrics={"loss": 0.61, ...}, state=LossState(), skipped="", micro_batch_tokens=8192)``
    """

    metrics: dict[str, float]
    """Log-probs, ratios and margin are sums over tokens in nats, means over the pairs of all ranks."""
    state: LossState
    """What the objective remembers now; of a skipped batch, nothing."""
    skipped: str
    """Why the weights were left as they were; empty: they moved."""
    micro_batch_tokens: int
    """With which memory sufficed."""


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: PreferenceBatch,
    *,
    loss: LossConfig,
    learner: LearnerConfig,
    lr: float,
    version: int,
    state: LossState,
    replay: Callable[[], float] | None = None,
    largest_norm: float = math.inf,
) -> Step:
    """Take one step on an annotated batch, unless its loss or gradient is not finite or too large.

    Args:
        policy: whose weights move.
        optimizer: over the policy's parameters.
        batch: the global batch with reference log-probs, or this rank's prompt groups of it.
        loss: the objective.
        learner: `micro_batch_tokens` and `max_grad_norm` are read; the former is halved while memory runs out.
        lr: learning rate of this step.
        version: number of the learner's own policy version, for staleness.
        state: what the objective remembers of earlier steps.
        replay: adds the gradient of seed data and returns their loss (`Replay.backward`); None: there is none.
        largest_norm: a batch whose gradient has a larger norm is skipped.

    Raises:
        ValueError: the batch has no reference log-probs.
        RuntimeError, MemoryError: memory does not suffice for a single prompt group, or what else the forward or
            backward pass raised; weights are untouched and gradients dropped.
    """
    (metrics, after), tokens = within_memory(
        lambda tokens: _gradient(policy, optimizer, split(batch, tokens), loss, version, state, replay),
        batch,
        learner.micro_batch_tokens,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ranks.sum_gradients(parameters)
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, learner.max_grad_norm))
    reasons = ranks.gather(why_skipped(metrics["loss"], metrics["grad_norm"], largest_norm))
    skipped = next((reason for reason in reasons if reason), "")
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    staleness = version - batch.data_versions
    metrics |= {"lr": lr, "staleness_mean": float(staleness.mean()), "staleness_max": float(staleness.max())}
    return Step(metrics=metrics, state=state if skipped else after, skipped=skipped, micro_batch_tokens=tokens)


def _gradient(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    parts: list[PreferenceBatch],
    loss: LossConfig,
    version: int,
    state: LossState,
    replay: Callable[[], float] | None,
) -> tuple[dict[str, float], LossState]:
    """This rank's share of the gradient; metrics, and what the objective remembers then."""
    optimizer.zero_grad(set_to_none=True)
    run = _run_coupled if is_coupled(loss) else _run
    try:
        metrics, after = run(policy, parts, loss, version, state)
        if replay is not None:
            metrics["replay_nll"] = ranks.together(replay, ERRORS)
    except ERRORS:
        optimizer.zero_grad(set_to_none=True)
        raise
    return metrics, after


def _run(
    policy: Policy, parts: list[PreferenceBatch], loss: LossConfig, version: int, state: LossState
) -> tuple[dict[str, float], LossState]:
    """Adds the gradient of an objective whose items stand alone, one micro-batch after the other."""
    items, pairs = ranks.total(
        [sum(num_items(part, loss) for part in parts), sum(part.num_pairs for part in parts)],
    )

    def accumulate() -> list[dict[str, Tensor]]:
        observed = []
        for part in parts:
            inputs, noticed = _forward(policy, part, loss, version)
            values = losses(inputs, loss, state)
            (values.sum() / items).backward()  # type: ignore[no-untyped-call]
            observed.append(_observe(inputs, values.sum() * pairs / items) | noticed)
        return observed

    return _means(ranks.together(accumulate, ERRORS), pairs), state


def _run_coupled(
    policy: Policy, parts: list[PreferenceBatch], loss: LossConfig, version: int, state: LossState
) -> tuple[dict[str, float], LossState]:
    """Adds the gradient of an objective of the whole global batch, through its gradient at the log-probs."""
    with torch.no_grad():
        forwards = ranks.together(lambda: [_forward(policy, part, loss, version) for part in parts], ERRORS)
    mine = concatenate([inputs for inputs, _ in forwards])
    logprobs = mine.logprobs.requires_grad_()
    everyone = [one.to(logprobs.device) for one in ranks.gather(mine.to("cpu"))]
    everyone[ranks.rank()] = replace(mine, logprobs=logprobs)
    whole = concatenate(everyone)
    items = sum(ranks.total([sum(num_items(part, loss) for part in parts)]))

    def carry_on() -> Tensor:
        values = losses(whole, loss, state)
        (gradient,) = torch.autograd.grad(values.sum() / items, logprobs)
        shares = torch.split(gradient, [part.num_completion_tokens for part in parts])
        for part, share in zip(parts, shares, strict=True):
            policy(part).backward(share)
        return values

    values = ranks.together(carry_on, ERRORS)
    with torch.no_grad():
        pairs = len(whole.chosen)
        observed = _observe(whole, values.sum() * pairs / items)
        means = {name: float(value) / pairs for name, value in observed.items()}
        means |= _means([noticed for _, noticed in forwards], pairs)
        return means, advance(whole, loss, state)


def _means(sums: Sequence[Mapping[str, Tensor]], pairs: float) -> dict[str, float]:
    """Means over the pairs of all ranks, from this rank's sums over those of each micro-batch."""
    mine = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    return {name: value / pairs for name, value in zip(mine, ranks.total(mine.values()), strict=True)}


def num_items(batch: PreferenceBatch, loss: LossConfig) -> int:
    """What the summed losses are divided by: pairs, or the groups of an objective of groups."""
    return len(batch.prompt_starts) if OBJECTIVES[loss.name].unit == "group" else batch.num_pairs


def _forward(
    policy: Policy, batch: PreferenceBatch, loss: LossConfig, version: int
) -> tuple[LossInput, dict[str, Tensor]]:
    """What the objective is made of, and what else the pass tells of the pairs, summed over them."""
    scores = policy.scores(batch, collision=loss.weighting == "wpo")
    inputs = replace(loss_input(scores.logprobs, batch, loss.beta), log_collision=scores.log_collision)
    noticed = {}
    if batch.sampled_logprobs is not None:
        device = inputs.weights.device
        stale = torch.tensor(version > batch.data_versions, device=device)
        sampled = torch.tensor(batch.sampled_logprobs, device=device, dtype=inputs.logprobs.dtype)
        importances = importance(inputs, sampled, stale, loss.importance_clip)
        inputs = replace(inputs, weights=inputs.weights * importances)
        noticed["importance"] = importances.sum()
    if scores.states is not None:
        means = scores.states / inputs.lengths[:, None]
        noticed["ches"] = ches(means[inputs.chosen], means[inputs.rejected]).sum()
    return inputs, noticed


def loss_input(logprobs: Tensor, batch: PreferenceBatch, beta: float) -> LossInput:
    """What objectives are made of, from token log-probs [C] under the policy and the batch's own under the reference.

    Raises:
        ValueError: the batch has no reference log-probs.
    """
    if batch.reference_logprobs is None:
        raise ValueError("the batch has no reference log-probs; annotate it first")

    def column(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, device=logprobs.device, dtype=dtype)

    def optional(values: NDArray[Any] | None) -> Tensor | None:
        return None if values is None else column(values, logprobs.dtype)

    return LossInput(
        logprobs=logprobs,
        reference=column(batch.reference_logprobs, logprobs.dtype),
        lengths=column(batch.completion_lengths, torch.int64),
        groups=column(batch.completion_groups, torch.int64),
        chosen=column(batch.chosen, torch.int64),
        rejected=column(batch.rejected, torch.int64),
        labels=column(batch.labels, logprobs.dtype),
        weights=column(batch.weights, logprobs.dtype),
        score_chosen=column(batch.chosen_scores, logprobs.dtype),
        score_rejected=column(batch.rejected_scores, logprobs.dtype),
        beta=torch.full((batch.num_pairs,), beta, device=logprobs.device, dtype=logprobs.dtype),
        mismatched=column(batch.mismatched, torch.int64),
        chosen_token_weights=optional(batch.chosen_token_weights),
        rejected_token_weights=optional(batch.rejected_token_weights),
    )


def _observe(inputs: LossInput, loss: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of what is reported as means, and the loss, scaled likewise."""
    chosen, rejected = inputs.log_ratio_chosen, inputs.log_ratio_rejected
    columns = {
        "logprob_chosen": inputs.logprob_chosen,
        "logprob_rejected": inputs.logprob_rejected,
        "log_ratio_chosen": chosen,
        "log_ratio_rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
        "length_chosen": inputs.length_chosen,
        "length_rejected": inputs.length_rejected,
    }
    return {"loss": loss.detach(), **{name: values.detach().sum() for name, values in columns.items()}}
