"""`agon profile RUN`: where each actor's time went, from the ledger's stages and `profile.jsonl`."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DataError
from orchestrator.files import atomic_file, dump_json
from orchestrator.ledger import LedgerReader
from orchestrator.profiling import FILE_NAME, read_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from orchestrator.ledger import PhaseRecord

Stretch = tuple[str, float, float]
"""A kind of work or a stage, its start and its end, in seconds since the epoch."""
Times = list[tuple[float, float]]
"""In order, without overlaps."""

_WIDTH = 96
_SHOWN_ITERATIONS = 3
_IDLE, _DOWN = ".", " "
_PAUSE = 0.05
"""Share of the shown stages that a pause between them takes at most in a timeline: a run may be resumed days later."""
_KINDS = (
    *("collect", "train", "publish", "evaluate", "promote", "settle"),
    *("step", "reference", "decode", "load weights", "score", "copy state", "KL"),
)
"""Stages and kinds of work, in the order in which they choose a letter: the same in each run."""


def profile(run: Path, *, as_json: bool = False, trace: Path | None = None) -> str:
    """Shares of each actor's time and a timeline for people, or one JSON object.

    Args:
        run: a run folder.
        as_json: the latter.
        trace: a file to write all spans to, in Chrome's trace format, which Perfetto opens.

    Raises:
        DataError: the folder holds no run, or one that has noted nothing.
    """
    with LedgerReader(run) as ledger:
        phases = [phase for phase in ledger.phases() if phase.seconds is not None]
    stages = _foremost(phases)
    actors: dict[str, list[Stretch]] = defaultdict(list)
    there: dict[str, list[Stretch]] = defaultdict(list)
    for line in read_profile(run):
        actors[line["actor"]] += [(what, start, start + seconds) for what, start, seconds in line["spans"]]
        there[line["actor"]].append(("there", line["since"], line["until"]))
    if not actors or not stages:
        raise DataError(f"{run}: nothing was noted yet: {FILE_NAME} is written at the end of each iteration")
    if trace is not None:
        _write_trace(trace, {"controller": stages, **actors})
    presence = {name: _union([*there[name], *spans]) for name, spans in actors.items()}
    shares = {name: _shares(spans, stages, presence[name]) for name, spans in sorted(actors.items())}
    if as_json:
        return dump_json({"run": str(run), "seconds": _total(stages), "actors": shares}, indent=2)
    return "\n".join(
        [
            *_table(shares, _total(stages)),
            "",
            *_timeline(_latest(stages, phases), dict(sorted(actors.items())), presence),
        ]
    )


def _foremost(phases: Iterable[PhaseRecord]) -> list[Stretch]:
    """The stage that the run was in: of what was collected beside another stage, only what that one left."""
    stages = [(phase.phase, phase.started, _end(phase)) for phase in phases]
    others = [stage for stage in stages if stage[0] != "collect"]
    covered = _union(others)
    alone = [rest for stage in stages if stage[0] == "collect" for rest in _without(stage, covered)]
    return sorted([*others, *alone], key=lambda stage: stage[1])


def _without(stretch: Stretch, covered: Iterable[tuple[float, float]]) -> Iterator[Stretch]:
    """The parts of a stretch that none of these times covers; they are in order."""
    what, start, end = stretch
    for since, until in covered:
        if since > start and start < end:
            yield what, start, min(since, end)
        start = max(start, until)
    if start < end:
        yield what, start, end


def _latest(stages: Sequence[Stretch], phases: Sequence[PhaseRecord]) -> list[Stretch]:
    """The stages since the iterations before the last few ended: what was collected ahead of that is theirs."""
    done = max((phase.iteration for phase in phases), default=0)
    since = max((_end(phase) for phase in phases if phase.iteration <= done - _SHOWN_ITERATIONS), default=0.0)
    return [(what, max(start, since), end) for what, start, end in stages if end > since]


def _end(phase: PhaseRecord) -> float:
    return phase.started + (phase.seconds or 0.0)


def _total(stages: Iterable[Stretch]) -> float:
    return sum(end - start for _, start, end in stages)


def _shares(spans: Sequence[Stretch], stages: Sequence[Stretch], there: Times) -> dict[str, dict[str, float]]:
    """Seconds of each kind of work, and seconds of waiting in each stage while the actor was there.

    Work that overlaps (a checkpoint is written while training goes on) counts in each of its kinds, and once against
    waiting.
    """
    working: dict[str, float] = defaultdict(float)
    for what, start, end in spans:
        working[what] += end - start
    busy = _union(spans)
    waiting: dict[str, float] = defaultdict(float)
    for stage in stages:
        waiting[stage[0]] += _common(stage, there) - _common(stage, busy)
    return {
        "working": _longest_first(working),
        "waiting": {stage: seconds for stage, seconds in _longest_first(waiting).items() if seconds > 0},
    }


def _common(stretch: Stretch, times: Times) -> float:
    """Seconds that a stretch has in common with them."""
    _, start, end = stretch
    return sum(max(0.0, min(end, until) - max(start, since)) for since, until in times)


def _longest_first(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _union(spans: Iterable[Stretch]) -> Times:
    """The times that any of the spans cover."""
    covered: Times = []
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        if covered and start <= covered[-1][1]:
            covered[-1] = covered[-1][0], max(covered[-1][1], end)
        else:
            covered.append((start, end))
    return covered


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 else "<1%"


def _table(shares: dict[str, dict[str, dict[str, float]]], total: float) -> list[str]:
    width = max(map(len, shares))
    lines = [f"of {total:.1f} s in stages", ""]
    for name, kinds in shares.items():
        works, waits = (
            ", ".join(f"{what} {_share(seconds / total)}" for what, seconds in kinds[kind].items() if seconds > least)
            for kind, least in (("working", 0), ("waiting", total / 200))
        )
        lines.append(f"{name:{width}}  works: {works or 'never'}")
        lines.append(f"{'':{width}}  waits in: {waits or 'none'}")
    return lines


def _timeline(stages: Sequence[Stretch], actors: dict[str, list[Stretch]], presence: dict[str, Times]) -> list[str]:
    """A row for the stages and one for each actor; each column is what filled most of its time."""
    if not stages:
        return []
    pauses = _pauses(stages)
    rows = {name: _drawn_together(spans, pauses) for name, spans in {"stage": stages, **actors}.items()}
    there = {
        name: _union(_drawn_together([("there", *time) for time in times], pauses)) for name, times in presence.items()
    }
    start, end = min(since for _, since, _ in rows["stage"]), max(until for _, _, until in rows["stage"])
    width = max(map(len, rows))
    kinds = {what for spans in rows.values() for what, _, until in spans if until > start}
    letters = _letters(dict.fromkeys((*_KINDS, *sorted(kinds))))
    left_out = sum(until - since for since, until in pauses)
    without = f", without {left_out:.0f} s in which the run was down" if pauses else ""
    column_s = (end - start) / _WIDTH
    lines = [f"the last {end - start:.1f} s, a column {column_s:.2g} s{without}"]
    drawn = {name: list(_columns(spans, start, column_s, letters)) for name, spans in rows.items()}
    for name, columns in drawn.items():
        shown = []
        for index, (one, stage) in enumerate(zip(columns, drawn["stage"], strict=True)):
            column = ("", start + index * column_s, start + (index + 1) * column_s)
            is_there = stage != _IDLE and (name == "stage" or _common(column, there[name]) > column_s / 2)
            shown.append(one if one != _IDLE or is_there else _DOWN)
        lines.append(f"{name:{width}}  {''.join(shown)}".rstrip())
    legend = ", ".join(f"{letter} {what}" for what, letter in letters.items() if what in kinds)
    return [*lines, f"{'':{width}}  {legend}, {_IDLE} waiting, blank between stages or not running"]


def _pauses(stages: Sequence[Stretch]) -> Times:
    """What is left out of the times between stages, so that none of them is long."""
    covered = _union(stages)
    most = _PAUSE * sum(end - start for start, end in covered)
    return [(end + most, start) for (_, end), (start, _) in pairwise(covered) if start - end > most]


def _drawn_together(spans: Sequence[Stretch], pauses: Times) -> list[Stretch]:
    """Spans as if the pauses had not been."""

    def moved(time: float) -> float:
        return time - sum(min(max(0.0, time - since), until - since) for since, until in pauses)

    return [(what, moved(start), moved(end)) for what, start, end in spans]


def _columns(spans: Sequence[Stretch], start: float, column_s: float, letters: dict[str, str]) -> Iterable[str]:
    for index in range(_WIDTH):
        since, until = start + index * column_s, start + (index + 1) * column_s
        filled: dict[str, float] = defaultdict(float)
        for what, begun, ended in spans:
            if (overlap := min(until, ended) - max(since, begun)) > 0:
                filled[what] += overlap
        what, seconds = max(filled.items(), key=lambda item: item[1], default=("", 0.0))
        yield letters[what] if seconds > column_s / 4 else _IDLE


def _letters(kinds: Iterable[str]) -> dict[str, str]:
    """A letter for each kind, of its name where one is free."""
    letters: dict[str, str] = {}
    for kind in kinds:
        candidates = [*kind.replace(" ", ""), *kind.upper().replace(" ", ""), *"0123456789"]
        letters[kind] = next(letter for letter in candidates if letter not in letters.values())
    return letters


def _write_trace(path: Path, rows: dict[str, list[Stretch]]) -> None:
    events: list[dict[str, Any]] = []
    for number, (name, spans) in enumerate(rows.items()):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}})
        events += [
            {"name": what, "ph": "X", "pid": 0, "tid": number, "ts": start * 1e6, "dur": (end - start) * 1e6}
            for what, start, end in spans
        ]
    with atomic_file(path) as file:
        file.write(json.dumps({"traceEvents": events}).encode())
