"""One process a run folder: `<run>/run.lock` says which, and the operating system takes it back when that one dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from orchestrator.errors import ResourceError
from orchestrator.processes import started

FILE_NAME = "run.lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds, or last held, a run folder."""

    pid: int
    host: str
    process_started: str
    """See `orchestrator.processes.started`."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether it lives; None when it is on another machine."""
        if self.host != socket.gethostname():
            return None
        return started(self.pid) == self.process_started


class RunLock:
    """Held in a `with` block by the process that writes to a run folder.

    Raises:
        ResourceError: another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ResourceError(
                f"{self._path.parent} is in use by {holder(self._path.parent) or 'another process'}:"
                " wait for that run to end, stop it, or choose another run_dir"
            ) from error
        held_by = Holder(pid=os.getpid(), host=socket.gethostname(), process_started=started(os.getpid()) or "")
        file.truncate(0)
        file.write(json.dumps(asdict(held_by)))
        file.flush()
        os.fsync(file.fileno())
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def holder(run_dir: Path) -> Holder | None:
    """Who holds a run folder, or held it when it died; None when it was let go, or never taken."""
    try:
        return Holder(**json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
