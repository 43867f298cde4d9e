"""What the ledger says is finished is on disk, and can be read by others meanwhile."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from orchestrator.errors import ConfigError, DataError
from orchestrator.ledger import Ledger, LedgerReader, RunStatus
from tests.records import V0, V1

RUN = {"recipe": "iterative_dpo", "seed": 3, "config_hash": "abc", "iterations": 8}


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path) as made:
        made.begin(**RUN)
        yield made


def test_resume_starts_behind_the_last_finished_iteration(ledger, tmp_path):
    assert ledger.resume_point() is None
    ledger.finish_iteration(0, version=V0, cursor=0, checkpoint=None, metrics={"eval/greedy_value": 0.5})
    ledger.finish_iteration(1, version=V1, cursor=128, checkpoint="checkpoints/iteration-0001", metrics={})
    ledger.start_phase(2, "collect")
    with Ledger(tmp_path) as again:
        again.begin(**RUN)
        last = again.resume_point()
        assert (last.iteration, last.version, last.cursor) == (1, V1, 128)
        assert last.checkpoint == "checkpoints/iteration-0001"
        assert [done.version for done in again.finished()] == [V0, V1]
        assert again.finished()[0].metrics == {"eval/greedy_value": 0.5}


def test_an_iteration_is_promoted_once(ledger):
    ledger.finish_iteration(1, version=V0, cursor=1, checkpoint=None, metrics={})
    with pytest.raises(sqlite3.IntegrityError):
        ledger.finish_iteration(1, version=V1, cursor=2, checkpoint=None, metrics={})
    assert ledger.resume_point().version == V0


def test_phases(ledger):
    ledger.start_phase(1, "collect")
    ledger.finish_phase(1, "collect", seconds=2.5, tokens=40, metrics={"x": 1.5})
    ledger.start_phase(1, "train")
    collect, train = ledger.phases()
    assert (collect.phase, collect.tokens, collect.seconds, collect.metrics) == ("collect", 40, 2.5, {"x": 1.5})
    assert train.seconds is None
    assert ledger.finished_phase(1, "collect") == collect
    assert ledger.finished_phase(1, "train") is None
    ledger.start_phase(1, "collect")
    assert [(p.phase, p.tokens, p.seconds) for p in ledger.phases()] == [("train", 0, None), ("collect", 0, None)]


def test_another_process_reads_while_the_run_goes_on(ledger, tmp_path):
    ledger.start_phase(1, "collect")
    code = (
        "import sys; from pathlib import Path; from orchestrator.ledger import LedgerReader\n"
        "with LedgerReader(Path(sys.argv[1])) as ledger: print(ledger.run().status, ledger.phases()[0].phase)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.split() == ["running", "collect"]


def test_readers_cannot_write(ledger, tmp_path):
    with LedgerReader(tmp_path) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.db.execute("DELETE FROM run")


def test_a_ledger_at_rest_is_read_where_nothing_may_be_written(ledger, tmp_path, monkeypatch):
    ledger.close()
    connect = sqlite3.connect

    def in_a_folder_that_forbids_it(address, **options):
        if "immutable=1" not in address:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(address, **options)

    monkeypatch.setattr(sqlite3, "connect", in_a_folder_that_forbids_it)
    with LedgerReader(tmp_path) as reader:
        assert reader.finished() == []
    (tmp_path / "ledger.sqlite-wal").write_bytes(b"what a writer has not put in its place yet")
    with pytest.raises(DataError, match="attempt to write a readonly database"):
        LedgerReader(tmp_path)


def test_it_is_there_when_all_of_it_is(tmp_path, monkeypatch):
    """Else a reader that comes as the run begins would find a ledger without tables."""
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.ledger_schema._TABLES", "CREATE TABLE schema (version INTEGER); CREATE TABLE ?;")
        with pytest.raises(DataError, match="could not be made"):
            Ledger(tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()
    Ledger(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]
    with LedgerReader(tmp_path) as reader:
        assert reader.run() is None


def test_what_was_finished_survives_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.ledger import Ledger\n"
        "from tests.records import V0\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.begin(recipe='r', seed=0, config_hash='h', iterations=2)\n"
        "ledger.finish_iteration(1, version=V0, cursor=5, checkpoint=None, metrics={})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with Ledger(tmp_path) as ledger:
        assert ledger.run().status is RunStatus.RUNNING
        assert ledger.resume_point().cursor == 5


def test_how_it_ended_is_forgotten_when_it_goes_on(ledger):
    ledger.end(RunStatus.FAILED, "generator.deadline_s ran out")
    assert (ledger.run().status, ledger.run().error) == (RunStatus.FAILED, "generator.deadline_s ran out")
    started = ledger.run().started
    ledger.begin(**RUN)
    run = ledger.run()
    assert (run.status, run.error, run.ended, run.started) == (RunStatus.RUNNING, None, None, started)


def test_another_configuration_is_refused(ledger):
    with pytest.raises(ConfigError, match=r"hash abc; now xyz.*choose another run_dir"):
        ledger.begin(**RUN | {"config_hash": "xyz"})


def test_figures_that_are_not_finite_are_left_out(ledger):
    figures = {"kl": math.inf, "loss": math.nan, "pairs/kept": 2.0}
    ledger.start_phase(1, "train")
    ledger.finish_phase(1, "train", seconds=1.0, metrics=figures)
    for number in (0, 1):
        ledger.finish_iteration(number, version=V0, cursor=5, checkpoint=None, metrics=figures)
    assert ledger.total("pairs/kept") == 4
    assert ledger.total("kl") == 0
    assert ledger.resume_point().metrics == ledger.finished_phase(1, "train").metrics == {"pairs/kept": 2.0}


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no run \(there is no ledger\.sqlite\)"):
        LedgerReader(tmp_path)
    with pytest.raises(DataError, match="no such run folder"):
        LedgerReader(tmp_path / "absent")
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="not a readable ledger"):
        Ledger(tmp_path)


def test_another_schema_is_refused(tmp_path):
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("UPDATE schema SET version = 99")
    with pytest.raises(DataError, match="schema version 99, expected 3"):
        Ledger(tmp_path)


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_at_the_end_of_a_transaction_leaves_none_open(tmp_path, monkeypatch, before):
    """It comes just before it is committed, or just after; what is noted next must not join it."""
    with Ledger(tmp_path) as ledger:
        execute = ledger.db.execute

        def interrupted(statement, *values):
            if statement != "COMMIT":
                return execute(statement, *values)
            if not before:
                execute(statement)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ledger.db, "execute", interrupted)
            with pytest.raises(KeyboardInterrupt), ledger.transaction():
                ledger.start_phase(1, "train")
        ledger.start_phase(2, "collect")
    with LedgerReader(tmp_path) as reader:
        assert [phase.iteration for phase in reader.phases()] == ([2] if before else [1, 2])


def test_another_thread_waits_until_a_transaction_is_over(tmp_path):
    """What it writes is not undone with the transaction, and not seen in it."""
    done = threading.Event()

    def write():
        ledger.start_phase(2, "collect")
        done.set()

    with Ledger(tmp_path) as ledger:
        with suppress(KeyError), ledger.transaction():
            ledger.start_phase(1, "train")
            thread = threading.Thread(target=write)
            thread.start()
            assert not done.wait(0.2)
            assert [phase.iteration for phase in ledger.phases()] == [1]
            raise KeyError
        assert done.wait(10)
        thread.join()
        assert [phase.iteration for phase in ledger.phases()] == [2]
