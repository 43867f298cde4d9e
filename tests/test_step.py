"""One optimizer step, the references, and a trainer that goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
from learners.checkpoint import Checkpoint
from learners.displacement import ches
from learners.logprobs import plain_token_logprobs
from learners.reference import kl_estimate
from learners.trainer import Trainer
from orchestrator.batching import batches, completion_keys, pack
from orchestrator.errors import ModelError
from tests.learning import make_model, make_pairs

LOSS = LossConfig(beta=0.1, sft_weight=0.05)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


def make_trainer(model_dir, *, kind="previous", loss=LOSS, dtype="float32", keep_initial=False, **learner):
    settings = {"lr": 1e-2, "num_threads": 1, "micro_batch_tokens": 64, "vocab_chunk": 16}
    return Trainer(
        model_dir,
        loss=loss,
        reference=ReferenceConfig(kind=kind, ema_decay=0.75),
        learner=LearnerConfig(**settings | learner),
        dtype=dtype,
        keep_initial=keep_initial,
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.policy.parameters_by_name().items()}


def train(trainer, steps, *, seed=0):
    """Steps on random pairs, each on a batch of its own; returns all metrics."""
    made = batches(make_pairs(4 * steps, seed=seed), batch_pairs=8, seed=0, epoch=0)
    return [trainer.update(trainer.annotate(pack(pairs))).metrics for pairs in made]


def largest_difference(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in right)


def test_accumulation_equals_the_one_big_batch(model_dir, tmp_path):
    """Micro-batches of unequal numbers of pairs, weights and lengths: same loss, gradient norm and metrics."""
    batch = pack(make_pairs(7, pairs_per_prompt=3) + make_pairs(9, pairs_per_prompt=1, seed=5)[7:])
    results = []
    for micro_batch_tokens in (16, 64, 10_000):
        trainer = make_trainer(model_dir, micro_batch_tokens=micro_batch_tokens, max_grad_norm=0.5)
        trainer.begin_iteration(1, 1)
        trainer.reference.parameters["lm_head.weight"].mul_(1.1)  # so that the margin is not zero
        metrics = trainer.update(trainer.annotate(batch)).metrics
        trainer.save(tmp_path / str(micro_batch_tokens))
        # After one step Adam's first moment is (1 - beta1) times the clipped gradient.
        results.append((metrics, Checkpoint(tmp_path / str(micro_batch_tokens)).read("optimizer")))
    whole, moments = results[-1]
    assert abs(whole["margin"]) > 0.01
    assert whole["grad_norm"] > 0.5
    for metrics, others in results[:-1]:
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert largest_difference(others, moments) < 1e-6


def test_loss_is_what_the_formula_says_of_plain_logprobs(model_dir):
    trainer = make_trainer(model_dir, loss=LossConfig(beta=0.2, label_smoothing=0.1, sft_weight=0.3))
    trainer.begin_iteration(1, 1)
    trainer.reference.parameters["lm_head.weight"].mul_(1.1)
    pairs = make_pairs(3)
    batch = trainer.annotate(pack(pairs))
    policy = plain_token_logprobs(trainer.policy.model, batch).logprobs.detach().cpu().double().numpy()
    cuts = np.cumsum(batch.completion_lengths)[:-1]
    ours, anchors = (
        np.array([part.sum() for part in np.split(values, cuts)]) for values in (policy, batch.reference_logprobs)
    )
    expected = 0.0
    for index, pair in enumerate(pairs):
        chosen, rejected = batch.chosen[index], batch.rejected[index]
        delta = 0.2 * (ours[chosen] - anchors[chosen] - ours[rejected] + anchors[rejected])
        preference = 0.9 * np.log1p(np.exp(-delta)) + 0.1 * np.log1p(np.exp(delta))
        expected += pair.weight * (preference - 0.3 * ours[chosen] / len(pair.chosen.token_ids)) / len(pairs)
    assert trainer.update(batch).metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_policy_before_is_the_latest_iterations_reference(model_dir):
    trainer = make_trainer(model_dir, lr=3e-3)
    sequences = [((5, 6), (7, 8, 1)), ((4,), (9,))]
    assert trainer.reference_logprobs(sequences) is None, "there was none"
    initial = trainer._score(None, sequences)
    trainer.begin_iteration(1, 1)
    trainer.update(trainer.annotate(pack(make_pairs(4))))
    found = trainer.reference_logprobs(sequences)
    for before, same, now in zip(initial, found, trainer._score(None, sequences), strict=True):
        assert np.array_equal(before, same)
        assert not np.allclose(before, now, atol=1e-4)


def test_ches_of_the_paper():
    """S_w = (1, 2), S_l = (0.5, 3): 6.5 - 5."""
    assert ches(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])).item() == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_displacement_is_reported_of_each_pair_alone(model_dir, name):
    """Mean over pairs of the length-normalized score, however the batch is cut, also where log-probs come first."""
    trainer = make_trainer(model_dir, loss=LossConfig(name=name, beta=0.1), micro_batch_tokens=40)
    trainer.begin_iteration(1, 1)
    pairs = make_pairs(3)
    batch = trainer.annotate(pack(pairs))

    def mean_state(prompt, completion):
        tokens = torch.tensor([prompt + completion], device=trainer.policy.device)
        hidden = trainer.policy.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        return hidden[len(prompt) - 1 : -1].mean(0)

    expected = 0.0
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = (
                mean_state(pair.prompt.token_ids, side.token_ids) for side in (pair.chosen, pair.rejected)
            )
            expected += float(chosen @ rejected - chosen @ chosen) / len(pairs)
    assert trainer.update(batch).metrics["ches"] == pytest.approx(expected, rel=1e-4)


def test_training_raises_the_margin_and_reports(model_dir):
    trainer = make_trainer(model_dir, loss=LossConfig(beta=0.1), lr=3e-3)
    trainer.begin_iteration(1, 8)
    trainer.version = 2
    batch = trainer.annotate(pack(make_pairs(4, version=1)))
    results = [trainer.update(batch) for _ in range(8)]
    first, last = results[0].metrics, results[-1].metrics
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    # At the reference every pair costs log 2, times its weight.
    assert first["loss"] == pytest.approx(np.log(2) * batch.weights.mean(), rel=1e-5)
    assert last["margin"] > 1.0
    assert last["accuracy"] == 1.0
    assert first["length_chosen"] == pytest.approx(batch.completion_lengths[batch.chosen].mean())
    assert first["log_ratio_chosen"] - first["log_ratio_rejected"] == pytest.approx(first["margin"], abs=1e-5)
    assert (first["staleness_mean"], first["staleness_max"]) == (1.0, 1.0)
    assert [result.step for result in results] == list(range(1, 9))
    assert (results[0].pair_ids, results[0].tokens) == (batch.pair_ids, batch.num_tokens)


def test_update_wants_reference_logprobs(model_dir):
    with pytest.raises(ValueError, match="annotate it first"):
        make_trainer(model_dir).update(pack(make_pairs(1)))


def test_save_replaces_whole_folders_and_load_refuses_others(model_dir, tmp_path):
    trainer = make_trainer(model_dir)
    trainer.begin_iteration(1, 1)
    trainer.save(tmp_path / "checkpoint")
    train(trainer, 1)
    trainer.save(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    resumed = make_trainer(model_dir)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.step == 1
    with pytest.raises(ModelError, match=r"reference\.kind=previous"):
        make_trainer(model_dir, kind="ema").load(tmp_path / "checkpoint")
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="another model"):
        make_trainer(tmp_path / "gpt2").load(tmp_path / "checkpoint")


def test_references_move_as_their_kinds_say(model_dir):
    for kind in ("previous", "initial", "ema"):
        trainer = make_trainer(model_dir, kind=kind)
        initial = weights(trainer)
        trainer.begin_iteration(1, 2)
        assert largest_difference(trainer.reference.parameters, initial) == 0.0
        train(trainer, 2)
        iterate = weights(trainer)
        assert largest_difference(iterate, initial) > 1e-3
        assert largest_difference(trainer.reference.parameters, initial) == 0.0
        trainer.begin_iteration(2, 2)
        trainer.begin_iteration(2, 2)
        kept = {"previous": 0.0, "initial": 1.0, "ema": 0.75}[kind]
        expected = {name: kept * initial[name] + (1 - kept) * iterate[name] for name in initial}
        assert largest_difference(trainer.reference.parameters, expected) < 1e-6


def test_annotation_is_the_reference_not_the_policy(model_dir):
    trainer = make_trainer(model_dir, kind="initial")
    batch = pack(make_pairs(3))
    trainer.begin_iteration(1, 2)
    before = trainer.annotate(batch).reference_logprobs
    live = trainer.policy(batch).detach().cpu().numpy()
    np.testing.assert_allclose(before, live, atol=1e-5)
    train(trainer, 2)
    assert np.array_equal(trainer.annotate(batch).reference_logprobs, before)
    assert not np.allclose(trainer.policy(batch).detach().cpu().numpy(), before, atol=1e-2)


def test_log_probs_that_were_sampled_are_not_computed_again(model_dir, monkeypatch):
    trainer = make_trainer(model_dir)
    monkeypatch.setattr(trainer.reference, "logprobs", None)
    pairs = [replace(pair, reference=pair.chosen.policy) for pair in make_pairs(3)]
    batch = pack(pairs, sampled_reference=True)
    assert trainer.annotate(batch) is batch
    expected = sum(pair.chosen.logprobs[0] for pair in pairs)
    assert trainer.update(batch).metrics["loss"] < float("inf")
    assert sum(_pieces(batch)[index][0] for index in batch.chosen) == pytest.approx(expected)


def test_the_reference_scores_each_completion_once_an_iteration(model_dir, monkeypatch):
    trainer = make_trainer(model_dir)
    trainer.begin_iteration(1, 4)
    scored = []
    score = trainer.reference.logprobs
    monkeypatch.setattr(trainer.reference, "logprobs", lambda part: scored.append(part) or score(part))
    batch = pack(make_pairs(6, seed=3))
    first = trainer.annotate(batch)
    trainer.update(first)
    parts = len(scored)
    again = trainer.annotate(pack(list(reversed(make_pairs(6, seed=3)))))
    assert len(scored) == parts
    values = [dict(zip(completion_keys(b), _pieces(b), strict=True)) for b in (first, again)]
    assert values[0].keys() == values[1].keys()
    assert all(np.array_equal(values[0][key], values[1][key]) for key in values[0])
    trainer.begin_iteration(2, 4)
    trainer.annotate(batch)
    assert len(scored) == 2 * parts, "the reference moved"


def _pieces(batch):
    return np.split(batch.reference_logprobs, np.cumsum(batch.completion_lengths)[:-1])


def test_kl_to_the_initial_model(model_dir):
    trainer = make_trainer(model_dir, kind="previous", keep_initial=True)
    samples = [(pair.prompt, pair.chosen) for pair in make_pairs(4)]
    assert trainer.kl_to_initial(samples) == 0.0
    trainer.begin_iteration(1, 2)
    train(trainer, 2)
    trainer.begin_iteration(2, 2)
    assert trainer.kl_to_initial(samples) > 0.01
    with pytest.raises(ValueError, match="keep_initial"):
        make_trainer(model_dir).kl_to_initial(samples)


def test_kl_estimate_is_unbiased():
    """Its mean under the policy is the exact KL of two distributions over ten tokens."""
    generator = torch.Generator().manual_seed(0)
    policy, initial = (torch.randn(10, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - initial)).sum()
    estimate = (policy.exp() * kl_estimate(policy, initial)).sum()
    assert estimate.item() == pytest.approx(exact.item())


def test_score_gives_every_token_but_the_first(model_dir):
    trainer = make_trainer(model_dir, micro_batch_tokens=16)
    sequences = [(3, 4, 5), tuple(range(20)), (3, 4, 6), (3, 4, 5)]
    scores = trainer.score(sequences)
    assert [len(score) for score in scores] == [2, 19, 2, 2]
    model = trainer.policy.model
    for sequence, score in zip(sequences, scores, strict=True):
        ids = torch.tensor([sequence], device=trainer.policy.device)
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].cpu()
        expected = logprobs.gather(1, torch.tensor(sequence)[1:, None])[:, 0].detach().numpy()
        np.testing.assert_allclose(score, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_named_tensors_are_those_of_a_saved_checkpoint(tmp_path, name, dtype):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tensors = make_trainer(tmp_path, dtype=dtype).named_tensors()
    assert set(tensors) == set(saved)
    for key, tensor in tensors.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor.cpu(), saved[key].to(getattr(torch, dtype))), key


def test_bfloat16_keeps_weights_that_move_less_than_its_spacing(model_dir):
    trainer = make_trainer(model_dir, dtype="bfloat16", lr=1e-6)
    before = weights(trainer)
    trainer.begin_iteration(1, 2)
    train(trainer, 2)
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}
    assert 0 < largest_difference(weights(trainer), before) < 1e-5


def test_dropout_is_off_and_folders_without_a_model_are_refused(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    trainer = make_trainer(tmp_path / "gpt2", activation_checkpointing="full")
    batch = pack(make_pairs(2))
    assert trainer.policy.model.training
    assert torch.equal(trainer.policy(batch), trainer.policy(batch))
    with pytest.raises(ModelError, match=r"no config\.json"):
        make_trainer(tmp_path)
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        make_trainer(tmp_path / "gpt2")


def test_without_a_reference_none_is_kept_or_computed(model_dir, tmp_path, monkeypatch):
    """SimPO needs none: the same step as with one, no snapshot in memory and none in the checkpoint."""
    loss = LossConfig(name="simpo", beta=2.0, gamma=0.5)
    batch = pack(make_pairs(4))
    with_one, without = (make_trainer(model_dir, kind=kind, loss=loss) for kind in ("previous", "none"))
    for trainer in (with_one, without):
        trainer.begin_iteration(1, 2)
    expected = with_one.update(with_one.annotate(batch)).metrics["loss"]
    monkeypatch.setattr(without.policy, "logprobs_with", None)
    assert without.reference.parameters == {}
    assert without.update(without.annotate(batch)).metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert largest_difference(weights(with_one), weights(without)) < 1e-7
    without.save(tmp_path / "saved")
    assert not Checkpoint(tmp_path / "saved").names("reference")
    again = make_trainer(model_dir, kind="none", loss=loss)
    again.load(tmp_path / "saved")
    assert largest_difference(weights(again), weights(without)) == 0


def test_pairs_of_older_weights_count_as_often_as_the_policy_would_sample_them(model_dir):
    """rho = pi / mu of each completion within [1/c, c], by the plain forward pass; 1 where nothing is stale."""
    clip, beta = 1.5, 0.1
    loss = LossConfig(beta=beta, importance_clip=clip)
    lots, before = np.random.default_rng(3), make_pairs(8, pairs_per_prompt=1)
    batch = pack(before)
    now = plain_token_logprobs(make_trainer(model_dir).policy.model, batch).logprobs.detach().double().numpy()
    now = np.split(now, np.cumsum(batch.completion_lengths)[:-1])

    def older(side, place, number):
        logprobs = now[place] + lots.normal(0, 0.15, len(now[place]))
        return replace(side, policy=replace(side.policy, number=number), logprobs=tuple(logprobs))

    pairs = [
        replace(
            pair,
            chosen=older(pair.chosen, batch.chosen[index], index % 2),
            rejected=older(pair.rejected, batch.rejected[index], 1),
            weight=1.0,
        )
        for index, pair in enumerate(before)
    ]
    results = []
    for micro_batch_tokens in (32, 10_000):
        trainer = make_trainer(model_dir, loss=loss, micro_batch_tokens=micro_batch_tokens)
        trainer.version = 1
        trainer.begin_iteration(1, 1)
        trainer.reference.parameters["lm_head.weight"].mul_(1.1)
        batch = trainer.annotate(pack(pairs, stale=True))
        policy = plain_token_logprobs(trainer.policy.model, batch).logprobs.detach().double().numpy()
        results.append(trainer.update(batch).metrics)
    cuts = np.cumsum(batch.completion_lengths)[:-1]
    ours, anchors = (
        np.array([part.sum() for part in np.split(values, cuts)]) for values in (policy, batch.reference_logprobs)
    )
    losses, importances = [], []
    for index, pair in enumerate(pairs):
        chosen, rejected = batch.chosen[index], batch.rejected[index]
        rho = [
            min(max(np.exp(ours[place] - sum(side.logprobs)), 1 / clip), clip)
            for place, side in ((chosen, pair.chosen), (rejected, pair.rejected))
        ]
        importances.append(1.0 if index % 2 else rho[0] * rho[1])
        delta = beta * (ours[chosen] - anchors[chosen] - ours[rejected] + anchors[rejected])
        losses.append(importances[-1] * np.log1p(np.exp(-delta)))
    assert len(set(np.round(importances, 6))) > 3, "some are clipped, others are not"
    for metrics in results:
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["importance"] == pytest.approx(np.mean(importances), rel=1e-5)
        assert (metrics["staleness_mean"], metrics["staleness_max"]) == (0.5, 1)
