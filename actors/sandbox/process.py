"""A confined process as its parent sees it: started, asked within a deadline, killed.

    limits      address space, processor time, file size, open files; no new processes, no core files
    sees        PATH, LANG, a HOME of its own, and no other variable of the environment; all files that the user may
                read, none of which it can change where the kernel allows namespaces
    reaches     no network, no other process

docs/judges.md says what of this holds where the kernel or a container forbids a part of it; what was not to be had is
logged once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_REPLY_BYTES = 1 << 16
FORGED = "wrote into the pipe that is not its own"
_ROOT = str(Path(__file__).parents[2])
_START = "import sys; sys.path.insert(0, sys.argv[1]); from actors.sandbox.worker import main; del sys.path[0]; main()"
_KEPT = ("PATH", "LD_LIBRARY_PATH")
"""Variables without which a Python may not start; neither holds secrets."""
_KILL_DEADLINE_S = 30.0
_LAST_MOMENT_S = 0.5
_PREFIX = "agon-sandbox-"
_ABANDONED_S = 60.0
"""A folder is locked by then, if its owner lives."""
_TICK_MS = 1000


class Stopped(Exception):  # noqa: N818 - it is no error of ours, but what became of the code
    """The process has ended or was killed; the argument says why, as the end of a sentence about the code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one confined process may take. Example: ``Limits(time_s=10.0, memory_mb=1024)``."""

    time_s: float
    """Of one call, or of one completion with its tests; also of its processor time, rounded up to seconds."""
    memory_mb: int
    """Address space, MiB."""


class Confined:
    """One confined process; whatever goes wrong with it ends it.

    Args:
        limits: of the process.
        start_s: it must be ready after so long.
        **first: what it is told of its work, beside the limits.

    Raises:
        Stopped: it did not start.
    """

    def __init__(self, limits: Limits, start_s: float, **first: Any) -> None:
        work_dir, hold = _new_folder()
        theirs_in, requests = os.pipe()
        replies, theirs_out = os.pipe()
        theirs_life, life = os.pipe()
        theirs = (theirs_in, theirs_out, theirs_life)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, _ROOT, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(work_dir),
                cwd=work_dir,
                pass_fds=theirs,
                start_new_session=True,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._process, self._requests, self._replies = process, requests, replies
        self._end = weakref.finalize(self, _end, process, (requests, replies, life, hold), work_dir)
        self._read = bytearray()
        os.set_blocking(requests, False)
        os.set_blocking(replies, False)
        deadline = time.monotonic() + start_s
        cpu_s = int(limits.time_s) + 1
        self.send({"work_dir": work_dir, "memory_mb": limits.memory_mb, "cpu_s": cpu_s, **first}, deadline)
        self.lacking = tuple(self.receive(deadline)["lacking"])
        """What of its confinement could not be had, for people."""
        _warn_once(self.lacking)

    @property
    def pid(self) -> int:
        """Its process id, and that of its process group."""
        return self._process.pid

    def send(self, message: Any, deadline: float) -> None:
        """Sends a frame; `deadline` is of `time.monotonic`. Raises Stopped.

        Where nobody reads any more, `receive` tells what was said last, or how it ended.
        """
        body = json.dumps(message).encode()
        rest = memoryview(len(body).to_bytes(4, "big") + body)
        while rest:
            self._wait(self._requests, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next frame. Raises Stopped; also where it is none of ours."""
        while len(self._read) < 4 or len(self._read) < 4 + self._length():
            self._wait(self._replies, select.POLLIN, deadline)
            data = os.read(self._replies, MAX_REPLY_BYTES)
            if not data:
                raise self._ended(deadline)
            self._read += data
        size = 4 + self._length()
        body = bytes(self._read[4:size])
        del self._read[:size]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self.stop(FORGED)
        return {key: _writable(value) for key, value in message.items()}

    def stop(self, why: str) -> Stopped:
        """Kills the process; what is to be raised for it."""
        self.close()
        return Stopped(why)

    def close(self) -> None:
        """Kills the process and removes its folder; may be called again."""
        self._end()

    def _length(self) -> int:
        length = int.from_bytes(self._read[:4], "big")
        if length > MAX_REPLY_BYTES:
            raise self.stop(FORGED)
        return length

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(max(0, min(_TICK_MS, (deadline - time.monotonic()) * 1000))):
            if time.monotonic() >= deadline:
                raise self.stop("ran out of time")

    def _ended(self, deadline: float) -> Stopped:
        """Why it ended by itself; it closes its pipes a moment before it has ended."""
        try:
            code = self._process.wait(max(_LAST_MOMENT_S, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self.stop("closed the pipe that is not its own")
        if code == -signal.SIGXCPU:
            return self.stop("ran out of processor time")
        return self.stop(f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}")


def _writable(value: Any) -> Any:
    """Text without halves of surrogate pairs, which no file takes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def new_token() -> str:
    """What nobody can guess."""
    return secrets.token_hex(16)


def _environment(work_dir: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**kept, **one_thread, "LANG": "C.UTF-8", "HOME": work_dir, "TMPDIR": work_dir}


def _end(process: subprocess.Popen[bytes], descriptors: tuple[int, ...], work_dir: str) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        process.wait(_KILL_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(
            f"the sandbox process {process.pid} was killed and is still there after {_KILL_DEADLINE_S:g} s: the kernel"
            " holds it, mostly for a file system that does not answer"
        ) from error
    shutil.rmtree(work_dir, ignore_errors=True)  # the code may have made what cannot be removed


def _new_folder() -> tuple[str, int]:
    """A work folder, and the descriptor whose lock says that it is in use; removes folders whose owners were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), _opened(folder) as descriptor:  # of another user, in use, or just removed by another
            if time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
    work_dir = tempfile.mkdtemp(prefix=_PREFIX)
    hold = os.open(work_dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(hold, fcntl.LOCK_EX)
    return work_dir, hold


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@cache
def _warn_once(lacking: tuple[str, ...]) -> None:
    if lacking:
        logging.getLogger(__name__).warning(
            "the sandbox of user code is weaker here than it should be: %s (docs/judges.md says what that leaves open)",
            "; ".join(lacking),
        )
