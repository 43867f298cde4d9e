"""What disturbs training changes nothing of what is learned: a stop, a batch that comes again, a bad one, no memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
from learners.learner import Learner
from learners.spikes import largest_norm
from learners.trainer import Trainer
from orchestrator.batching import batches, pack, split
from orchestrator.errors import ActorLostError, DeadlineError, TrainingError
from orchestrator.metrics import update_metrics
from orchestrator.queues import BatchQueue
from tests.learning import make_model, make_pairs


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


def make_trainer(model_dir, *, loss="dpo", kind="previous", **learner):
    settings = {"lr": 1e-2, "num_threads": 1, "micro_batch_tokens": 64, "vocab_chunk": 16, "schedule": "cosine"}
    return Trainer(
        model_dir,
        loss=LossConfig(name=loss, beta=0.3),
        reference=ReferenceConfig(kind=kind, ema_decay=0.75),
        learner=LearnerConfig(**settings | learner),
    )


def make_batches(iteration=1, epochs=2):
    """Three batches an epoch; each epoch cuts them otherwise."""
    pairs = [replace(pair, weight=1.0) for pair in make_pairs(6, iteration=iteration, seed=iteration)]
    cut = [part for e in range(epochs) for part in batches(pairs, batch_pairs=4, seed=0, epoch=e, whole_groups=True)]
    return [pack(part, number=number) for number, part in enumerate(cut)]


def consume(trainer, made):
    return [trainer.update(trainer.annotate(batch)) for batch in made]


def begin(trainer):
    """As the first iteration leaves it, at the start of the second."""
    trainer.begin_iteration(1, 3)
    consume(trainer, make_batches(epochs=1))
    trainer.begin_iteration(2, 6)
    return trainer


def bits(trainer):
    """Everything a step depends on or moves, to be compared for equality."""
    state = trainer.state()
    tensors = {
        f"{entry}.{name}": t.detach().clone() for entry, named in state.tensors.items() for name, t in named.items()
    }
    return tensors, state.facts


def assert_same(ours, theirs, *, but=()):
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, theirs[0][name]), name
    assert {k: v for k, v in ours[1].items() if k not in but} == {k: v for k, v in theirs[1].items() if k not in but}


@pytest.mark.parametrize(
    ("loss", "kind"), [("dpo", "previous"), ("dpo", "ema"), ("dpo", "initial"), ("kto", "ema"), ("bco", "previous")]
)
def test_a_trainer_that_was_saved_goes_on_bit_for_bit(model_dir, tmp_path, loss, kind):
    """Stopped before, within and after the first epoch, within the second, and once more in between."""
    made = make_batches(2)
    straight = begin(make_trainer(model_dir, loss=loss, kind=kind, weight_decay=0.01))
    stopped = tmp_path / "stopped"
    folders = []
    for number, batch in enumerate([*made, None]):
        folders.append(tmp_path / str(number))
        straight.save(folders[-1])
        if batch is not None:
            consume(straight, [batch])
    for done in (0, 1, 3, 4):
        resumed = make_trainer(model_dir, loss=loss, kind=kind, weight_decay=0.01)
        resumed.load(folders[done])
        assert resumed.begin_iteration(2, 6) == done
        consume(resumed, made[done:5])
        resumed.save(stopped)
        again = make_trainer(model_dir, loss=loss, kind=kind, weight_decay=0.01)
        again.load(stopped)
        consume(again, made[5:])
        assert_same(bits(again), bits(straight))


def test_reference_logprobs_are_saved_and_not_computed_again(model_dir, tmp_path, monkeypatch):
    trainer = begin(make_trainer(model_dir))
    first, second = make_batches(2)[:2]
    known = trainer.annotate(first).reference_logprobs
    trainer.save(tmp_path / "saved")
    resumed = make_trainer(model_dir)
    resumed.load(tmp_path / "saved")
    monkeypatch.setattr(resumed.reference, "logprobs", None)
    assert np.array_equal(resumed.annotate(first).reference_logprobs, known)
    with pytest.raises(TypeError):
        resumed.annotate(second)


@pytest.mark.parametrize("loss", ["dpo", "bco"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_whose_loss_is_not_finite_is_skipped_and_nothing_moves(model_dir, loss, value):
    trainer = begin(make_trainer(model_dir, loss=loss, max_skipped=1))
    made = make_batches(2)
    consume(trainer, made[:1])
    batch = trainer.annotate(made[1])
    before = bits(trainer)
    poisoned = replace(batch, reference_logprobs=np.full_like(batch.reference_logprobs, value))
    result = trainer.update(poisoned)
    assert result.skipped.startswith("its loss is ")
    assert (result.step, result.batch) == (5, 1)
    assert_same(bits(trainer), before, but=("step", "batches_done", "skipped"))
    assert (trainer.step, trainer.batches_done) == (5, 2)
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())
    after = consume(trainer, made[2:3])[0]
    assert not after.skipped
    assert after.metrics["lr"] == pytest.approx(0.5 * 1e-2 * (1 + np.cos(np.pi * 2 / 6))), "the schedule went on"
    means = update_metrics([result, after])
    assert means["train/loss"] == after.metrics["loss"]
    assert np.isfinite(list(means.values())).all()
    assert "train/loss" not in update_metrics([result])


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(model_dir):
    trainer = begin(make_trainer(model_dir))
    before = bits(trainer)
    hook = trainer.policy.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    (result,) = consume(trainer, make_batches(2)[:1])
    assert result.skipped in ("its gradient norm is nan", "its gradient norm is inf")
    hook.remove()
    ours = bits(trainer)
    assert_same(({name: ours[0][name] for name in before[0]}, {}), (before[0], {}))


def test_a_gradient_out_of_all_proportion_is_skipped_once_there_is_a_proportion(model_dir, monkeypatch):
    """Of eight accepted norms the median is known; factor 1 then refuses what is above it."""
    trainer = make_trainer(model_dir, spike_factor=1.0001, max_skipped=100)
    trainer.begin_iteration(1, 100)
    made = make_batches()
    results = [consume(trainer, [made[index % 6]])[0] for index in range(8)]
    assert not any(result.skipped for result in results)
    middle = float(np.median([result.metrics["grad_norm"] for result in results]))
    trainer.policy.model.lm_head.weight.register_hook(lambda gradient: gradient * 1e4)
    before = bits(trainer)
    (spiked,) = consume(trainer, made[:1])
    assert spiked.metrics["grad_norm"] > 1.0001 * middle
    assert f"exceeds {1.0001 * middle:.3g}, learner.spike_factor times the median" in spiked.skipped
    assert_same(bits(trainer), before, but=("step", "batches_done", "skipped"))


def test_the_largest_norm_is_a_multiple_of_the_median_of_recent_ones():
    recent = deque([9.0, 1.0, 2.0, 1.0, 1.0, 3.0, 2.0], maxlen=32)
    assert largest_norm(recent, 10) == float("inf"), "seven tell nothing"
    recent.append(4.0)
    assert largest_norm(recent, 10) == 20.0
    assert largest_norm([0.0] * 5 + [1.0] * 3, 10) == float("inf"), "of a loss that is often flat"


def test_too_many_skipped_batches_end_the_iteration(model_dir):
    trainer = begin(make_trainer(model_dir, max_skipped=1))
    made = [trainer.annotate(batch) for batch in make_batches(2)]
    bad = [replace(batch, reference_logprobs=batch.reference_logprobs * float("nan")) for batch in made]
    assert trainer.update(bad[0]).skipped
    assert not trainer.update(made[1]).skipped
    with pytest.raises(TrainingError, match=r"iteration 2: 2 batches were skipped, more than learner\.max_skipped=1"):
        trainer.update(bad[2])
    assert trainer.batches_done == 3
    trainer.begin_iteration(3, 6)
    assert trainer.update(replace(bad[0], iteration=3)).skipped, "each iteration counts its own"


def scarce(policy, monkeypatch, most, error=None):
    """Memory for forward passes of `most` tokens: a larger one meets the allocator's own refusal, or `error`."""
    scores, seen = policy.scores, []

    def scores_within(columns, **options):
        seen.append(len(columns.tokens))
        if len(columns.tokens) > most:
            if error is not None:
                raise error
            torch.empty(1 << 50)
        return scores(columns, **options)

    monkeypatch.setattr(policy, "scores", scores_within)
    return seen


@pytest.mark.parametrize("loss", ["dpo", "bco"])
@pytest.mark.parametrize("error", [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_halves_the_micro_batch_and_tries_again(model_dir, tmp_path, monkeypatch, loss, error):
    """The same step as with the smaller one from the start; it stays, in checkpoints too, until people set another."""
    made = make_batches(2)
    most = max(len(part.tokens) for batch in made for part in split(batch, 32))
    assert most < min(batch.num_tokens for batch in made[:2])
    trainer = begin(make_trainer(model_dir, loss=loss, micro_batch_tokens=128))
    annotated = trainer.annotate(made[0])
    scarce(trainer.policy, monkeypatch, most, error)
    result = trainer.update(annotated)
    (note,) = result.notes
    assert "from 128 to 32 tokens" in note
    assert "learner.micro_batch_tokens=32" in note
    small = begin(make_trainer(model_dir, loss=loss, micro_batch_tokens=128))
    expected = small.annotate(made[0])
    small._micro_batch_tokens = 32
    assert result.metrics == small.update(expected).metrics
    assert consume(trainer, made[1:2])[0].notes == ()
    consume(small, made[1:2])
    assert_same(bits(trainer), bits(small))
    trainer.save(tmp_path / "saved")
    for given, used in ((128, 32), (96, 96)):
        resumed = make_trainer(model_dir, loss=loss, micro_batch_tokens=given)
        resumed.load(tmp_path / "saved")
        assert resumed.state().facts["micro_batch_tokens"] == {"given": given, "used": used}


def test_the_reference_pass_is_halved_too_and_the_next_result_says_so(model_dir, monkeypatch):
    trainer = begin(make_trainer(model_dir, micro_batch_tokens=64))
    (batch,) = make_batches(2)[:1]
    scarce(trainer.policy, monkeypatch, max(len(part.tokens) for part in split(batch, 32)))
    assert "from 64 to 32 tokens" in trainer.update(trainer.annotate(batch)).notes[0]


def test_a_single_prompt_that_does_not_fit_is_an_error_and_nothing_moves(model_dir, monkeypatch):
    trainer = begin(make_trainer(model_dir, micro_batch_tokens=128))
    (batch,) = make_batches(2)[:1]
    annotated = trainer.annotate(batch)
    before = bits(trainer)
    seen = scarce(trainer.policy, monkeypatch, 0)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        trainer.update(annotated)
    assert seen[-1] == split(batch, 1)[0].num_tokens
    assert_same(bits(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())
    monkeypatch.undo()
    monkeypatch.setattr(trainer.policy, "scores", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        trainer.update(annotated)
    assert_same(bits(trainer), before)


@pytest.fixture
def learner(model_dir):
    """Not in a process of its own, so that its state can be seen."""
    one = Learner(
        model_dir=str(model_dir),
        dtype="float32",
        loss=LossConfig(beta=0.3),
        reference=ReferenceConfig(),
        learner=LearnerConfig(lr=1e-2, num_threads=1, micro_batch_tokens=64, step_deadline_s=20, max_skipped=0),
        keep_initial=False,
        probe_token_ids=(1, 2),
        weight_transport="object_store",
        workers_per_receiver=1,
        seeds=(),
        seed=0,
    )
    one.begin_iteration(1, 6, 0)
    return one


def put(queue, made):
    for batch in made:
        assert queue.put(ray.put(batch), timeout_s=10)


def test_each_batch_counts_once_however_often_it_is_delivered(ray_cluster, learner, model_dir, tmp_path):
    """Batches that were consumed come again in front, in between and after the iteration's end."""
    made = make_batches()
    queue = BatchQueue.create(20, deadline_s=30)
    put(queue, [made[0], made[1], made[0], made[1], made[2], made[2]])
    assert [result.batch for result in learner.train(queue, 0, 3, acknowledged=0)] == [0, 1, 2]
    learner.save(str(tmp_path / "saved"))
    put(queue, made[3:])
    assert [result.batch for result in learner.train(queue, 3, 6, acknowledged=3)] == [3, 4, 5]
    assert len(learner.saved(str(tmp_path / "saved"))) == 16
    assert queue.size() == 0
    finished = bits(learner._trainer)
    assert learner.begin_iteration(1, 6, 7) == 6

    assert learner.load(str(tmp_path / "saved"), version=7) == 3
    assert learner.begin_iteration(1, 6, 7) == 3
    assert learner._trainer.version == 7
    put(queue, made)
    assert [result.batch for result in learner.train(queue, 3, 6, acknowledged=3)] == [3, 4, 5]
    assert_same(bits(learner._trainer), finished, but=("version",))

    learner.begin_iteration(2, 6, 7)
    put(queue, [made[5], make_batches(2)[0]])
    assert [result.batch for result in learner.train(queue, 0, 1, acknowledged=0)] == [0], "of the iteration before"
    put(queue, [make_batches(2)[2]])
    with pytest.raises(RuntimeError, match="batch 2 of iteration 2 where batch 1 of iteration 2 was due"):
        learner.train(queue, 1, 2, acknowledged=1)


def test_a_lease_that_ran_out_while_training_is_no_error(ray_cluster, learner, monkeypatch):
    made = make_batches()
    queue = BatchQueue.create(20, deadline_s=30)
    put(queue, made[:2])
    lease = queue.lease
    monkeypatch.setattr(queue, "lease", lambda *, timeout_s, duration_s, done: lease(timeout_s=timeout_s, duration_s=0))
    queue_acknowledge, refused = queue.acknowledge, []

    def acknowledge(lease_ids):
        queue.size()
        assert lease(timeout_s=5, duration_s=0), "it is delivered to another as well"
        refused.extend(queue_acknowledge([lease_id + 1000 for lease_id in lease_ids]))
        queue_acknowledge(lease_ids)
        return refused

    monkeypatch.setattr(queue, "acknowledge", acknowledge)
    assert [result.batch for result in learner.train(queue, 0, 1, acknowledged=0)] == [0]
    assert refused
    assert not any(refused)


def test_a_batch_behind_the_last_one_asked_for_stays_in_the_queue(ray_cluster, learner):
    made = make_batches()
    queue = BatchQueue.create(20, deadline_s=30)
    put(queue, made[:3])
    assert [result.batch for result in learner.train(queue, 0, 1, acknowledged=0)] == [0]
    assert learner._trainer.batches_done == 1
    assert queue.size() == 2
    assert [result.batch for result in learner.train(queue, 1, 3, acknowledged=1)] == [1, 2]
    assert queue.size() == 0


def test_weights_that_are_published_again_take_no_memory_that_may_be_in_use(ray_cluster, learner):
    """Generators on CPUs compute with it; whoever missed a version computes with that of the one before."""
    here = [ray.get_runtime_context().get_node_id()]
    first, second, again, third, fourth = (
        learner.publish(number, [], here, 30.0).shared.serial for number in (1, 2, 2, 3, 4)
    )
    assert len({first, second, again, third}) == 4
    assert fourth == again


def test_a_queue_that_dies_leaves_a_learner_that_goes_on(ray_cluster, learner, monkeypatch):
    made = make_batches()
    queue, other = BatchQueue.create(20, deadline_s=30), BatchQueue.create(20, deadline_s=30)
    put(queue, made[:3])
    annotate = learner._trainer.annotate

    def kill_then_annotate(batch):
        if batch.number == 2:
            ray.kill(queue._actor)
        return annotate(batch)

    monkeypatch.setattr(learner._trainer, "annotate", kill_then_annotate)
    with pytest.raises(ActorLostError):
        learner.train(queue, 0, 6, acknowledged=0)
    assert learner.begin_iteration(1, 6, 7) == 3, "the one that could not be acknowledged was consumed"
    put(other, made[2:])
    assert [result.batch for result in learner.train(other, 0, 6, acknowledged=0)] == [0, 1, 2, 3, 4, 5], "none is lost"


def test_a_queue_without_batches_is_named(learner):
    class Empty:
        at_once = 1

        def lease(self, *, timeout_s, duration_s, done):
            return None

    with pytest.raises(DeadlineError, match="no batch in the queue within 20 s"):
        learner.train(Empty(), 0, 1, acknowledged=0)


def test_one_thread_computes_whoever_asks(learner, tmp_path, monkeypatch):
    """A second one would have a team of OpenMP of its own, and both would sleep between loops."""
    seen = []
    for name in ("begin_iteration", "score", "state"):
        original = getattr(learner._trainer, name)

        def noting(*arguments, original=original):
            seen.append(threading.get_ident())
            return original(*arguments)

        monkeypatch.setattr(learner._trainer, name, noting)

    def ask():
        learner.begin_iteration(1, 6, 7)
        learner._alone(learner._score_probe)
        learner.save(str(tmp_path / f"saved-{threading.get_ident()}"))

    ask()
    other = threading.Thread(target=ask)
    other.start()
    other.join()
    assert len(seen) == 5, "the probe is scored once"
    assert len(set(seen)) == 1
