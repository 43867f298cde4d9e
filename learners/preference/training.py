"""Training a preference model: AdamW on the log-likelihood of the labels, all answers of a prompt in one batch.

Every prompt has the same weight, however many of its answers were compared: comparisons of one prompt share answers and
are no independent evidence (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from learners.schedule import learning_rate
from orchestrator.errors import DataError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from learners.preference.model import PreferenceModel
    from learners.preference.records import Group

    Progress = Callable[[int, int, float], None]
    """Called after each step with (step, steps, loss)."""

BINS = 10
"""Of the calibration error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a preference model is trained. Example: ``TrainingConfig(lr=1e-5, epochs=1, batch_prompts=32, seed=0)``."""

    lr: float
    """Peak; linear warm-up over the first tenth of the steps, then linear decay to zero."""
    epochs: int = 1
    batch_prompts: int = 32
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How a preference model does on comparisons that it was not trained on.

    Example: ``Quality(comparisons=3012, accuracy=0.97, loss=0.08, calibration_error=0.01)``
    """

    comparisons: int
    accuracy: float
    """Share in which the answer with the higher label is given more than 1/2; exactly 1/2 counts half."""
    loss: float
    """Mean negative log-likelihood of the labels, nats."""
    calibration_error: float
    """Expected |confidence - accuracy| over ten bins of confidence max(P, 1 - P) (Guo et al. 2017)."""


def train(model: PreferenceModel, groups: Sequence[Group], config: TrainingConfig, progress: Progress) -> None:
    """Trains in place; the same seed, data and thread count give the same weights.

    Raises:
        DataError: nothing to learn from.
        TrainingError: the loss is not finite.
    """
    if not groups:
        raise DataError("no prompt with two answers that differ in their label: nothing to train a preference model on")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    total = config.epochs * math.ceil(len(groups) / config.batch_prompts)
    step = 0
    model.train()
    for _ in range(config.epochs):
        order = torch.randperm(len(groups), generator=generator).tolist()
        for start in range(0, len(order), config.batch_prompts):
            batch = [groups[index] for index in order[start : start + config.batch_prompts]]
            optimizer.param_groups[0]["lr"] = learning_rate(
                peak=config.lr, schedule="linear", step=step, total_steps=total, warmup_steps=total // 10
            )
            loss = _prompt_mean(_losses(model(batch), batch), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss of step {step + 1} is {loss.item()}: lower the learning rate {config.lr:g}"
                )
            optimizer.step()
            step += 1
            progress(step, total, loss.item())
    model.eval()


@torch.inference_mode()
def measure(model: PreferenceModel, groups: Sequence[Group], *, batch_prompts: int = 32) -> Quality:
    """Accuracy, log-likelihood and calibration on all comparisons of `groups`, each of the same weight.

    Raises:
        DataError: there is none.
    """
    if not groups:
        raise DataError("no comparison is held out: give more pairs, or hold out a larger share")
    parts = [groups[start : start + batch_prompts] for start in range(0, len(groups), batch_prompts)]
    logits = torch.cat([model(part) for part in parts]).cpu()
    labels = _labels(groups)
    losses = _losses(logits, groups)
    toward = logits * (labels - 0.5).sign()
    right = (toward > 0).float() + 0.5 * (toward == 0).float()
    confidence = logits.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add(0, bins, right - confidence)
    return Quality(
        comparisons=len(logits),
        accuracy=right.mean().item(),
        loss=losses.mean().item(),
        calibration_error=gaps.abs().sum().item() / len(logits),
    )


def _losses(logits: Tensor, groups: Sequence[Group]) -> Tensor:
    """[P] -p log P(first) - (1 - p) log P(second)."""
    labels = _labels(groups).to(logits.device)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _labels(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([comparison.label for group in groups for comparison in group.comparisons])


def _prompt_mean(losses: Tensor, groups: Sequence[Group]) -> Tensor:
    sizes = [len(group.comparisons) for group in groups]
    return torch.stack([part.mean() for part in torch.split(losses, sizes)]).mean()
