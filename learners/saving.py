"""Checkpoints in the background: the state is copied while training stands still, and written while it goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from learners import ranks
from learners.checkpoint import State, write_folder
from orchestrator.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Saver:
    """Writes one checkpoint at a time. With several ranks, each has one, made and used at the same points.

    Args:
        deadline_s: of a write (`learner.step_deadline_s`), seconds.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._group = ranks.new_group()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: dict[str, Future[str]] = {}

    def save(self, folder: str, copied: Callable[[], State]) -> None:
        """Starts to write what `copied` returns, as soon as the write before has ended.

        Args:
            folder: where to.
            copied: called in this thread, and not before, so that there are never two copies.

        Raises:
            DeadlineError: the write before has not ended in time.
        """
        self.wait()
        self._writes[folder] = self._pool.submit(write_folder, folder, copied(), group=self._group)

    def wait(self) -> None:
        """Waits until nothing is being written. Raises DeadlineError: it takes too long."""
        left = {folder: write for folder, write in self._writes.items() if not write.done()}
        self._ended(left.values(), what=", ".join(left))

    def saved(self, folder: str) -> str:
        """Waits until a checkpoint is durable, and returns the digest of its manifest.

        Raises:
            OSError: the disk is full or failed; nothing of the folder is there.
            DeadlineError: it takes too long.
            RuntimeError: no write of this folder was started, or its error was reported before.
        """
        write = self._writes.get(folder)
        if write is None:
            raise RuntimeError(f"no checkpoint is being written to {folder}: save comes first")
        self._ended([write], what=folder)
        if write.exception() is not None:
            del self._writes[folder]  # its frames hold the copied state
        return write.result()

    def _ended(self, writes: Iterable[Future[str]], *, what: str) -> None:
        if wait(list(writes), self._deadline_s).not_done:
            raise DeadlineError(
                f"learner: {what} not written within {self._deadline_s:g} s. Raise learner.step_deadline_s if the disk"
                " is really that slow"
            )
