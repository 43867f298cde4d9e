"""Objectives equal the values worked out by hand, and their gradients those of formulas written another way."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.objectives import OBJECTIVES, PAIR_LABELS, is_coupled, loss_keys_read, needs_reference
from conf.schema import LossConfig
from learners.losses import LOSSES, STATEFUL, LossState, advance, concatenate, losses
from learners.losses.bco import shifted
from learners.losses.labels import posterior
from learners.schedule import learning_rate
from orchestrator.errors import ConfigError
from tests.losses import DOUBLE, from_sums, golden, random_input
from tests.plain_losses import plain

ALL = sorted(OBJECTIVES)
PAIRS = [name for name in ALL if OBJECTIVES[name].unit == "pair"]
GROUPS = [name for name in ALL if OBJECTIVES[name].unit == "group"]
BY_RANK = [name for name in ALL if OBJECTIVES[name].by_rank]


def value(inputs, state=None, **config):
    config = {"beta": float(inputs.beta[0])} | config
    return losses(inputs, LossConfig(**config), state or LossState())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "dpo"}, 0.525163),
        ({"name": "dpo", "label_smoothing": 0.1}, 0.562163),
        ({"name": "dpo", "label_smoothing": 0.1, "labels": "robust"}, 0.478913),
        # RPO: the same preference term plus eta times the token mean 20 / 10.
        ({"name": "dpo", "sft_weight": 0.005}, 0.525163 + 0.005 * 2.0),
        ({"name": "hinge"}, 0.63),
        ({"name": "slic", "gamma": 1.0}, 0.0),
        ({"name": "ipo_sum"}, 1.69),
        ({"name": "ipo"}, 21.855625),
        ({"name": "bco_pair"}, 1.211629),
        ({"name": "sppo_hard"}, 21.29),
        # h_w misses its target of 3 by 2, and h_l its target of -2 by 0.7.
        ({"name": "sppo"}, 2.245),
        # Score regression: targets 8 and 3, missed by 7 and 5.7.
        ({"name": "gpo"}, 40.745),
        # The same with beta = .0005: targets 1600 and 600, the first cut off at 1000; missed by 999 and 602.7.
        ({"name": "gpo", "beta": 0.0005}, (999**2 + 602.7**2) / 2),
        ({"name": "nca_pair"}, 1.300211),
        ({"name": "exo_pair", "floor": 1e-3}, 2.146370),
        ({"name": "apo_zero"}, 0.907928),
        ({"name": "apo_down"}, 0.933520),
        ({"name": "discopop"}, 0.690633),
        ({"name": "simpo", "beta": 2.0, "gamma": 1.0}, 1.171101),
        ({"name": "simpo", "beta": 2.0, "gamma": 0.5}, 0.854355),  # TPO-L
        ({"name": "cpo"}, 0.466573),
        ({"name": "cpo", "beta": 0.01}, 0.667485),  # TPO
        ({"name": "orpo"}, 0.063740),
        ({"name": "ln_dpo", "beta": 1.0}, 0.543793),
        ({"name": "dpop", "beta": 0.3, "penalty": 50.0}, 0.284847),
        ({"name": "asft"}, 2.130629),
        ({"name": "f_dpo", "divergence": "forward_kl"}, 0.210498),
        ({"name": "f_dpo", "divergence": "js"}, 0.578053),
        ({"name": "f_dpo", "divergence": "alpha", "divergence_alpha": 0.5}, 0.419994),
        # A pair whose only two tail tokens (of the rejected completion's 12) count half: h_l = -2.7 (10 + 1) / 12.
        ({"name": "dpo", "tail_weight": 0.5}, math.log1p(math.exp(-0.1 * (1 + 2.7 * 11 / 12)))),
        # A = 0.25; the margin 3.7 is clipped to log 1.2.
        ({"name": "p3o", "clip": 0.2}, -0.25 * math.log(1.2)),
        ({"name": "p3o_separate", "clip": 0.2}, -0.25 * (math.log(1.2) - math.log(0.8))),
        # beta = 0.1 (1 + 0.2 (1 - exp(-2 * 0.5))).
        (
            {"name": "dpo", "beta_scaling": "margin", "beta_scale": 0.2, "beta_slope": 2.0},
            math.log1p(math.exp(-0.37 * (1 + 0.2 * (1 - math.exp(-1))))),
        ),
        # exp(-h) - 1 + h = 0.105171 - ... of tokens with h = 0.1 and -0.225, 10 and 12 of them.
        (
            {"name": "dpo", "kl_weight": 2.0},
            0.525163 + 2 * (10 * (math.exp(-0.1) - 0.9) + 12 * (math.exp(0.225) - 1.225)) / 22,
        ),
    ],
)
def test_golden_values(config, expected):
    inputs = golden(beta=config.get("beta", 0.1))
    assert value(inputs, **config).item() == pytest.approx(expected, abs=1e-6)


def test_golden_values_of_other_pairs():
    assert value(golden(beta=0.3, chosen=-21.1), name="dpop", penalty=50.0).item() == pytest.approx(1.116594, abs=1e-6)
    assert value(golden(label=0.75), name="dpo", labels="soft").item() == pytest.approx(0.617663, abs=1e-6)
    # CREAM: the label is the consistency of two rankings.
    assert value(golden(label=0.6), name="dpo", labels="soft").item() == pytest.approx(0.673163, abs=1e-6)
    assert value(golden(label=0.75), name="irepo").item() == pytest.approx(0.530876, abs=1e-6)
    assert value(golden(scores=(0.9, 0.2)), name="rebel", score_scale=1.0).item() == pytest.approx(9.0, abs=1e-6)
    assert value(golden(scores=(1.0, 0.0)), name="trpa", anisotropy=2.5).item() == pytest.approx(0.653347, abs=1e-6)
    assert value(golden(scores=(1.0, 0.0)), name="trpa_sum", anisotropy=2.5).item() == pytest.approx(
        math.log1p(math.exp(-2.5 * 0.37)), abs=1e-6
    )
    assert value(golden(scores=(0.9, 0.0)), name="trpa", anisotropy=2.5).item() == pytest.approx(
        math.log1p(math.exp(-0.0325)), abs=1e-6
    )


def test_golden_values_of_both_sides():
    """KTO with a baseline of 0.3, from a completion of another prompt; BCO with a shift of 0.05."""
    inputs = from_sums(
        [-20, -25.2, -9.7], [-21, -22.5, -10], [10, 12, 5], [(0, 1)], groups=[0, 0, 0], mismatched=torch.tensor([2])
    )
    chosen, rejected = (
        2 * value(inputs, name="kto", desirable_weight=a, undesirable_weight=b).item() for a, b in ((1, 0), (0, 1))
    )
    assert (chosen, rejected) == pytest.approx((0.482507, 0.425557), abs=1e-6)
    assert shifted(golden(), 0.05).item() == pytest.approx(0.668460 + 0.545893, abs=1e-6)
    # The first batch's own mean is the shift: (0.1 - 0.27) / 2.
    expected = (math.log1p(math.exp(-0.1 - 0.085)) + math.log1p(math.exp(-0.27 + 0.085))) / 2
    assert value(golden(), name="bco").item() == pytest.approx(expected, abs=1e-6)


def test_golden_values_of_groups():
    shares = golden(scores=(math.log(0.7), math.log(0.3)))
    assert value(shares, name="nca").item() == pytest.approx(1.358062, abs=1e-6)
    # -0.7 log sigmoid(0.37) - 0.3 log sigmoid(-0.37), and KL(sigmoid(0.37) || 0.7).
    right = 1 / (1 + math.exp(-0.37))
    assert value(shares, name="infonca").item() == pytest.approx(-0.7 * math.log(right) - 0.3 * math.log(1 - right))
    expected = right * math.log(right / 0.7) + (1 - right) * math.log((1 - right) / 0.3)
    assert value(shares, name="exo").item() == pytest.approx(expected)
    assert value(golden(scores=(1.0, 0.2)), name="copg").item() == pytest.approx(0.1849, abs=1e-6)
    # One completion above the worst: -log sigmoid(0.1 * 1 + 0.1 * 2.7).
    assert value(golden(), name="d2o", negative_weight=0.1).item() == pytest.approx(0.525163, abs=1e-6)
    # PRO: T = 0.5 of both, mean log-probs -2 and -2.1.
    assert value(golden(), name="pro").item() == pytest.approx(math.log1p(math.exp(0.5 * -0.1)))
    # AFT: 1 + exp(-2.1 + 2) + exp(T + 2.1) with T = 2 (-2) - 0.1.
    assert value(golden(), name="aft").item() == pytest.approx(math.log(1 + math.exp(-0.1) + math.exp(-2.0)))


def test_golden_values_of_exploration():
    """DPO at Delta = 3.7, plus alpha beta h or alpha log pi of what the policy said: the pair's mean, 0.4 and -20."""
    inputs = from_sums([-20, -20], [-22.25, -18.55], [10, 12], [(0, 1)])
    with_selm = value(replace(inputs, beta=inputs.beta / 10), name="dpo", exploration="selm", exploration_weight=1e-3)
    assert with_selm.item() == pytest.approx(0.674822, abs=1e-6)
    with_xpo = value(inputs, name="dpo", exploration="xpo", exploration_weight=1e-5)
    assert with_xpo.item() == pytest.approx(0.524963, abs=1e-6)
    whole = value(golden(), name="dpo", exploration="xpo", exploration_weight=1e-3).item()
    assert whole == pytest.approx(0.525163 - 1e-3 * 22.6, abs=1e-6)


def test_golden_value_of_a_posterior_label():
    right, wrong = (torch.tensor([math.log1p(math.exp(-0.37 * sign))], dtype=DOUBLE) for sign in (1, -1))
    assert posterior(right, wrong, 0.2).item() == pytest.approx(0.852745, abs=1e-6)
    state = LossState()
    config = LossConfig(name="dpo", labels="posterior", label_smoothing=0.2, noise_decay=0.75)
    assert losses(golden(), config, state).item() == pytest.approx(0.852745 * 0.525163 + 0.147255 * 0.895163, abs=1e-6)
    assert advance(golden(), config, state).noise == pytest.approx(0.75 * 0.2 + 0.25 * 0.147255, abs=1e-6)


def test_aot_compares_ranks():
    """Differences of policy (3, -1) and reference (0, 2): sorted -1 with 0, and 3 with 2."""
    inputs = from_sums([3, 0, -1, 0], [0, 0, 2, 0], [1, 1, 1, 1], [(0, 1), (2, 3)])
    assert value(inputs, name="aot").tolist() == pytest.approx([math.log1p(math.exp(0.1)), math.log1p(math.exp(-0.1))])
    # h of chosen (3, -3), of rejected (0, 0).
    expected = [math.log1p(math.exp(0.3)), math.log1p(math.exp(-0.3))]
    assert value(inputs, name="aot_unpaired").tolist() == pytest.approx(expected)


def test_denoised_labels_are_smoothed_below_the_quantile_and_not_at_first():
    """Ten pairs with margins 1 to 10: the 10 % quantile is 1.9, and only the first is below it."""
    inputs = from_sums(
        [float(i // 2 + 1) if i % 2 == 0 else 0.0 for i in range(20)], [0.0] * 20, [1] * 20,
        [(2 * i, 2 * i + 1) for i in range(10)], beta=1.0,
    )  # fmt: skip
    hard, config = value(inputs, name="dpo"), {"name": "dpo", "labels": "denoised", "label_smoothing": 0.1}
    assert torch.equal(value(inputs, LossState(progress=0.19), **config), hard)
    late = value(inputs, LossState(progress=0.2), **config)
    assert torch.equal(late[1:], hard[1:])
    assert late[0].item() == pytest.approx(0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e))
    after = advance(inputs, LossConfig(**config | {"beta": 1.0}), LossState(margins=(0.5,) * 45))
    assert after.margins == (0.5,) * 40 + tuple(float(i) for i in range(1, 11))


def test_an_implicit_beta_follows_the_batch():
    """M = 0.37 against a running 0.07: beta grows by 1 + 0.6 * 0.3."""
    config = LossConfig(name="dpo", beta_scaling="implicit", beta_scale=0.6, noise_decay=0.9)
    state = LossState(margin_mean=0.07)
    assert losses(golden(), config, state).item() == pytest.approx(math.log1p(math.exp(-0.37 * 1.18)))
    assert losses(golden(), config, LossState()).item() == pytest.approx(0.525163, abs=1e-6)
    assert advance(golden(), config, state).margin_mean == pytest.approx(0.9 * 0.07 + 0.1 * 0.37)
    low = losses(golden(), replace(config, beta_scale=10.0), LossState(margin_mean=5.0))
    assert low.item() == pytest.approx(math.log1p(math.exp(-0.037))), "never below a tenth"


def test_wpo_weighs_by_how_likely_the_policy_says_it():
    collision = torch.cat([torch.full((10,), -1.5), torch.full((12,), -1.9)]).double()
    inputs = golden(log_collision=collision)
    # Means of -2 + 1.5 and -2.1 + 1.9.
    assert value(inputs, name="dpo", weighting="wpo").item() == pytest.approx(0.525163 * math.exp(-0.7), abs=1e-6)


def test_token_weights_choose_the_tokens_that_count():
    """Mask-DPO: of chosen only the first 5 of 10 tokens, of rejected the last 3 of 12."""
    inputs = golden(
        chosen_token_weights=torch.tensor([1.0] * 5 + [0.0] * 5).double(),
        rejected_token_weights=torch.tensor([0.0] * 9 + [1.0] * 3).double(),
    )
    assert value(inputs, name="dpo").item() == pytest.approx(math.log1p(math.exp(-0.1 * (0.5 + 2.7 / 4))))
    turned = inputs.swapped()
    assert value(turned, name="dpo").item() == pytest.approx(math.log1p(math.exp(0.1 * (0.5 + 2.7 / 4))))


def test_the_best_completion_may_be_the_one_that_is_kept_likely():
    """Three completions in two pairs: the second pair's chosen is not the best of the prompt."""
    inputs = from_sums([-2, -6, -12], [0, 0, 0], [2, 2, 2], [(0, 1), (1, 2)], groups=[0, 0, 0], scores=[0.9, 0.5, 0.1])
    bare = value(inputs, name="cpo")
    assert (value(inputs, name="cpo", sft_weight=1.0) - bare).tolist() == pytest.approx([1.0, 3.0])
    assert (value(inputs, name="cpo", sft_weight=1.0, sft_target="best") - bare).tolist() == pytest.approx([1.0, 1.0])
    low = replace(inputs, score_chosen=inputs.score_chosen - 5, score_rejected=inputs.score_rejected - 5)
    assert (value(low, name="cpo", sft_weight=1.0, sft_target="best") - bare).tolist() == pytest.approx([1.0, 1.0])


# Gradients


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_and_gradients_are_those_of_a_plain_formula(name, seed):
    config = LossConfig(name=name, beta=0.3, gamma=0.4, penalty=2.0, score_scale=1.5, divergence="alpha")
    made = random_input(seed)
    results = []
    for compute in (lambda inputs: losses(inputs, config, LossState()), lambda inputs: plain(name, inputs, config)):
        logprobs = made.logprobs.clone().requires_grad_()
        values = compute(replace(made, logprobs=logprobs))
        # Unequal weights, so that no item can stand in for another.
        (gradient,) = torch.autograd.grad((values * torch.linspace(1, 2, len(values))).sum(), logprobs)
        results.append((values.detach(), gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [
        *({"name": name} for name in ALL if name not in ("aft", "kto", "bco")),
        {"name": "dpo", "label_smoothing": 0.2, "sft_weight": 0.3, "kl_weight": 0.4, "exploration": "selm"},
        {"name": "ipo", "labels": "soft", "tail_weight": 0.5, "exploration": "xpo", "exploration_weight": 0.1},
        {"name": "simpo", "labels": "robust", "label_smoothing": 0.1, "sft_weight": 0.3, "sft_target": "best"},
        {"name": "copg", "sft_weight": 0.5, "kl_weight": 0.1},
        {"name": "dpo", "beta_scaling": "margin", "beta_scale": 0.5},
    ],
    ids=str,
)
def test_gradients_equal_finite_differences(config):
    """Where no part is held without gradient on purpose; those are checked against plain formulas above."""
    made = random_input(3)

    def compute(logprobs):
        return value(replace(made, logprobs=logprobs), **{"gamma": 0.4, "penalty": 2.0} | config)

    assert torch.autograd.gradcheck(compute, made.logprobs.clone().requires_grad_())


# Invariances


@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(set(ALL) - {"aot"})), shift=st.floats(-2, 2))
def test_only_log_ratios_count_where_there_is_a_reference(seed, name, shift):
    """What is added to the log-probs of a token under both policies changes nothing; without a reference, nothing of
    the reference does. Paired AOT sorts the two policies' differences apart from each other."""
    made = random_input(seed)
    offset = torch.full_like(made.logprobs, shift)
    moved = replace(made, reference=made.reference + offset)
    if OBJECTIVES[name].reference:
        moved = replace(moved, logprobs=made.logprobs + offset)
    torch.testing.assert_close(value(moved, name=name), value(made, name=name))


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(
        sorted(set(PAIRS) - set(BY_RANK) - {"sppo", "gpo", "rebel", "irepo", "trpa", "trpa_sum", "p3o", "p3o_separate"})
    ),
)
def test_a_label_of_one_half_does_not_know_the_sides(seed, name):
    made = random_input(seed)
    coin = replace(made, labels=torch.full_like(made.labels, 0.5))
    torch.testing.assert_close(value(coin, name=name, labels="soft"), value(coin.swapped(), name=name, labels="soft"))


@given(seed=st.integers(0, 10_000), factor=st.floats(0.1, 10))
def test_beta_times_margin_is_all_dpo_sees(seed, factor):
    made = random_input(seed)
    stretched = replace(
        made,
        reference=made.reference * 0,
        logprobs=(made.logprobs - made.reference) * factor,
        beta=made.beta / factor,
    )
    torch.testing.assert_close(value(stretched, name="dpo"), value(made, name="dpo"))


@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(set(ALL) - {"kto", "bco", "aot", "aot_unpaired"})))
def test_items_stand_alone_unless_they_are_coupled(seed, name):
    """Batches put side by side have the values they had alone, and their groups do not mix."""
    parts = [random_input(seed), random_input(seed + 1)]
    whole = value(concatenate(parts), name=name, sft_weight=0.1, sft_target="best")
    alone = [value(part, name=name, sft_weight=0.1, sft_target="best") for part in parts]
    torch.testing.assert_close(whole, torch.cat(alone))


@given(seed=st.integers(0, 10_000), name=st.sampled_from(ALL))
def test_weights_multiply(seed, name):
    made = random_input(seed)
    torch.testing.assert_close(
        value(replace(made, weights=made.weights * 3), name=name), 3 * value(made, name=name)
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("chosen", "rejected"), [(-2000.0, 0.0), (0.0, -2000.0), (-1e-9, -1e-9)])
def test_extreme_pairs_stay_finite(name, chosen, rejected):
    made = golden(chosen=chosen, rejected=rejected)
    single = {field.name: getattr(made, field.name) for field in fields(made)}
    single = {key: x.float() if x is not None and x.is_floating_point() else x for key, x in single.items()}
    logprobs = single["logprobs"].requires_grad_()
    values = value(type(made)(**single), name=name, divergence="forward_kl")
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logprobs.grad).all()


# The registry


def test_every_objective_has_its_facts_and_its_code():
    assert set(OBJECTIVES) == set(LOSSES) | set(STATEFUL)


@pytest.mark.parametrize("name", ALL)
def test_facts_tell_the_unit_and_the_need_of_a_reference(name):
    made = random_input(5)
    values = value(made, name=name)
    assert len(values) == (made.num_groups if name in GROUPS else len(made.chosen))
    other = value(replace(made, reference=made.reference - 0.3 * torch.arange(len(made.reference))), name=name)
    assert needs_reference(LossConfig(name=name)) == (not torch.equal(values, other))


@pytest.mark.parametrize("name", ALL)
def test_facts_tell_which_are_coupled(name):
    parts = [random_input(7), random_input(8)]
    parts = [replace(part, reference=part.reference - 1) for part in parts]  # so that KTO's baseline is above 0
    whole = value(concatenate(parts), name=name)
    alone = torch.cat([value(part, name=name) for part in parts])
    assert is_coupled(LossConfig(name=name)) == (not torch.allclose(whole, alone))


OTHER_VALUES = {
    "beta": [0.7],
    "labels": ["robust", "soft"],
    "label_smoothing": [0.3],
    "noise_decay": [0.5],
    "weighting": ["wpo"],
    "beta_scaling": ["margin", "none"],
    "beta_scale": [0.4],
    "beta_slope": [3.0],
    "tail_weight": [0.3],
    "gamma": [0.9],
    "penalty": [3.0],
    "score_scale": [2.5],
    "floor": [0.2],
    "desirable_weight": [2.0],
    "undesirable_weight": [3.0],
    "divergence": ["forward_kl", "alpha"],
    "divergence_alpha": [0.8],
    "negative_weight": [0.6],
    "clip": [0.05],
    "anisotropy": [4.0],
    "exploration": ["selm", "xpo"],
    "exploration_weight": [0.3],
    "kl_weight": [0.2],
    "sft_weight": [0.3],
    "sft_target": ["chosen", "best"],
}
"""Of every key of `loss.*` but the name, and those that are carried out where pairs are packed and weighed."""
REFUSED = {name: {"labels", "label_smoothing", "weighting"} for name in GROUPS} | {
    name: {"labels", "weighting"} for name in BY_RANK
}
"""Keys that are of pairs and not, or not all, let through to these objectives (`conf/validate.py`)."""


@cache
def scored_input(seed, beta):
    """Some completions are right, for trpa."""
    made = random_input(seed, beta=beta)
    return replace(made, score_chosen=made.score_chosen + (made.score_chosen > 0.8))


def trace(settings):
    """What an objective says of a batch, or of three one after the other where it remembers."""
    config, state, found = LossConfig(**settings), LossState(progress=0.5), []
    for seed in (3, 4, 5) if is_coupled(config) else (3,):
        found.append(losses(scored_input(seed, config.beta), config, state))
        state = advance(scored_input(seed, config.beta), config, state)
    return torch.cat(found)


@pytest.mark.parametrize(
    "config",
    [
        *({"name": name} for name in ALL),
        *({"name": name, "labels": "soft"} for name in ("dpo", "irepo", "simpo")),
        *({"name": name, "labels": "posterior", "label_smoothing": 0.1} for name in ("dpo", "sppo")),
        *({"name": name, "beta_scaling": "margin"} for name in ("dpo", "rebel", "copg")),
        *({"name": name, "beta_scaling": "implicit"} for name in ("dpo", "slic")),
        *({"name": name, "exploration": "selm", "exploration_weight": 1.0} for name in ("asft", "pro", "dpo")),
        *({"name": name, "exploration": "xpo", "sft_weight": 0.1} for name in ("aft", "simpo")),
        {"name": "aft", "sft_weight": 0.1, "sft_target": "best"},
        {"name": "f_dpo", "divergence": "alpha"},
    ],
    ids=str,
)
def test_facts_tell_which_keys_are_read(config):
    """A key changes the values, or is named as one that does not: each is set to another value."""
    assert {field.name for field in fields(LossConfig)} == {*OTHER_VALUES, "name", "include_prompt", "importance_clip"}
    config = {"beta": 0.3} | config
    refused = REFUSED.get(config["name"], set())
    before, read = trace(config), {"name", "include_prompt", "importance_clip"}
    for key in OTHER_VALUES.keys() - refused:
        others = [trace(config | {key: other}) for other in OTHER_VALUES[key]]
        if not all(torch.allclose(other[: len(before)], before[: len(other)], rtol=1e-9) for other in others):
            read.add(key)
    assert read == loss_keys_read(LossConfig(**config)) - refused


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(BY_RANK),
    labels=st.sampled_from(["hard", "robust"]),
)
def test_values_by_rank_do_not_know_the_order_of_pairs(seed, name, labels):
    made = random_input(seed)
    order = torch.randperm(len(made.chosen), generator=torch.Generator().manual_seed(seed))
    of_pairs = ("chosen", "rejected", "labels", "weights", "score_chosen", "score_rejected", "beta")
    shuffled = replace(made, **{column: getattr(made, column)[order] for column in of_pairs})
    config = {"name": name, "labels": labels, "label_smoothing": 0.2, "sft_weight": 0.3, "kl_weight": 0.1}
    torch.testing.assert_close(value(shuffled, **config).sum(), value(made, **config).sum())


@pytest.mark.parametrize("name", BY_RANK)
def test_values_by_rank_take_no_weight_and_no_label_of_a_pair(name):
    made = random_input(2)
    weights = torch.linspace(0.5, 1.0, len(made.weights), dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"weights from 0\.5 to 1 are of pairs"):
        value(replace(made, weights=weights), name=name)
    for config in ({"weighting": "wpo"}, *({"labels": labels, "label_smoothing": 0.1} for labels in PAIR_LABELS)):
        with pytest.raises(ValueError, match="belong to no pair"):
            value(made, name=name, **config)


def test_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.name is 'ppo'"):
        value(golden(), name="ppo")


def test_dpo_is_log_two_and_pushes_by_half_beta_where_policy_is_reference():
    made = golden(chosen=-21.0, rejected=-22.5, beta=0.3)
    logprobs = made.logprobs.clone().requires_grad_()
    loss = value(replace(made, logprobs=logprobs), name="dpo")
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logprobs.grad[:10].tolist() == pytest.approx([-0.3 / 2] * 10)


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
