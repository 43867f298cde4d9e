"""The learner as the loop sees it holds what the ledger says, whoever dies. A stand-in; the real one is in test_run."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray

from conf.compose import compose
from learners.manifest import FileRecord, manifest_digest, write_manifest
from orchestrator.accounts import Accounts, CheckpointRecord
from orchestrator.errors import (
    ActorLostError,
    ActorStartError,
    DeadlineError,
    ModelError,
    PoolError,
    UnsettledError,
)
from orchestrator.events import EventKind
from orchestrator.learning import Learning
from orchestrator.ledger import Ledger
from orchestrator.queues import BatchQueue, LeaseBuffer, at_once
from orchestrator.stacks import Observable
from orchestrator.training import Training


class FakeLearner(Observable):
    """Holds the name of the checkpoint that it loaded; one that is named `damaged` cannot be."""

    def __init__(self):
        self.holds = "initial"

    def ready(self):
        return os.getpid()

    def load(self, folder, version):
        name = os.path.basename(folder)
        if name == "damaged":
            raise ModelError("a file is cut.")
        if name == "silent":
            raise DeadlineError("nothing was read for an hour")
        if name == "failing":
            raise OSError(5, "Input/output error")
        self.holds = name
        return len(name)

    def held(self):
        return self.holds


class Killed(FakeLearner):
    """Its first process is gone before it is up."""

    def __init__(self, graves):
        super().__init__()
        if not (graves / "start").exists():
            (graves / "start").touch()
            os._exit(1)


class StillBorn(FakeLearner):
    def __init__(self):
        raise ValueError("no weights here")


def start_learning(ledger, folder, events, learner=FakeLearner, *arguments):
    """One with a budget of two restarts."""
    return Learning(
        config=compose(["learner.restarts=2"]),
        run_dir=folder,
        start=lambda: ray.remote(learner).options(num_cpus=0, max_concurrency=2).remote(*arguments),
        start_queue=lambda: BatchQueue.create(4, deadline_s=30),
        ledger=ledger,
        accounts=Accounts(ledger),
        emit=events.append,
    )


@pytest.fixture
def parts(ray_cluster, tmp_path):
    """A learning, its accounts and its events."""
    events = []
    with Ledger(tmp_path) as ledger:
        learning = start_learning(ledger, tmp_path, events)
        learning.wait_ready()
        yield learning, Accounts(ledger), events


def test_one_that_is_killed_as_it_starts_is_replaced(ray_cluster, tmp_path):
    events = []
    with Ledger(tmp_path) as ledger:
        learning = start_learning(ledger, tmp_path, events, Killed, tmp_path)
        learning.wait_ready()
        assert learning.call("held", what="what it holds") == "initial"
    assert [event.kind for event in events] == [EventKind.LOST, EventKind.REPLACED]


def test_a_queue_that_is_killed_as_it_starts_is_replaced(ray_cluster, tmp_path):
    events = []
    with Ledger(tmp_path) as ledger:
        learning = start_learning(ledger, tmp_path, events)
        learning.queue.end()
        wait_dead(learning.queue)
        learning.wait_ready()
        assert learning.queue.size() == 0


def test_one_that_cannot_start_is_not_tried_again(ray_cluster, tmp_path):
    events = []
    with Ledger(tmp_path) as ledger, pytest.raises(ActorStartError, match="no weights here"):
        start_learning(ledger, tmp_path, events, StillBorn).wait_ready()
    assert events == []


def checkpoint(learning, accounts, name, iteration):
    folder = learning._run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(name)
    digest = write_manifest(folder, {"trainer.json": FileRecord(size=len(name), digest="0" * 16)})
    record = CheckpointRecord(path=f"checkpoints/{name}", iteration=iteration, batches=1, step=iteration, digest=digest)
    accounts.acknowledge(record, [])
    return folder


def wait_dead(queue):
    """A call that arrives before the kill is answered still."""
    for _ in range(600):
        try:
            queue.size()
        except ActorLostError:
            return
        time.sleep(0.1)
    raise AssertionError("the queue lives on")


def die(learning):
    os.kill(ray.get(learning.actor.ready.remote(), timeout=60), signal.SIGKILL)


def test_one_that_dies_is_replaced_with_what_counts_until_the_budget_is_spent(parts):
    learning, accounts, events = parts
    checkpoint(learning, accounts, "first", 1)
    checkpoint(learning, accounts, "second", 2)
    for left in (1, 0):
        die(learning)
        assert learning.call("held", what="what it holds") == "second"
        assert [event.kind for event in events[-2:]] == [EventKind.LOST, EventKind.REPLACED]
        assert f"({left} restarts of the learner left)" in events[-2].text
    die(learning)
    with pytest.raises(PoolError, match=r"learner\.restarts"):
        learning.call("held", what="what it holds")


def test_a_queue_that_dies_takes_nothing_with_it(parts):
    learning, accounts, events = parts
    checkpoint(learning, accounts, "first", 1)
    before = ray.get(learning.actor.ready.remote(), timeout=60)
    learning.queue.end()
    wait_dead(learning.queue)
    assert learning.surviving(lambda: learning.queue.size()) == 0
    assert ray.get(learning.actor.ready.remote(), timeout=60) == before
    assert learning.call("held", what="what it holds") == "initial", "it was not sent back"
    assert "goes on from where it was" in events[-1].text


def test_a_queue_that_dies_as_the_learner_is_replaced_leaves_no_learner_that_knows_nothing(parts, monkeypatch):
    """The new learner lives, and yet is not to be gone on with: it holds the initial model."""
    learning, accounts, events = parts
    checkpoint(learning, accounts, "first", 1)
    begin = learning._begin

    def and_the_queue_dies():
        monkeypatch.setattr(learning, "_begin", begin)
        actor = begin()
        learning.queue.end()
        wait_dead(learning.queue)
        return actor

    monkeypatch.setattr(learning, "_begin", and_the_queue_dies)
    die(learning)
    assert learning.call("held", what="what it holds") == "first"
    assert "goes on from checkpoints/first" in events[-1].text


def test_damaged_and_exchanged_checkpoints_are_gone_back_behind(parts):
    learning, accounts, events = parts
    first = checkpoint(learning, accounts, "first", 1)
    exchanged = checkpoint(learning, accounts, "exchanged", 2)
    checkpoint(learning, accounts, "damaged", 3)
    (exchanged / "manifest.json").write_bytes((first / "manifest.json").read_bytes() + b" ")
    assert learning.restore().path == "checkpoints/first"
    assert learning.call("held", what="what it holds") == "first"
    assert [record.path for record in accounts.checkpoints()] == ["checkpoints/first"]
    told = [event.text for event in events if event.kind is EventKind.DAMAGED]
    assert told[0].startswith("a file is cut. Going on from checkpoints/exchanged")
    assert "is another checkpoint than the one that was written there" in told[1]
    assert manifest_digest(first) == accounts.checkpoints()[0].digest


@pytest.mark.parametrize(("name", "error"), [("silent", DeadlineError), ("failing", OSError)])
def test_a_disk_that_does_not_answer_says_nothing_of_what_is_on_it(parts, name, error):
    learning, accounts, events = parts
    folders = [checkpoint(learning, accounts, each, number) for number, each in enumerate(("first", name), 1)]
    with pytest.raises(error):
        learning.restore()
    learning.tidy()
    assert [record.iteration for record in accounts.checkpoints()] == [1, 2]
    assert all(folder.exists() for folder in folders)
    assert events == []


def test_what_is_given_up_is_in_nobody_s_hands(parts):
    learning, accounts, _ = parts
    checkpoint(learning, accounts, "first", 1)
    second = checkpoint(learning, accounts, "second", 2)
    learning.restore()
    learning.give_up(2)
    assert learning.call("held", what="what it holds") == "first"
    assert not second.exists()
    learning.give_up(1)
    assert learning.call("held", what="what it holds") == "initial"


def test_one_that_dies_before_it_is_on_disk_is_missed_by_everybody_until_it_is_trained_again(parts):
    """Whoever took its place does not hold what was published, and is asked for nothing meanwhile."""
    learning, accounts, events = parts
    checkpoint(learning, accounts, "first", 1)
    learning.is_ahead = True
    die(learning)
    with pytest.raises(UnsettledError):
        learning.call("held", what="what it holds")
    assert events[-1].kind is EventKind.REPLACED
    assert learning.has_moved, "nobody is given its weights under the name of the lost ones"
    with pytest.raises(UnsettledError):
        learning.call("held", what="what it holds")
    assert learning.surviving(lambda: learning.ask("held", what="what it holds"), anew=True) == "first"
    assert learning.call("held", what="what it holds") == "first"


def test_one_that_is_given_up_before_it_is_on_disk_is_nobody_s_loss(parts):
    learning, accounts, _ = parts
    checkpoint(learning, accounts, "first", 1)
    learning.is_ahead = True
    die(learning)
    learning.give_up(2)
    assert learning.call("held", what="what it holds") == "first"


@pytest.mark.parametrize("step_s", [1.0, 2.6, 9.0])
def test_steps_that_keep_their_deadline_do_not_end_the_feeding(monkeypatch, step_s):
    """The real buffer, and a learner that leases as many as it may and acknowledges them with the next lease."""
    config = compose(["learner.step_deadline_s=10"])
    buffer, most = LeaseBuffer(config.pipeline.queue_capacity), at_once(config.pipeline.queue_capacity)
    clock, learner = SimpleNamespace(now=0.0), SimpleNamespace(leases=[], free_at=0.0)

    def learn():
        while learner.free_at <= clock.now:
            for lease in learner.leases:
                buffer.acknowledge(lease.id)
            leases = (buffer.lease(now=clock.now, duration=1e9) for _ in range(most))
            learner.leases = [lease for lease in leases if lease is not None]
            learner.free_at += step_s * len(learner.leases) or 0.01

    def taken(offer, timeout_s):
        count, end = 0, clock.now + timeout_s
        while offer and clock.now < end:
            learn()
            if buffer.put(offer[0]):
                offer.pop(0)
                count += 1
            else:
                clock.now += 0.1
        return count

    queue = SimpleNamespace(at_once=most, taken=taken, offer=lambda refs, timeout_s: list(refs))
    accounts = SimpleNamespace(issue_batch=lambda *_: None)
    parts = dict.fromkeys(("run_dir", "ledger", "store", "tracker", "emit"))
    training = Training(config=config, learning=SimpleNamespace(queue=queue), accounts=accounts, **parts)
    monkeypatch.setattr("orchestrator.training.batching.pack", lambda *_, **__: "packed")
    monkeypatch.setattr("orchestrator.training.ray.put", lambda one: one)
    monkeypatch.setattr("orchestrator.training.ray.wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr("orchestrator.training.time.monotonic", lambda: clock.now)
    monkeypatch.setattr(training, "_show", lambda *_: None)
    training._feed(1, [[]] * 40, 0, 40, None)
    assert len(buffer) <= buffer.capacity
    learner.free_at = float("inf")
    with pytest.raises(DeadlineError, match="took no batch from the queue within 40 s"):
        training._feed(1, [[]] * 40, 0, 40, None)
