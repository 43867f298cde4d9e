"""A file counts while it is what was sealed, and what is wrong with it is said once."""

import errno

import pytest

from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.events import EventKind
from orchestrator.ledger import Ledger
from tests.ledgers import broken_off

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def parts(tmp_path):
    with Ledger(tmp_path) as ledger:
        events = []
        yield Archive(tmp_path, Accounts(ledger), events.append), ledger, events


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "pairs" / "x.parquet"
    made.parent.mkdir()
    made.write_bytes(CONTENT)
    return made


def cut(path):
    path.write_bytes(CONTENT[:-1])


def flip(path):
    path.write_bytes(CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:])


def remove(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, "has 10,239 bytes, 10,240 were written"),
        (flip, "has other bytes than were written"),
        (remove, "No such file"),
        (replace_by_folder, "Is a directory"),
    ],
)
def test_a_damaged_file_is_told_of_once_and_counts_no_more(parts, path, harm, reason):
    archive, _, events = parts
    archive.seal(3, [path])
    assert archive.intact(path)
    assert archive.intact(path), "it stays so"
    harm(path)
    assert not archive.intact(path)
    assert not archive.intact(path)
    (event,) = events
    assert (event.kind, event.iteration) == (EventKind.DAMAGED, 3)
    assert str(path) in event.text
    assert reason in event.text


def test_a_file_that_was_not_sealed_does_not_count_and_is_no_damage(parts, path):
    archive, ledger, events = parts
    assert not archive.intact(path)
    with broken_off(ledger):
        archive.seal(1, [path])
    assert not archive.intact(path)
    assert events == []


def test_sealed_anew_it_is_the_new_one_that_counts(parts, path):
    archive, _, events = parts
    archive.seal(1, [path])
    cut(path)
    archive.seal(1, [path])
    assert archive.intact(path)
    archive.drop(path)
    assert not path.exists()
    assert not archive.intact(path)
    archive.drop(path)
    assert events == []


def test_a_disk_that_fails_says_nothing_of_what_it_holds(parts, path, monkeypatch):
    archive, _, events = parts
    archive.seal(3, [path])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.archive.measure", fail)
        with pytest.raises(OSError, match="Input/output"):
            archive.intact(path)
    assert events == []
    assert archive.intact(path), "it counts as before"


def test_a_damaged_file_of_what_is_finished_goes_on_to_count(parts, path):
    archive, _, events = parts
    archive.seal(3, [path])
    assert archive.usable(path)
    flip(path)
    assert not archive.usable(path)
    assert not archive.usable(path)
    assert ["is not made again" in event.text for event in events] == [True, True]
    assert not archive.usable(path.with_name("unknown.parquet"))
