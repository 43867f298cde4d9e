"""Where time went: spans add up, waiting is what no span covers, and a run can be drawn from its folder."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.profile import _foremost, _latest, _shares, _timeline, _union, _without, profile
from orchestrator.errors import DataError
from orchestrator.ledger import Ledger, PhaseRecord
from orchestrator.profiling import FILE_NAME
from orchestrator.spans import Span, Spans


def test_short_pauses_do_not_part_spans_and_each_is_taken_once():
    spans = Spans()
    for what, start in (("decode", 0.0), ("decode", 1.01), ("load weights", 2.0), ("decode", 3.0), ("decode", 4.5)):
        spans._note(Span(what=what, start=start, seconds=1.0))
    assert spans.take() == [
        Span(what="decode", start=0.0, seconds=2.01),
        Span(what="load weights", start=2.0, seconds=1.0),
        Span(what="decode", start=3.0, seconds=1.0),
        Span(what="decode", start=4.5, seconds=1.0),
    ]
    assert spans.take() == []


def test_work_that_raises_is_noted_and_old_spans_give_way():
    spans = Spans(limit=2)
    for what in "abc":
        with pytest.raises(ZeroDivisionError), spans.during(what):
            1 / 0  # noqa: B018
    assert [span.what for span in spans.take()] == ["b", "c"]


STRETCHES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 10)).map(lambda s: (s[0], s[1], s[1] + s[2])),
    max_size=8,
)


@given(STRETCHES)
def test_the_union_covers_the_same_seconds(spans):
    covered = {second for _, start, end in spans for second in range(start, end)}
    union = _union(spans)
    assert {second for start, end in union for second in range(start, end)} == covered
    assert sum(end - start for start, end in union) == len(covered)


@given(st.integers(0, 30), st.integers(0, 10), STRETCHES)
def test_what_is_left_of_a_stretch_is_what_nothing_covers(start, length, others):
    covered = {second for since, until in _union(others) for second in range(since, until)}
    left = list(_without(("collect", start, start + length), _union(others)))
    assert {second for _, since, until in left for second in range(since, until)} == (
        set(range(start, start + length)) - covered
    )
    assert sum(until - since for _, since, until in left) == len(set(range(start, start + length)) - covered)
    assert all(since < until for _, since, until in left)


def test_what_was_collected_ahead_hides_no_stage_of_the_iterations_before():
    def phase(iteration: int, name: str, started: float, seconds: float) -> PhaseRecord:
        return PhaseRecord(iteration=iteration, phase=name, started=started, seconds=seconds, tokens=0, metrics={})

    phases = [phase(n, "train", 10.0 * n, 6.0) for n in range(1, 6)]
    phases += [phase(n, "evaluate", 10.0 * n + 6.0, 3.0) for n in range(1, 6)]
    phases += [phase(n, "collect", 10.0 * (n - 2), 19.0) for n in range(1, 6)]  # from the training of n - 2 on
    latest = _latest(_foremost(phases), phases)
    assert latest[0] == ("collect", 29.0, 30.0)  # iteration 2 ended at 29
    assert [stage for stage in latest if stage[0] != "collect"] == [
        (name, start, end)
        for n in (3, 4, 5)
        for name, start, end in (("train", 10.0 * n, 10.0 * n + 6.0), ("evaluate", 10.0 * n + 6.0, 10.0 * n + 9.0))
    ]


@given(STRETCHES)
def test_work_and_waiting_make_up_the_stages(spans):
    stages = [("collect", 0, 20), ("train", 20, 50)]
    shares = _shares(spans, stages, [(0, 50)])
    covered = {second for _, start, end in spans for second in range(start, end)}
    for stage, start, end in stages:
        assert shares["waiting"].get(stage, 0) == len(set(range(start, end)) - covered)
    assert sum(shares["working"].values()) == sum(end - start for _, start, end in spans)


@pytest.fixture
def run_dir(tmp_path):
    with Ledger(tmp_path) as ledger:
        for start, name in ((0, "collect"), (8, "train")):
            ledger.start_phase(1, name)
            ledger.finish_phase(1, name, seconds=8 if name == "collect" else 2)
            ledger.db.execute("UPDATE phases SET started = ? WHERE phase = ?", (1000 + start, name))
    lines = [
        {"actor": "generator-0", "role": "generator", "spans": [["decode", 1000, 6.0]]},
        {"actor": "learner", "role": "learner", "spans": [["step", 1008, 1.0], ["step", 1009, 1.0]]},
    ]
    lines = [line | {"since": 1000, "until": 1010} for line in lines]
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"actor": "torn')
    return tmp_path


def test_a_run_is_drawn(run_dir):
    text = profile(run_dir, trace=run_dir / "trace.json")
    assert "of 10.0 s in stages" in text
    assert "generator-0  works: decode 60%\n             waits in: collect 20%, train 20%" in text
    assert "learner      works: step 20%\n             waits in: collect 80%" in text
    rows = dict(line.split(maxsplit=1) for line in text.splitlines()[-4:-1])
    assert rows["stage"].count("c") == pytest.approx(0.8 * 96, abs=1)
    assert rows["generator-0"] == "d" * 58 + "." * 38
    assert rows["learner"] == "." * 77 + "S" * 19, "s is settle in each run"
    assert json.loads(profile(run_dir, as_json=True))["actors"]["learner"]["working"] == {"step": 2.0}
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["collect", "train", "decode", "step", "step"]


def test_while_a_run_is_down_nobody_waits():
    stages, work = [("collect", 0.0, 45.5), ("train", 50.0, 95.5)], {"learner": [("step", 50.0, 95.5)]}
    lines = _timeline(stages, work, {"learner": [(0.0, 95.5)]})
    assert lines[0] == "the last 95.5 s, a column 0.99 s"
    assert [line[9:].replace(" ", "_") for line in lines[1:3]] == [
        f"{'c' * 46}{'_' * 4}{'t' * 46}",
        f"{'.' * 46}{'_' * 4}{'S' * 46}",
    ]


@pytest.mark.parametrize("days", [1, 100])
def test_a_run_that_was_resumed_days_later_can_still_be_read(days):
    """100 s in stages: 5 s are left of the pause."""
    later = 86_400.0 * days
    stages, work = (
        [("collect", 0.0, 50.0), ("train", later, later + 50.0)],
        {"learner": [("step", later, later + 50.0)]},
    )
    lines = _timeline(stages, work, {"learner": [(0.0, later + 50.0)]})
    left_out = later - 55
    assert lines[0] == f"the last 105.0 s, a column 1.1 s, without {left_out:.0f} s in which the run was down"
    assert re.fullmatch(r"stage    c{45,46} {4,5}t{45,46}", lines[1])


def test_who_was_not_there_did_not_wait():
    """A third engine after a resume."""
    stages = [("collect", 0.0, 48.0), ("collect", 48.0, 96.0)]
    work, there = {"generator-2": [("decode", 72.0, 96.0)]}, [(48.0, 96.0)]
    assert _shares(work["generator-2"], stages, there)["waiting"] == {"collect": 24.0}
    row = _timeline(stages, work, {"generator-2": there})[2]
    assert row == f"generator-2  {' ' * 48}{'.' * 24}{'d' * 24}"


def test_what_has_noted_nothing_is_said(run_dir):
    (run_dir / FILE_NAME).unlink()
    with pytest.raises(DataError, match="nothing was noted yet"):
        profile(run_dir)
