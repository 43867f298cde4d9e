"""`agon status RUN`: how a run stands, read from its folder while it goes on or after it."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestrator import runlock, summary
from orchestrator.errors import DataError
from orchestrator.events import read_events
from orchestrator.files import dump_json
from orchestrator.ledger import LedgerReader, RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from orchestrator.ledger import PhaseRecord


def status(run: Path, *, as_json: bool = False) -> str:
    """A few lines for people, or one JSON object.

    Raises:
        DataError: the folder holds no run.
    """
    found = read_status(run)
    return dump_json(found, indent=2) if as_json else _render(found)


def read_status(run: Path) -> dict[str, Any]:
    """What `summary.json` will hold, from the ledger, with `run`, `state`, `phase`, `events` and `note`.

    `state` is running, finished, interrupted, failed, or unknown (its process is on another machine, or nothing was
    recorded yet). A half-written run gives what is there.

    Raises:
        DataError: the folder holds no run.
    """
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder")
    held_by = runlock.holder(run)
    try:
        with LedgerReader(run) as ledger:
            known = summary.build_summary(ledger, seconds=_seconds_before(run))
            phases = ledger.phases()
    except DataError as error:
        known, phases = _without_ledger(run, error, held_by), []
    state, note = _state(known.get("status"), held_by)
    phase = _phase(_foremost(phases)) if phases and state == RunStatus.RUNNING else None
    events = read_events(run)
    beside = {
        "phase": phase,
        "events": dict(Counter(event["kind"] for event in events)),
        "last_event": events[-1]["text"].splitlines()[0] if events else None,
    }
    return {"run": str(run), "state": state, "note": known.pop("note", None) or note, **beside, **known}


def _without_ledger(run: Path, error: DataError, held_by: runlock.Holder | None) -> dict[str, Any]:
    """What is left when the ledger cannot be read: the summary, or that a process has just begun."""
    path = run / summary.FILE_NAME
    if path.exists():
        try:
            return {**json.loads(path.read_text(encoding="utf-8")), "note": f"from {path.name} alone: {error}"}
        except json.JSONDecodeError as damaged:
            raise DataError(f"{error}; {path}: not JSON: {damaged}") from damaged
    if held_by is not None:
        return {"status": RunStatus.RUNNING, "note": "nothing is recorded yet"}
    raise error


def _seconds_before(run: Path) -> dict[str, float]:
    """Seconds that `summary.json` has: also of stages which the ledger knows nothing of (warm start, start, export)."""
    path = run / summary.FILE_NAME
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (json.JSONDecodeError, KeyError):
        return {}  # the ledger has all that counts


def _state(status: str | None, held_by: runlock.Holder | None) -> tuple[str, str | None]:
    """The state, and what there is to say about it."""
    if status is None:
        return "unknown", "the run never began"
    if status != RunStatus.RUNNING:
        return status, None
    if held_by is None or held_by.alive is False:
        return RunStatus.INTERRUPTED, "its process is gone without a word; it can be resumed"
    where = f"process {held_by.pid} on {held_by.host}"
    return (
        ("unknown", f"{where} cannot be looked at from here") if held_by.alive is None else (RunStatus.RUNNING, where)
    )


def _foremost(phases: Sequence[PhaseRecord]) -> PhaseRecord:
    """The one that the run stands at: where pairs are collected ahead, of the earlier iteration."""
    underway = [phase for phase in phases if phase.seconds is None]
    return min(underway, key=lambda phase: phase.iteration) if underway else phases[-1]


def _phase(phase: PhaseRecord) -> dict[str, Any]:
    return {
        "iteration": phase.iteration,
        "name": phase.phase,
        "seconds": round(phase.seconds or max(0.0, time.time() - phase.started), 1),
    }


def _render(found: Mapping[str, Any]) -> str:
    note = f" ({found['note']})" if found["note"] else ""
    lines = [("run", found["run"]), ("state", f"{found['state']}{note}")]
    if found.get("error"):
        lines.append(("error", found["error"]))
    if phase := found["phase"]:
        lines.append(("now", f"iteration {phase['iteration']}, {phase['name']}, for {_clock(phase['seconds'])}"))
    if found.get("recipe"):
        lines.append(("recipe", f"{found['recipe']}, seed {found['seed']}"))
        lines.append(("iterations", f"{found['iterations']} of {found['planned']}"))
    for when, rates in found.get("accuracy", {}).items():
        shown = [f"{kind} {_rate(rate)}" for kind, rate in rates.items() if rate]
        if shown:
            lines.append((f"accuracy, {when}", ", ".join(shown)))
    if found.get("pairs"):
        lines.append(("pairs", f"{found['pairs']:,}"))
    if tokens := found.get("tokens"):
        lines.append(("tokens", ", ".join(f"{stage} {count:,}" for stage, count in tokens.items())))
    if seconds := found.get("seconds"):
        lines.append(("time", ", ".join(f"{stage} {_clock(value)}" for stage, value in seconds.items())))
    if found["events"]:
        counts = ", ".join(f"{count} {kind}" for kind, count in found["events"].items())
        lines.append(("events", f"{counts} (events.jsonl); the last: {found['last_event']}"))
    if found.get("checkpoint"):
        lines.append(("checkpoint", found["checkpoint"]))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _rate(rate: Mapping[str, Any]) -> str:
    n = "" if rate["n"] is None else f", n={rate['n']}"
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}{n}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return (
        f"{hours}:{minutes:02d}:{int(rest):02d}"
        if hours
        else f"{minutes}:{int(rest):02d}"
        if minutes
        else f"{rest:.1f} s"
    )
