"""The accounts of pairs and batches: nothing twice, nothing half, and what is forgotten is forgotten whole."""

import math
import sqlite3
from dataclasses import replace

import pytest

from orchestrator.accounts import ROLLED_BACK, Accounts, CheckpointRecord, FileRecord
from orchestrator.ledger import Ledger
from orchestrator.types import Prompt, UpdateResult
from tests.ledgers import broken_off
from tests.records import V0, V1, completion, pair, scored


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path) as made:
        yield made


@pytest.fixture
def accounts(ledger):
    return Accounts(ledger)


def named(*names):
    return [replace(pair(completion(1), completion(2)), id=name) for name in names]


def group(name):
    return scored(1.0, 0.0, prompt=Prompt(id=name, text=name, token_ids=(1,)))


def checkpoint(iteration, batches, step):
    path = f"checkpoints/iteration-{iteration:04d}-batch-{batches:06d}"
    return CheckpointRecord(path=path, iteration=iteration, batches=batches, step=step, digest="d")


def result(batch, step, *pairs, skipped="", notes=(), **metrics):
    return UpdateResult(step=step, batch=batch, pair_ids=pairs, tokens=7, metrics=metrics, skipped=skipped, notes=notes)


def rows(ledger, table, columns):
    return [tuple(row) for row in ledger.db.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2")]


def test_a_wave_that_is_issued_again_forgets_its_groups_and_pairs_and_no_other(accounts, ledger):
    for iteration, wave, name in ((1, 0, "a"), (1, 1, "b"), (2, 0, "a")):
        accounts.issue_wave(iteration, wave, [name])
        accounts.wave_sampled(iteration, wave)
        accounts.wave_scored(iteration, wave, [group(name)], {"wave": wave})
        accounts.accept_pairs(iteration, wave, named(f"{iteration}/{name}"))
    accounts.issue_wave(1, 0, ["a"])
    assert rows(ledger, "groups", "iteration, prompt") == [(1, "b"), (2, "a")]
    assert rows(ledger, "pairs", "id, iteration") == [("1/b", 1), ("2/a", 2)]
    assert accounts.wave_outcome(1, 0) is None
    assert accounts.wave_outcome(1, 1) == {"wave": 1}
    assert rows(ledger, "waves", "iteration, wave, sampled IS NULL")[0] == (1, 0, 1)
    accounts.wave_scored(1, 0, [group("a")], {})
    accounts.accept_pairs(1, 0, named("1/a"))


def test_nobody_is_judged_twice_in_an_iteration(accounts):
    accounts.wave_scored(1, 0, [group("a")], {})
    accounts.wave_scored(2, 0, [group("a")], {})
    with pytest.raises(sqlite3.IntegrityError, match=r"groups\.iteration, groups\.prompt"):
        accounts.wave_scored(1, 1, [group("b"), group("a")], {})


def test_no_pair_is_accepted_twice_in_a_run(accounts):
    accounts.accept_pairs(1, 0, named("x"))
    with pytest.raises(sqlite3.IntegrityError, match=r"pairs\.id"):
        accounts.accept_pairs(2, 0, named("y", "x"))


def planned(accounts, iteration, *names):
    accounts.plan_batches(iteration, [named(name) for name in names])


def test_a_batch_counts_with_the_checkpoint_that_contains_it_or_not_at_all(accounts, ledger):
    planned(accounts, 1, "x", "y")
    with broken_off(ledger):
        accounts.acknowledge(checkpoint(1, 1, 1), [result(0, 1, "x")])
    assert (accounts.latest_checkpoint(), accounts.results(1)) == (None, [])
    with ledger.transaction():
        accounts.acknowledge(checkpoint(1, 1, 1), [result(0, 1, "x")])
    assert accounts.latest_checkpoint() == checkpoint(1, 1, 1)
    assert [done.batch for done in accounts.results(1)] == [0]


def test_results_come_back_as_they_were(accounts):
    planned(accounts, 1, "x", "y")
    whole = result(0, 5, "x", loss=1 / 3, notes=("a micro-batch was halved", "twice"))
    bad = result(1, 6, "y", skipped="its loss is nan", loss=math.nan, grad_norm=math.inf)
    accounts.acknowledge(checkpoint(1, 2, 6), [whole, bad])
    first, second = accounts.results(1)
    assert first == whole
    assert math.isnan(second.metrics["loss"])
    assert replace(second, metrics={}) == replace(bad, metrics={})
    assert second.metrics["grad_norm"] == math.inf


def test_planning_again_keeps_what_is_known(accounts):
    planned(accounts, 1, "x", "y")
    accounts.acknowledge(checkpoint(1, 1, 1), [result(0, 1, "x")])
    planned(accounts, 1, "x", "y")
    assert accounts.results(1) == [result(0, 1, "x")]


def trained(accounts):
    """Two batches of each of iterations 1 and 2, one of iteration 3; a checkpoint after each but the last of 2."""
    for iteration in (1, 2, 3):
        planned(accounts, iteration, f"{iteration}x", f"{iteration}y")
    for iteration, batch, step in ((1, 1, 2), (2, 0, 3), (3, 0, 5)):
        first = [result(0, 1, "1x")] if iteration == 1 else []
        done = [*first, result(batch, step, f"{iteration}{'xy'[batch]}")]
        accounts.acknowledge(checkpoint(iteration, batch + 1, step), done)


@pytest.mark.parametrize(
    ("to", "left"), [((1, 2, 2), [0, 1]), ((2, 1, 3), [0, 1, 0]), ((3, 1, 5), [0, 1, 0, 0]), (None, [])]
)
def test_rewinding_leaves_what_the_checkpoint_contains(accounts, ledger, to, left):
    trained(accounts)
    accounts.rewind(to and checkpoint(*to))
    assert [done.batch for iteration in (1, 2, 3) for done in accounts.results(iteration)] == left
    assert accounts.latest_checkpoint() == (to and checkpoint(*to))
    undone = "SELECT count(*) FROM batches WHERE acknowledged IS NULL AND step IS NULL AND outcome IS NULL"
    assert ledger.db.execute(undone).fetchone()[0] == 6 - len(left)


def test_a_rolled_back_iteration_is_in_no_checkpoint(accounts, ledger):
    trained(accounts)
    accounts.give_up(2)
    outcomes = rows(ledger, "batches", "iteration, number, outcome")
    assert [row for row in outcomes if row[2] == ROLLED_BACK] == [(2, 0, ROLLED_BACK), (2, 1, ROLLED_BACK)]
    assert accounts.checkpoints() == [checkpoint(1, 2, 2), checkpoint(3, 1, 5)]


def test_quarantine_is_for_good_and_known_by_iteration(accounts):
    accounts.quarantine({"a": "kills"}, 1)
    accounts.quarantine({"a": "kills", "b": "kills too"}, 3)
    accounts.quarantine({"a": "again"}, 4)
    assert accounts.quarantined() == {"a": "kills", "b": "kills too"}
    assert accounts.quarantined(before=3) == {"a": "kills"}
    assert accounts.quarantined(before=1) == {}


def test_files_and_publications_are_the_latest_of_their_name(ledger, accounts):
    for size in (1, 2):
        accounts.add_file(FileRecord(path="pairs/x", iteration=1, bytes=size, digest="d"))
    assert accounts.file("pairs/x").bytes == 2
    accounts.drop_file("pairs/x")
    assert accounts.file("pairs/x") is None
    accounts.publish(V0, 0)
    accounts.publish(V1, 1)
    accounts.publish(replace(V1, digest="f" * 16), 2)
    published = ledger.db.execute("SELECT number, digest FROM publications ORDER BY number")
    assert [tuple(row) for row in published] == [(0, V0.digest), (1, "f" * 16)]
