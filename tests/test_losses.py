"""Losses equal the values worked out by hand, and their gradients those of finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conf.schema import LossConfig
from learners.losses import LOSSES, LossInput, pair_losses
from learners.schedule import learning_rate
from orchestrator.errors import ConfigError


def golden_input(**changes):
    """One pair with h_w = 1, h_l = -2.7, Delta = 3.7."""
    values = {
        "logprob_chosen": -20.0,
        "logprob_rejected": -25.2,
        "reference_chosen": -21.0,
        "reference_rejected": -22.5,
        "length_chosen": 10.0,
        "length_rejected": 12.0,
        "score_chosen": 0.8,
        "score_rejected": 0.3,
        "score_margin": 0.5,
    }
    return LossInput(**{name: torch.tensor([value], dtype=torch.float64) for name, value in (values | changes).items()})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig(beta=0.1), 0.525163),
        (LossConfig(beta=0.1, label_smoothing=0.1), 0.562163),
        # Soft label p = 0.75 is a smoothing of 0.25.
        (LossConfig(beta=0.1, label_smoothing=0.25), 0.617663),
        # RPO: the same preference term plus eta times the token mean 20 / 10.
        (LossConfig(beta=0.1, sft_weight=0.005), 0.525163 + 0.005 * 2.0),
        # h_w misses its target of 3 by 2, and h_l its target of -2 by 0.7.
        (LossConfig(name="sppo", beta=0.1), 2.245),
    ],
)
def test_golden_values(config, expected):
    assert pair_losses(golden_input(), config).item() == pytest.approx(expected, abs=1e-6)


def test_quantities_of_the_golden_pair():
    inputs = golden_input()
    assert inputs.log_ratio_chosen.item() == pytest.approx(1.0)
    assert inputs.log_ratio_rejected.item() == pytest.approx(-2.7)
    assert inputs.margin.item() == pytest.approx(3.7)


def test_dpo_is_log_two_and_pushes_by_half_beta_where_policy_is_reference():
    chosen = torch.tensor([-21.0], requires_grad=True)
    inputs = replace(golden_input(logprob_rejected=-22.5), logprob_chosen=chosen)
    loss = pair_losses(inputs, LossConfig(beta=0.3))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.item() == pytest.approx(-0.3 / 2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_equal_finite_differences(name):
    config = LossConfig(name=name, beta=0.3, label_smoothing=0.1, sft_weight=0.2)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3.0, 9.0, 1.0, 5.0], dtype=torch.float64)
    columns = torch.randn((5, 4), generator=generator, dtype=torch.float64) * 3 - 10

    def losses(chosen, rejected):
        return pair_losses(
            LossInput(
                logprob_chosen=chosen,
                logprob_rejected=rejected,
                reference_chosen=columns[2],
                reference_rejected=columns[3],
                length_chosen=lengths,
                length_rejected=lengths.flip(0),
                score_chosen=columns[4].sigmoid(),
                score_rejected=columns[4].neg().sigmoid(),
                score_margin=columns[4].abs(),
            ),
            config,
        )

    assert losses(columns[0], columns[1]).shape == (4,)
    assert torch.autograd.gradcheck(losses, (columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_()))


def test_extreme_margins_stay_finite():
    far = golden_input(logprob_chosen=-1e4, logprob_rejected=0.0)
    assert pair_losses(far, LossConfig(beta=1.0)).item() == pytest.approx(1e4 + 1.5)


def test_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.name is 'ipo'"):
        pair_losses(golden_input(), LossConfig(name="ipo"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_schedules(schedule, expected):
    rates = [
        learning_rate(peak=2.0, schedule=schedule, step=step, total_steps=6, warmup_steps=2) / 2.0 for step in range(6)
    ]
    assert rates == pytest.approx(expected)
    assert learning_rate(peak=2.0, schedule=schedule, step=9, total_steps=6, warmup_steps=2) / 2.0 == pytest.approx(
        expected[-1]
    )
