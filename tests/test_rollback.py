"""Updates that go wrong on a real run: what was trained is in no weights, and what follows knows nothing of it."""

import json
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from conf.compose import compose
from launch.audit import audit
from launch.run import run
from learners import checkpoint
from learners.learner import Learner
from orchestrator.accounts import Accounts
from orchestrator.ledger import LedgerReader
from orchestrator.metrics import ROLLED_BACK, update_metrics
from orchestrator.store import Store, read_pairs, read_rollouts
from orchestrator.training import Training
from tests.runs import REFERENCE, do_run

DEADLINE_S = 60.0
FIRST_BAD = 1
"""Batch of each iteration but the first from which on gradients are not finite."""


class ExplodingLearner(Learner):
    """From the second iteration on its gradients become NaN with batch `FIRST_BAD`."""

    def __init__(self, **options):
        super().__init__(**options)
        next(self._trainer.policy.model.parameters()).register_hook(self._explode)

    def _explode(self, gradient):
        bad = self._trainer.iteration > 1 and self._trainer.batches_done >= FIRST_BAD
        return gradient * float("nan") if bad else gradient


class DriftingLearner(Learner):
    """Dies while the last checkpoint of the second iteration is written, once pairs of the third are there.

    Whoever takes its place learns otherwise, as on devices that do not compute the same twice.
    """

    def __init__(self, **options):
        self._mark = Path(os.environ["AGON_TEST_MARK"])
        if self._mark.exists():
            options["learner"] = replace(options["learner"], lr=options["learner"].lr * 2)
        super().__init__(**options)
        self._seal = checkpoint._seal
        checkpoint._seal = self._seal_or_die

    def _seal_or_die(self, target, *rest):
        if target.name == "iteration-0002" and not self._mark.exists():
            self._mark.touch()
            pairs, end = target.parent.parent / "pairs", time.monotonic() + DEADLINE_S
            while not list(pairs.glob("iteration-0003-*.parquet")) and time.monotonic() < end:
                time.sleep(0.05)
            os._exit(1)
        return self._seal(target, *rest)


def resume(run_dir, *overrides):
    return run(compose(list(overrides), run_dir / "config.yaml"), resume=run_dir)


def finished(run_dir):
    with LedgerReader(run_dir) as ledger:
        return ledger.finished()


def events(run_dir, kind):
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_on_policy(run_dir):
    """Pairs of each iteration come from the version that the one before left, and nothing was lost or repeated."""
    assert audit(run_dir).findings == []
    for before, done in pairwise(finished(run_dir)):
        for path in sorted((run_dir / "pairs").glob(f"iteration-{done.iteration:04d}-*")):
            assert {pair.chosen.policy for pair in read_pairs(path)} == {before.version}


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """Interrupted within the first iteration that goes wrong, after what of it counts; then resumed until it stops."""
    folder = tmp_path_factory.mktemp("exploded")
    acknowledge = Training._acknowledge

    def acknowledge_and_stop(self, record, results):
        acknowledge(self, record, results)
        if record.iteration == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.placement.Learner", ExplodingLearner)
        settings = REFERENCE | {"learner__checkpoint_steps": 1, "pipeline__iterations": 5, "learner__max_skipped": 1}
        with pytest.MonkeyPatch.context() as stopped:
            stopped.setattr(Training, "_acknowledge", acknowledge_and_stop)
            assert do_run(folder, folder / "run", **settings) == 130
        with LedgerReader(folder / "run") as ledger:
            assert [done.iteration for done in ledger.finished()] == [0, 1]
        assert resume(folder / "run") == 1
    return folder / "run"


def test_an_iteration_whose_batches_are_skipped_is_rolled_back_and_nothing_remains_of_it(exploded):
    done = finished(exploded)
    assert [each.metrics.get(ROLLED_BACK) for each in done] == [None, 0, 1, 1, 1]
    assert len({each.version for each in done}) == 2
    assert {each.version for each in done[2:]} == {done[1].version}
    assert {each.checkpoint for each in done[1:]} == {"checkpoints/iteration-0001"}
    assert [path.name for path in (exploded / "checkpoints").iterdir()] == ["iteration-0001"]
    assert_on_policy(exploded)


def test_skipped_batches_are_kept_with_their_pairs_and_told(exploded):
    kept = {path.name for path in (exploded / "skipped").iterdir()}
    bad = (FIRST_BAD, FIRST_BAD + 1)
    names = {
        (number, batch): f"iteration-{number:04d}-batch-{batch:04d}.parquet" for number in (2, 3, 4) for batch in bad
    }
    assert kept == set(names.values())
    with LedgerReader(exploded) as ledger:
        for (number, batch), name in names.items():
            where = (number, batch)
            row = ledger.db.execute("SELECT pairs FROM batches WHERE iteration = ? AND number = ?", where).fetchone()
            assert [pair.id for pair in read_pairs(exploded / "skipped" / name)] == json.loads(row["pairs"])
    told = " ".join(event["text"] for event in events(exploded, "skipped"))
    assert all(name in told for name in names.values())
    assert "gradient norm is nan" in told
    assert [event["iteration"] for event in events(exploded, "rolled_back")] == [2, 3, 4]


def test_three_in_a_row_stop_the_run_with_advice_whichever_process_does_them(exploded):
    summary = json.loads((exploded / "summary.json").read_text())
    assert summary["status"] == "failed"
    for part in ("3 iterations in a row were rolled back", "lower learner.lr", "skipped/"):
        assert part in summary["error"]
    (stopped,) = events(exploded, "stopped")
    assert stopped["failure"] == "data"
    known = len(finished(exploded))
    assert resume(exploded) == 1
    assert len(finished(exploded)) == known, "another process does not walk past it"
    assert_on_policy(exploded)


def test_a_gate_that_rejects_every_policy_leaves_the_first(tmp_path):
    """No policy wins all comparisons of a dozen with the one before, so each raises an alarm."""
    run_dir = tmp_path / "run"
    settings = REFERENCE | {"pipeline__iterations": 2, "promotion.gate": "reject", "promotion.min_win_rate": 1.0}
    assert do_run(tmp_path, run_dir, **settings) == 0
    done = finished(run_dir)
    assert {each.version for each in done} == {done[0].version}
    assert [each.metrics.get(ROLLED_BACK) for each in done] == [None, 1, 1]
    assert [each.checkpoint for each in done] == [None, None, None]
    assert [event["iteration"] for event in events(run_dir, "alarm")] == [1, 2]
    assert "promotion.min_win_rate=1" in events(run_dir, "rolled_back")[0]["text"]
    assert_on_policy(run_dir)
    assert (run_dir / "model" / "model.safetensors").is_file(), "the initial model"


def test_waves_of_an_iteration_that_is_given_up_while_they_are_collected_are_all_accounted_for(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.placement.Learner", ExplodingLearner)
    run_dir = tmp_path / "run"
    settings = REFERENCE | {"pipeline__mode": "semi_online", "pipeline__iterations": 2}
    assert do_run(tmp_path, run_dir, **settings, learner__schedule="constant", learner__max_skipped=0) == 0
    done = finished(run_dir)
    assert [each.metrics.get(ROLLED_BACK) for each in done] == [None, 0, 1]
    assert done[2].metrics["pairs/kept"] > 0
    assert_on_policy(run_dir)


def test_weights_that_were_published_and_lost_are_in_nothing_that_counts(tmp_path, monkeypatch):
    """The learner dies before they are on disk, its queue as it is trained again, and others come of its pairs."""
    mark, ended, feed = tmp_path / "mark", [], Training._feed
    monkeypatch.setattr("launch.placement.Learner", DriftingLearner)
    monkeypatch.setenv("AGON_TEST_MARK", str(mark))

    def feed_without_queue(self, *arguments):
        if mark.exists() and not ended:
            ended.append(self._learning.queue.end())
        return feed(self, *arguments)

    monkeypatch.setattr(Training, "_feed", feed_without_queue)
    run_dir = tmp_path / "run"
    assert do_run(tmp_path, run_dir, **REFERENCE) == 0
    assert [event["actor"] for event in events(run_dir, "replaced")] == ["learner", "learner"]
    assert ended
    done = finished(run_dir)
    for each in done:
        for kind in ("greedy", "sampled"):
            answers = read_rollouts(Store(run_dir).evaluation_path(each.iteration, kind))
            policies = {one.policy for group in answers for one in group.group.completions}
            assert policies == {each.version}, "what was measured is what counts"
    with LedgerReader(run_dir) as ledger:
        results = Accounts(ledger).results(2)
    assert {result.metrics["staleness_max"] for result in results} == {0.0}
    assert done[2].metrics.items() >= update_metrics(results).items()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "step/lr" in line]
    assert steps == list(range(1, len(steps) + 1)), "each step that counts is told once"
    assert done[3].metrics["pairs/evicted"] > 0, "the next pairs were collected while the checkpoint was written"
    assert_on_policy(run_dir)
    monkeypatch.undo()
    undisturbed = tmp_path / "undisturbed"
    assert do_run(tmp_path, undisturbed, **REFERENCE) == 0
    others = finished(undisturbed)
    assert [each.version == other.version for each, other in zip(done, others, strict=True)] == [1, 1, 0, 0]
    with LedgerReader(run_dir) as ledger:
        published = ledger.db.execute("SELECT number, digest FROM publications ORDER BY number").fetchall()
    assert [tuple(row) for row in published] == [(each.version.number, each.version.digest) for each in done]
