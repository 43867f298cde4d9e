"""Processes that this one started: none outlives it."""

from __future__ import annotations

import psutil

_GRACE_S = 2.0


def children() -> set[psutil.Process]:
    """Of this process, theirs included."""
    return set(psutil.Process().children(recursive=True))


def end_children(before: set[psutil.Process]) -> None:
    """Ends what is still alive of the children that were not there `before`, gently and then not.

    Ray and wandb end their own processes. What is left here was orphaned by a start that broke off half-way.
    """
    _, left = psutil.wait_procs(children() - before, timeout=_GRACE_S / 2)
    for child in left:
        _send(child, kill=False)
    _, stubborn = psutil.wait_procs(left, timeout=_GRACE_S)
    for child in stubborn:
        _send(child, kill=True)


def _send(child: psutil.Process, *, kill: bool) -> None:
    try:
        child.kill() if kill else child.terminate()
    except psutil.NoSuchProcess:
        return
