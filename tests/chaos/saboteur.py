"""Kills a role at a chosen point of a run: real signals to real processes, from within the code that is at the point.

A folder (`AGON_CHAOS`) says what is to happen, so that all processes of a run agree on it:

    armed/    {"point": "optimizer step", "role": "generator", "visit": 2}, a file each; whoever comes to the point for
              the visit-th time in its process takes the file away, so that it happens once, and kills the role
    fired/    when that was, and which process died, in a file of the same name
    pids/     one file a process, <role>_<name>_<pid>, with the time at which it began, since numbers are given anew;
              raylets among them where the run has nodes
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "AGON_CHAOS"
POINTS = ("collecting", "scoring", "packing", "optimizer step", "checkpoint", "publication", "evaluating")
ROLES = ("generator", "judge", "queue", "learner", "controller", "node")

SAME_BIRTH_S = 5.0
"""Two processes read the time of a third's birth off clocks that may have been set meanwhile."""

_visits: Counter[str] = Counter()


def register(role: str, name: str = "", pid: int | None = None) -> None:
    """Notes a process, this one if no other is named, as one of a role."""
    folder = Path(os.environ[FOLDER]) / "pids"
    folder.mkdir(exist_ok=True)
    pid = pid or os.getpid()
    (folder / f"{role}_{name}_{pid}").write_text(str(psutil.Process(pid).create_time()))


def strike(point: str, *, own: str = "", delay_s: float = 0.0) -> bool:
    """At a point: does what is armed for it, if it is this visit; after `delay_s` in another thread where given.

    Returns whether it is this process, of the role `own`, that dies of it after that.
    """
    doomed = False
    folder = Path(os.environ[FOLDER])
    _visits[point] += 1
    for path in sorted((folder / "armed").glob("*.json")):
        try:
            armed = json.loads(path.read_text())
            if (armed["point"], armed["visit"]) != (point, _visits[point]):
                continue
            path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
        victims = [psutil.Process()] if armed["role"] == own else []
        doomed = doomed or bool(victims)
        if delay_s:
            threading.Timer(delay_s, kill, [armed["role"], folder, path.name, victims]).start()
        else:
            kill(armed["role"], folder, path.name, victims)
    return doomed


def kill(role: str, folder: Path, name: str, victims: Sequence[psutil.Process] = ()) -> None:
    """Kills the last of the victims, or else the newest living process of a role, and notes it under a name."""
    victims = list(victims) or living(role, folder)
    if role == "node":
        victims.sort(key=_num_children)  # the one that has most of the actors dies
    if not victims:
        raise RuntimeError(f"nobody of role {role} lives")
    (folder / "fired").mkdir(exist_ok=True)
    (folder / "fired" / name).write_text(json.dumps({"role": role, "pid": victims[-1].pid, "time": time.time()}))
    victims[-1].kill()


def living(role: str, folder: Path) -> list[psutil.Process]:
    """The processes of a role that live, the newest last."""
    found = []
    for path in sorted((folder / "pids").glob(f"{role}_*"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(path.name.rsplit("_", 1)[1]))
            noted = float(path.read_text() or 0)  # empty where it is just being written
            if abs(process.create_time() - noted) < SAME_BIRTH_S and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _num_children(process: psutil.Process) -> int:
    return sum("ray::" in " ".join(child.cmdline()) for child in process.children())
