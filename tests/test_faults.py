"""What disks, kills and clocks do to a real run: it is told, and the run ends as if it had not happened."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.audit import audit
from orchestrator.ledger import Ledger
from orchestrator.training import Training
from tests import faults
from tests.runs import REFERENCE, do_run

ROOT = Path(__file__).parent.parent


def assert_as_if_nothing_had_happened(run_dir, reference):
    assert faults.outcome(run_dir) == faults.outcome(reference)
    assert audit(run_dir).findings == []
    assert list((run_dir / "samples").iterdir()) == []
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("finished", faults.LAST)


def test_torn_records_and_a_transaction_that_was_cut(reference_run, tmp_path):
    """Of the last iteration's waves one has torn pairs, one torn rollouts, one torn samples."""
    run_dir = faults.collected(reference_run, tmp_path / "run")
    torn = [
        run_dir / "pairs" / "iteration-0003-wave-0000.parquet",
        run_dir / "rollouts" / "iteration-0003-wave-0001.parquet",
        faults.only_sampled(run_dir, wave=2),
    ]
    for path in torn:
        faults.tear(path)
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "kind": "lo')
    faults.die_within_a_transaction(run_dir)
    assert faults.resume(run_dir) == 0
    told = faults.events(run_dir, "damaged")
    assert sorted(text.partition(":")[0] for text in told) == sorted(map(str, torn))
    assert_as_if_nothing_had_happened(run_dir, reference_run)


@pytest.mark.parametrize("lost", [(3,), (1, 2, 3)], ids=["the newest", "all"])
def test_damaged_checkpoints_are_gone_back_behind(reference_run, tmp_path, lost):
    """To the newest that is whole, or to the initial model; the pairs that were made since are trained on again."""
    run_dir = faults.killed(reference_run, tmp_path / "run")
    folders = [run_dir / "checkpoints" / f"iteration-{number:04d}" for number in lost]
    for folder in folders:
        faults.tear(next(folder.glob("*.safetensors")))
    rollouts = {path: path.stat().st_mtime_ns for path in (run_dir / "rollouts").iterdir()}
    assert faults.resume(run_dir) == 0
    told = faults.events(run_dir, "damaged")
    assert len(told) == len(lost)
    for folder, text in zip(reversed(folders), told, strict=True):
        assert str(folder) in text
        assert "is truncated" in text
    assert ("the initial model" if 1 in lost else "checkpoints/iteration-0002") in told[-1]
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "rollouts").iterdir()} == rollouts, "drawn once"
    assert_as_if_nothing_had_happened(run_dir, reference_run)


def test_records_that_are_damaged_while_they_are_trained_on(reference_run, tmp_path, monkeypatch):
    """Learner and generators go back to the policy that drew them."""
    run_dir = faults.collected(reference_run, tmp_path / "run")
    acknowledge = Training._acknowledge

    def acknowledge_and_stop(self, record, results):
        acknowledge(self, record, results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_acknowledge", acknowledge_and_stop)
        assert faults.resume(run_dir) == 130
    assert [path.name for path in (run_dir / "checkpoints").glob("iteration-0003*")] == ["iteration-0003-batch-000002"]
    for kind in ("pairs", "rollouts"):
        faults.tear(run_dir / kind / "iteration-0003-wave-0001.parquet")
    assert faults.resume(run_dir) == 0
    assert len(faults.events(run_dir, "damaged")) >= 1
    assert_as_if_nothing_had_happened(run_dir, reference_run)


def test_a_clock_that_jumps(reference_run, tmp_path, monkeypatch):
    """Back an hour, on a day, and so on, at each look at it."""
    looks, clock = [], time.time

    def jumping():
        looks.append(None)
        return clock() + (-3600, 86400, 0)[len(looks) % 3]

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", jumping)
        start = time.monotonic()
        assert do_run(reference_run.parent / "inputs", run_dir, **REFERENCE) == 0
        took = time.monotonic() - start
    assert len(looks) > 100
    seconds = json.loads((run_dir / "summary.json").read_text())["seconds"]
    assert all(0 <= value <= took for value in seconds.values()), seconds
    assert_as_if_nothing_had_happened(run_dir, reference_run)


# Disks, in a mount namespace of the test's own


def in_namespace(script, *arguments):
    command = ["unshare", "-Urm", "sh", "-euc", script, "sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def _namespaces(tmp_path_factory):
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare command")
    tried = in_namespace('mount -t tmpfs -o size=1m none "$1"', tmp_path_factory.mktemp("mount"))
    if tried.returncode:
        pytest.skip(f"this kernel lets nobody mount in a namespace of their own: {tried.stderr.strip()}")


@pytest.mark.usefixtures("_namespaces")
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_starts(reference_run, tmp_path):
    run_dir = faults.killed(reference_run, tmp_path / "run")
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; exec "$2" -m launch run --resume "$1"'
    refused = in_namespace(script, run_dir, sys.executable)
    assert refused.returncode == 2, refused.stderr
    assert f"{run_dir} is not writable for you" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.usefixtures("_namespaces")
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(reference_run, tmp_path):
    """Full at the last row of the ledger, then within a checkpoint."""
    run_dir, mount = faults.collected(reference_run, tmp_path / "run"), tmp_path / "mount"
    mount.mkdir()
    script = 'mount -t tmpfs -o size=48m none "$2"; exec "$3" -m tests.full_disk "$1" "$2"'
    done = in_namespace(script, run_dir, mount, sys.executable)
    assert done.returncode == 0, done.stderr
    ledger, checkpoint, room = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (ledger["code"], checkpoint["code"], room["code"]) == (1, 1, 0)
    for full, path in ((ledger, mount / "run" / "ledger.sqlite"), (checkpoint, mount / "run" / "checkpoints")):
        assert f"error: {path}" in full["said"]
        assert "make room on that disk and resume" in full["said"]
        assert "Traceback" not in full["said"]
        assert full["findings"] == []
    assert_as_if_nothing_had_happened(run_dir, reference_run)


# The ledger alone


@pytest.fixture(scope="module")
def cut_ledger(tmp_path_factory):
    """Its last transaction was not committed, and all of it is still in the log."""
    folder = tmp_path_factory.mktemp("ledger")
    with Ledger(folder) as ledger:
        for number in range(40):
            ledger.start_phase(number, "collect")
    faults.die_within_a_transaction(folder)
    return folder


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.5, 0.1, 0.0])
def test_a_log_that_was_cut_loses_its_end_and_nothing_before_it(cut_ledger, tmp_path, kept):
    """Phase 97 was committed into the log, the rest of it never was."""
    for path in cut_ledger.iterdir():
        shutil.copy(path, tmp_path)
    log = tmp_path / "ledger.sqlite-wal"
    content = log.read_bytes()
    assert len(content) > 1 << 20, "what was not committed is in the log"
    log.write_bytes(content[: int(len(content) * kept)])
    with Ledger(tmp_path) as ledger:
        assert ledger.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert [phase.iteration for phase in ledger.phases()] == [*range(40), *([97] if kept else [])]
        assert ledger.db.execute("SELECT count(*) FROM quarantine").fetchone()[0] == 0
        ledger.start_phase(98, "collect")
