"""What is written is read back; the bytes depend on the records alone; a file is whole or absent."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.files import atomic_file
from orchestrator.store import PAIRS, ROLLOUTS, SAMPLES, Store, read_pairs, read_rollouts, read_samples
from tests.records import any_pair, any_scored_group, completion, pair, scored

disk = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@disk
@given(st.lists(any_scored_group(), max_size=4))
def test_rollouts_come_back(tmp_path, groups):
    assert read_rollouts(Store(tmp_path).write_rollouts(3, 0, groups)) == groups


@disk
@given(st.lists(any_scored_group(), max_size=4))
def test_samples_come_back(tmp_path, groups):
    samples = [scored.group for scored in groups]
    assert read_samples(Store(tmp_path).write_samples(3, 1, samples)) == samples


@disk
@given(st.lists(any_pair, max_size=4))
def test_pairs_come_back(tmp_path, pairs):
    assert read_pairs(Store(tmp_path).write_pairs(3, 0, pairs)) == pairs


def test_two_equal_groups_stay_two(tmp_path):
    groups = [scored(1.0, None), scored(1.0, None)]
    assert read_rollouts(Store(tmp_path).write_rollouts(1, 0, groups)) == groups


def test_abstentions_are_written_before_any_filter(tmp_path):
    path = Store(tmp_path).write_rollouts(1, 0, [scored(None, 0.0)])
    assert path == tmp_path / "rollouts" / "iteration-0001-wave-0000.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [(row["score"], row["score_reason"]) for row in rows] == [(None, "no answer found"), (0.0, "")]


def test_the_same_records_give_the_same_bytes(tmp_path):
    groups = [scored(*(k / 7 for k in range(8)), seed=seed) for seed in range(20)]
    first, second = (Store(tmp_path / name).write_rollouts(1, 0, groups) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("schema", [SAMPLES, ROLLOUTS, PAIRS])
def test_every_column_is_documented_in_the_file(tmp_path, schema):
    store = Store(tmp_path)
    write = {"sample": store.write_samples, "rollout": store.write_rollouts, "pair": store.write_pairs}
    path = write[schema.metadata[b"agon.record"].decode()](1, 0, [])
    written = pq.read_schema(path)
    assert written.names == schema.names
    for column in written:
        assert column.metadata[b"doc"], column.name
        assert b"unit" in column.metadata, column.name


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    store = Store(tmp_path)
    path = store.write_pairs(1, 0, [pair(completion(1), completion(2))])
    before = path.read_bytes()

    def die(path):
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_other_files_are_refused_by_name(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(DataError, match=r"iteration-0001-wave-0000\.parquet: holds .*rollout"):
        read_pairs(store.write_rollouts(1, 0, [scored(1.0)]))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match=r"foreign\.parquet: holds no agon records"):
        read_pairs(tmp_path / "foreign.parquet")
    whole = store.write_pairs(2, 0, [pair(completion(1), completion(2))])
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_pairs(whole)
    with pytest.raises(DataError, match=r"absent\.parquet"):
        read_pairs(tmp_path / "absent.parquet")


def test_a_group_that_would_vanish_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no completion"):
        Store(tmp_path).write_rollouts(1, 0, [scored()])
