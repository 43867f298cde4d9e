"""Runs that collect ahead: how old the pairs are, what corrects for it, and that nothing else is another."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from conf.compose import compose
from launch.audit import audit
from launch.run import run
from orchestrator.ledger import LedgerReader
from orchestrator.store import read_pairs
from orchestrator.training import Training
from tests.chaos.cells import products
from tests.runs import REFERENCE, do_run, overrides

SETTINGS = REFERENCE | {"pipeline__mode": "async", "tracking": "disabled"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


def finished(run_dir):
    with LedgerReader(run_dir) as ledger:
        return ledger.finished()


def pairs_of(run_dir, iteration):
    return [
        pair for path in sorted((run_dir / "pairs").glob(f"iteration-{iteration:04d}-*")) for pair in read_pairs(path)
    ]


def test_without_staleness_it_is_sync_bit_for_bit(reference_run, tmp_path):
    run_dir = tmp_path / "async"
    assert do_run(reference_run.parent / "inputs", run_dir, **SETTINGS | {"pipeline__max_staleness": 0}) == 0
    left, right = products(reference_run), products(run_dir)
    for name, content in left.items():
        if name.endswith(".safetensors"):
            assert right[name] == content
    for iteration in (1, 2, 3):
        assert pairs_of(reference_run, iteration) == pairs_of(run_dir, iteration) != []


@pytest.mark.parametrize("bound", [1, 2])
def test_pairs_are_at_most_as_old_as_the_bound_says_and_weigh_what_they_should(folder, bound):
    run_dir = folder / f"bound-{bound}"
    settings = SETTINGS | {"pipeline__max_staleness": bound, "pipeline__iterations": 5}
    assert do_run(folder, run_dir, **settings) == 0
    assert audit(run_dir).findings == []
    done = finished(run_dir)
    numbers = {each.version: number for number, each in enumerate(done)}
    oldest = []
    for iteration in range(1, 6):
        pairs = pairs_of(run_dir, iteration)
        assert len(pairs) > 0
        by = {
            policy
            for pair in pairs
            for side in (pair.chosen, pair.rejected)
            for policy in (side.policy, *dict(side.switches).values())
        }
        ages = [iteration - 1 - numbers[policy] for policy in by]
        assert min(ages) >= 0
        oldest.append(max(ages))
        metrics = done[iteration].metrics
        assert metrics["train/staleness_max"] == max(ages)
        assert (metrics["train/importance"] == 1) == (max(ages) == 0)
        assert metrics["pairs/evicted"] == 0
    assert oldest[0] == 0
    assert max(oldest) <= bound
    assert 1 in oldest, "something was collected ahead"


def test_a_signal_ends_it_at_once_and_resuming_loses_nothing(folder, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "run"]
    settings = SETTINGS | {"pipeline__iterations": 6}
    process = subprocess.Popen([*command, *overrides(folder, run_dir, **settings)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (run_dir / "ledger.sqlite").exists() or len(finished(run_dir)) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 130
    assert psutil.wait_procs(children, 20)[1] == []
    assert time.monotonic() - started < 20
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert subprocess.run([*command, "--resume", str(run_dir)], timeout=300, check=False).returncode == 0
    assert len(finished(run_dir)) == 7
    assert audit(run_dir).findings == []


def test_semi_online_ends_with_the_same_bytes_where_its_training_was_broken_off(folder, tmp_path, monkeypatch):
    """Behind more batches than the first waves give. (`test_chaos.py` breaks it off before.)"""
    chosen = {"pipeline__mode": "semi_online", "learner__schedule": "constant", "learner__checkpoint_steps": 1}
    settings = REFERENCE | chosen | {"tracking": "disabled", "pipeline__iterations": 2}
    assert do_run(folder, tmp_path / "whole", **settings) == 0
    with LedgerReader(tmp_path / "whole") as ledger:
        of_first = ledger.db.execute("SELECT COUNT(*) FROM batches WHERE iteration = 1").fetchone()[0]
    run_dir, acknowledge = tmp_path / "broken", Training._acknowledge

    def acknowledge_and_stop(self, record, results):
        acknowledge(self, record, results)
        if (record.iteration, record.batches) == (1, of_first):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_acknowledge", acknowledge_and_stop)
        assert do_run(folder, run_dir, **settings) == 130
    assert run(compose([], run_dir / "config.yaml"), resume=run_dir) == 0
    assert audit(run_dir).findings == []
    assert products(run_dir) == products(tmp_path / "whole")
    drawn = [
        json.loads((each / "summary.json").read_text())["tokens"]["collect"] for each in (run_dir, tmp_path / "whole")
    ]
    assert drawn[0] == drawn[1]
