"""`agon audit` finds what was done to a run behind its back, and names its kind; an untouched run has nothing."""

import json
import shutil
import sqlite3
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from launch.audit import audit
from orchestrator.errors import DataError

KINDS = ("damaged", "lost", "repeated", "rejudged", "stale")
PAIRS, ROLLOUTS = (f"{kind}/iteration-0002-wave-0000.parquet" for kind in ("pairs", "rollouts"))


@pytest.fixture
def run(reference_run, tmp_path):
    return shutil.copytree(reference_run, tmp_path / "run")


def sql(run, *statement):
    with closing(sqlite3.connect(run / "ledger.sqlite")) as db:
        found = db.execute(*statement).fetchall()
        db.commit()
        return found


def rewrite(run, name, change):
    """Changes the rows of a file that counts, and seals it: a writer that is wrong, not a disk."""
    table = pq.read_table(run / name)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), run / name)
    content = (run / name).read_bytes()
    values = (len(content), xxhash.xxh3_64_hexdigest(content), name)
    sql(run, "UPDATE files SET bytes = ?, digest = ? WHERE path = ?", values)


def cut_a_pair_file(run):
    (run / PAIRS).write_bytes((run / PAIRS).read_bytes()[:-1])


def remove_an_evaluation(run):
    (run / "evaluations" / "iteration-0001-greedy.parquet").unlink()


def drop_a_pair_of_a_file(run):
    rewrite(run, PAIRS, lambda rows: rows[1:])


def drop_a_group_of_a_file(run):
    rewrite(run, ROLLOUTS, lambda rows: [row for row in rows if row["group"]])


def forget_a_group(run):
    sql(run, "DELETE FROM groups WHERE iteration = 1 AND prompt = (SELECT min(prompt) FROM groups WHERE iteration = 1)")


def write_a_pair_twice(run):
    rewrite(run, PAIRS, lambda rows: [*rows, rows[0]])


def train_a_pair_twice(run):
    """In place of nothing: batch 0 has all its own pairs and one of batch 1."""
    (_, first), (_, second) = batches(run, 2)[:2]
    change_batch(run, 2, 0, [*first, second[0]])


def train_a_pair_never(run):
    change_batch(run, 2, 0, batches(run, 2)[0][1][1:])


def train_a_pair_of_another_iteration(run):
    change_batch(run, 2, 0, [*batches(run, 2)[0][1], batches(run, 1)[0][1][0]])


def batches(run, iteration):
    rows = sql(run, "SELECT number, pairs FROM batches WHERE iteration = ? ORDER BY number", (iteration,))
    return [(number, json.loads(pairs)) for number, pairs in rows]


def change_batch(run, iteration, number, pairs):
    values = (json.dumps(pairs), iteration, number)
    sql(run, "UPDATE batches SET pairs = ? WHERE iteration = ? AND number = ?", values)


def forget_a_pair(run):
    sql(run, "DELETE FROM pairs WHERE id = (SELECT min(id) FROM pairs WHERE iteration = 2)")


def forget_the_newest_checkpoint(run):
    sql(run, "DELETE FROM checkpoints WHERE path = 'checkpoints/iteration-0003'")


def set_a_prompt_aside_later(run):
    """What is not there of an iteration is not explained by what happened in a later one."""
    [prompt] = sql(run, "SELECT min(prompt) FROM groups WHERE iteration = 2 AND wave = 0")[0]
    rewrite(run, ROLLOUTS, lambda rows: [row for row in rows if row["prompt_id"] != prompt])
    sql(run, "INSERT INTO quarantine VALUES (?, 3, 'it killed 3 generators', 0)", (prompt,))


def take_an_acknowledgement_back(run):
    last = "(SELECT max(step) FROM batches)"
    sql(run, f"UPDATE batches SET acknowledged = NULL, outcome = NULL, step = NULL WHERE step = {last}")


def give_two_batches_one_step(run):
    sql(run, "UPDATE batches SET step = step - 1 WHERE step = (SELECT max(step) FROM batches)")


def leave_a_step_out(run):
    sql(run, "UPDATE batches SET step = step + 1 WHERE step = (SELECT max(step) FROM batches)")


def issue_no_wave(run):
    """The first of iteration 2, of which then nothing else is missing."""
    [(prompts,)] = sql(run, "SELECT prompts FROM waves WHERE iteration = 2 AND wave = 0")
    for prompt in json.loads(prompts):
        sql(run, "DELETE FROM groups WHERE iteration = 2 AND prompt = ?", (prompt,))
    sql(run, "DELETE FROM waves WHERE iteration = 2 AND wave = 0")
    rewrite(run, ROLLOUTS, lambda rows: [])


def ask_the_same_prompts_again(run):
    sql(run, "UPDATE iterations SET cursor = (SELECT cursor FROM iterations WHERE iteration = 1) WHERE iteration = 2")


def train_a_batch_more_than_is_known(run):
    sql(run, "UPDATE checkpoints SET batches = batches - 1 WHERE iteration = 3")


def judge_a_group_twice(run):
    rewrite(run, ROLLOUTS, lambda rows: [*rows, *({**row, "group": 99} for row in rows if row["group"] == 0)])


def sample_by_another_policy(run):
    rewrite(run, PAIRS, lambda rows: [{**rows[0], "rejected_policy_digest": "f" * 16}, *rows[1:]])


def cut_a_checkpoint(run):
    file = next((run / "checkpoints" / "iteration-0003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        (cut_a_pair_file, "damaged", f"{PAIRS} is not what was written"),
        (remove_an_evaluation, "damaged", "evaluations/iteration-0001-greedy.parquet: No such file"),
        (cut_a_checkpoint, "damaged", ".safetensors is not what was written"),
        (drop_a_pair_of_a_file, "lost", "of the ledger is in no file"),
        (drop_a_group_of_a_file, "lost", "completions of"),
        (forget_a_group, "lost", "the note that"),
        (forget_a_pair, "lost", "the note that pair"),
        (forget_the_newest_checkpoint, "lost", "has the weights of iteration 3, does not count"),
        (set_a_prompt_aside_later, "lost", "completions of"),
        (write_a_pair_twice, "repeated", "was made twice"),
        (train_a_pair_twice, "repeated", "in 2 batches, 1 epochs"),
        (train_a_pair_never, "lost", "in 0 batches, 1 epochs"),
        (train_a_pair_of_another_iteration, "repeated", "is of another iteration"),
        (take_an_acknowledgement_back, "lost", "was never acknowledged"),
        (give_two_batches_one_step, "repeated", "was taken by 2 batches"),
        (leave_a_step_out, "lost", "was taken by no batch"),
        (issue_no_wave, "lost", "iteration 2 asked for"),
        (ask_the_same_prompts_again, "repeated", "the stream did not go on"),
        (train_a_batch_more_than_is_known, "repeated", "contains (iteration, its batches, all batches)"),
        (judge_a_group_twice, "rejudged", "of iteration 2"),
        (sample_by_another_policy, "stale", "was not sampled by"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_what_was_done_to_a_run_is_found_and_named(run, harm, kind, said):
    harm(run)
    found = audit(run)
    assert any(said in text for text in getattr(found, kind)), found.findings
    others = {other for other in KINDS if getattr(found, other)} - {kind}
    # A pair that is gone from a file was trained on by somebody: both sides of that are told.
    assert others <= ({"repeated"} if harm is drop_a_pair_of_a_file else set()), found.findings


def test_an_untouched_run_has_nothing(reference_run):
    found = audit(reference_run)
    assert found.findings == []
    with sqlite3.connect(reference_run / "ledger.sqlite") as db:
        counted = [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("pairs", "batches")]
    assert [found.iterations, found.pairs, found.batches] == [3, *counted]
    assert "3 iterations" in str(found)


def test_a_folder_without_a_ledger_is_refused(run):
    (run / "ledger.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="not a readable ledger"):
        audit(run)


def test_a_ledger_with_a_damaged_page_is_refused(run):
    with (run / "ledger.sqlite").open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096)
    with pytest.raises(DataError, match=r"ledger.sqlite: (damaged|not a readable ledger)"):
        audit(run)
