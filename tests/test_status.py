"""Status and summary tell what the ledger knows, in whatever state a run was left."""

import json
import subprocess
import sys

import pytest

from launch.status import read_status, status
from orchestrator.errors import DataError, ResourceError
from orchestrator.ledger import Ledger, RunStatus
from orchestrator.runlock import RunLock, holder
from orchestrator.summary import build_summary, versions, write_summary
from tests.records import V0, V1


def evaluated(greedy, sampled):
    rates = (("greedy", greedy), ("sampled", sampled))
    parts = ((part, kind, value + shift) for kind, value in rates for part, shift in (("low", -0.1), ("high", 0.1)))
    found = {f"eval/{kind}_{part}": value for part, kind, value in parts}
    return (
        found | {f"eval/{kind}_value": value for kind, value in rates} | {f"eval/{kind}_n": 64.0 for kind, _ in rates}
    )


@pytest.fixture
def ledger(tmp_path):
    """Three of four iterations finished, the third without an evaluation, the fourth in its training."""
    with Ledger(tmp_path) as made:
        made.begin(recipe="iterative_dpo", seed=3, config_hash="abc", iterations=4)
        made.finish_iteration(0, version=V0, cursor=0, checkpoint=None, metrics=evaluated(0.5, 0.25))
        for iteration, accuracy in ((1, evaluated(0.625, 0.375)), (2, evaluated(0.75, 0.5)), (3, {})):
            made.start_phase(iteration, "collect")
            made.finish_phase(iteration, "collect", seconds=1.0, tokens=1000)
            metrics = {"pairs/kept": 30.0} | accuracy
            checkpoint = f"checkpoints/iteration-{iteration:04d}"
            made.finish_iteration(iteration, version=V1, cursor=8, checkpoint=checkpoint, metrics=metrics)
        made.start_phase(4, "train")
        yield made


def test_summary(ledger, tmp_path):
    ledger.end(RunStatus.FAILED, "learner: the loss is not finite")
    path = write_summary(tmp_path, build_summary(ledger, seconds={"warm_start": 12.0}))
    found = json.loads(path.read_text())
    assert (found["recipe"], found["seed"], found["status"]) == ("iterative_dpo", 3, "failed")
    assert found["error"] == "learner: the loss is not finite"
    assert (found["iterations"], found["planned"], found["pairs"]) == (3, 4, 90)
    assert found["accuracy"]["start"]["sampled"] == {"value": 0.25, "low": 0.15, "high": 0.35, "n": 64}
    assert found["accuracy"]["end"]["greedy"]["value"] == 0.75
    assert found["tokens"] == {"collect": 3000}
    assert found["seconds"]["warm_start"] == 12.0
    assert found["seconds"].keys() == {"warm_start", "collect", "train"}
    assert found["checkpoint"] == "checkpoints/iteration-0003"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_summary_of_a_run_that_came_to_nothing(tmp_path):
    with Ledger(tmp_path) as ledger:
        nothing = build_summary(ledger)
    assert nothing["status"] is None
    assert nothing["accuracy"] == {when: {"greedy": None, "sampled": None} for when in ("start", "end")}
    assert nothing["iterations"] == 0


def test_versions_load_nothing():
    code = "import sys; from orchestrator.summary import versions as v; print('torch' in sys.modules, v()['torch'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["False", versions()["torch"]]


def test_a_run_that_goes_on(ledger, tmp_path):
    ledger.start_phase(5, "collect")  # ahead
    with RunLock(tmp_path):
        found = read_status(tmp_path)
        assert found["state"] == "running"
        assert (found["phase"]["iteration"], found["phase"]["name"]) == (4, "train")
        shown = status(tmp_path)
    for part in (
        "iteration 4, train",
        "iterative_dpo, seed 3",
        "3 of 4",
        "greedy 0.500 [0.400, 0.600, n=64]",
        "sampled 0.500 [0.400, 0.600, n=64]",
        "collect 3,000",
        "checkpoints/iteration-0003",
    ):
        assert part in shown


def test_a_run_whose_process_was_killed_is_interrupted(ledger, tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.runlock import RunLock\n"
        "RunLock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert holder(tmp_path).alive is False
    assert read_status(tmp_path)["state"] == "interrupted"
    with RunLock(tmp_path):
        assert read_status(tmp_path)["state"] == "running"
    assert holder(tmp_path) is None


def test_a_run_on_another_machine_cannot_be_judged(ledger, tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "elsewhere", "process_started": "x:1"}')
    found = read_status(tmp_path)
    assert (found["state"], found["note"]) == ("unknown", "process 1 on elsewhere cannot be looked at from here")


def test_a_failed_run_says_why_and_json_is_strict(ledger, tmp_path):
    ledger.end(RunStatus.FAILED, "learner: the loss is not finite")
    assert "learner: the loss is not finite" in status(tmp_path)
    assert json.loads(status(tmp_path, as_json=True))["state"] == "failed"


def test_a_folder_is_used_by_one_process(tmp_path):
    with RunLock(tmp_path):
        code = (
            "import sys; from pathlib import Path; from orchestrator.runlock import RunLock\n"
            "with RunLock(Path(sys.argv[1])): print('taken')"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert other.returncode != 0
        assert "is in use by process " in other.stderr
        with pytest.raises(ResourceError):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_half_written_runs(tmp_path):
    with pytest.raises(DataError, match="no such run folder"):
        status(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no run \(there is no ledger\.sqlite\)"):
        status(tmp_path)
    (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(DataError, match="not a readable ledger"):
        status(tmp_path)
    with RunLock(tmp_path):
        assert "nothing is recorded yet" in status(tmp_path)
    write_summary(tmp_path, {"status": "failed", "recipe": "r", "seed": 0, "iterations": 1, "planned": 2, "error": "e"})
    shown = status(tmp_path)
    assert "failed (from summary.json alone" in shown
    assert "1 of 2" in shown


def test_seconds_outside_iterations_come_from_the_summary(ledger, tmp_path):
    write_summary(tmp_path, build_summary(ledger, seconds={"warm_start": 12.0, "start": 61.0}))
    assert "warm_start 12.0 s" in status(tmp_path)
    assert "start 1:01" in status(tmp_path)
    seconds = read_status(tmp_path)["seconds"]
    assert seconds == build_summary(ledger, seconds={"warm_start": 12.0, "start": 61.0})["seconds"]
    (tmp_path / "summary.json").write_text("{")
    assert "warm_start" not in read_status(tmp_path)["seconds"]
