"""Copies of a finished run as kills would have left them, and damage to their files."""

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from conf.compose import compose
from launch.run import run
from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.events import ignore
from orchestrator.ledger import Ledger
from orchestrator.store import Store, read_rollouts

LAST = 3
"""The iteration that is cut back."""


def sql(run_dir, *statements):
    with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def killed(finished, target):
    """A copy whose process was killed when the last iteration counted and the run's end did not."""
    run_dir = shutil.copytree(finished, target)
    shutil.rmtree(run_dir / "model")
    sql(run_dir, "UPDATE run SET status = 'running', ended = NULL")
    return run_dir


def collected(finished, target):
    """A copy whose process was killed when the last iteration's pairs were made and nothing was trained on."""
    run_dir = killed(finished, target)
    here = f"WHERE iteration = {LAST}"
    sql(
        run_dir,
        f"DELETE FROM iterations {here}",
        f"DELETE FROM phases {here} AND phase <> 'collect'",
        f"DELETE FROM batches {here}",
        f"DELETE FROM checkpoints {here}",
        f"DELETE FROM publications {here}",
        f"DELETE FROM files {here} AND path LIKE 'evaluations/%'",
    )
    shutil.rmtree(run_dir / "checkpoints" / f"iteration-{LAST:04d}")
    for path in (run_dir / "evaluations").glob(f"iteration-{LAST:04d}-*"):
        path.unlink()
    return run_dir


def only_sampled(run_dir, wave):
    """Takes a wave of the last iteration back to where its completions wait for their scores; returns their file."""
    store = Store(run_dir)
    rollouts, pairs = (store.path(kind, LAST, wave) for kind in ("rollouts", "pairs"))
    path = store.write_samples(LAST, wave, [scored.group for scored in read_rollouts(rollouts)])
    with Ledger(run_dir) as ledger:
        archive = Archive(run_dir, Accounts(ledger), ignore)
        archive.drop(rollouts)
        archive.drop(pairs)
        archive.seal(LAST, [path])
    here = f"WHERE iteration = {LAST} AND wave = {wave}"
    sql(
        run_dir,
        f"DELETE FROM groups {here}",
        f"DELETE FROM pairs {here}",
        f"UPDATE waves SET scored = NULL, outcome = NULL {here}",
    )
    return path


def tear(path):
    """A file whose end did not reach the disk."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


DIE_WITHIN = """
import os, signal, sys
from pathlib import Path
from orchestrator.accounts import Accounts
from orchestrator.ledger import Ledger
from tests.records import V0
ledger = Ledger(Path(sys.argv[1]))
ledger.start_phase(97, "collect")
with ledger.transaction():
    ledger.unfinish_iterations(after=0)
    Accounts(ledger).rewind(None)
    ledger.db.execute("PRAGMA cache_spill = 1")
    ledger.db.executemany("INSERT INTO quarantine VALUES (?, 1, ?, 0)", [(str(n), "x" * 4000) for n in range(2000)])
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""It forgets everything, and fills more pages than the cache holds, so that some of it is in the log; then it is
killed."""


def die_within_a_transaction(run_dir):
    root = Path(__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", DIE_WITHIN, str(run_dir)], cwd=root, timeout=60)
    assert process.returncode == -9


def resume(run_dir):
    return run(compose([], run_dir / "config.yaml"), resume=run_dir)


def events(run_dir, *kinds):
    """The texts of some kinds of events, in their order."""
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["kind"] in kinds]


def outcome(run_dir):
    """What the same seed must give: pairs and weights, byte for byte."""
    files = [*sorted((run_dir / "pairs").iterdir()), run_dir / "model" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}
