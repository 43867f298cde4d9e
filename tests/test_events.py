"""Events are in the file when they are told, whoever tells them, and a torn last line spoils no other."""

import threading

import pytest

from orchestrator.events import FILE_NAME, Event, EventKind, EventLog, read_events
from orchestrator.files import read_json_lines


def lost(number):
    return Event(kind=EventKind.LOST, role="generator", actor=f"generator-{number}", text=f"generator-{number} died\n!")


def test_what_is_known_is_written_and_shown(tmp_path):
    shown = []
    log = EventLog(tmp_path, shown.append)
    log(lost(1))
    (line,) = read_events(tmp_path)
    assert shown == [line.pop("text")] == ["generator-1 died\n!"]
    assert line.pop("time") > 0
    assert line == {"kind": "lost", "role": "generator", "actor": "generator-1"}
    log.close()


def test_many_threads_write_whole_lines(tmp_path):
    log = EventLog(tmp_path, lambda text: None)
    starts = (0, 100, 200)
    threads = [
        threading.Thread(target=lambda start=start: [log(lost(start + k)) for k in range(50)]) for start in starts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    told = {event["actor"] for event in read_events(tmp_path)}
    assert told == {f"generator-{start + k}" for start in starts for k in range(50)}


def test_a_line_that_a_kill_tore_is_cut(tmp_path):
    EventLog(tmp_path, lambda text: None)(lost(1))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "lo')
    assert len(read_events(tmp_path)) == 1
    log = EventLog(tmp_path, lambda text: None)
    log(lost(2))
    assert [event["actor"] for event in read_events(tmp_path)] == ["generator-1", "generator-2"]


def test_a_run_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []


@pytest.mark.parametrize("harm", [b"\0" * 40, b'{"kind": "lo', b"\xff\xfe", b"", b"[1]"])
def test_a_damaged_line_is_left_out_and_named(tmp_path, harm, caplog):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + harm + b'\n{"a": 2}\n{"a": 3')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert f"{path}: line 2 is damaged and left out" in caplog.text
