"""Waiting for remote work, always with a deadline and a name."""

from __future__ import annotations

import re
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from orchestrator.errors import ActorLostError, ActorStartError, AgonError, DeadlineError, LostObjectError
from orchestrator.waits import check_wanted, may_be_unwanted, owners, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

NO_START = (ActorUnschedulableError, RuntimeEnvSetupError)
DEATHS = (RayActorError, OutOfMemoryError, *NO_START)
"""What Ray raises where an actor's process is gone or never was; `OutOfMemoryError`: it was killed to save its node."""

_GLANCE_S = 0.5
"""How often a thread beside the main one looks whether its work is still wanted."""
_RAISED = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(:|$)")
_ADDRESS = re.compile(r"([\w ]+ )?https?://\S+")
_LAST_LINES = 3
_GUESSES = "Some common causes include"
"""Behind it Ray lists what may kill a process anywhere."""


@cache
def actor_class(cls: type) -> Any:
    """Ray's class of actors of a class.

    One for all: Ray keeps what it knows of each for good, some 50 KB, and a run of days replaces many actors.
    """
    return ray.remote(cls)


def fetch(ref: Any, *, what: str, deadline_s: float, knob: str) -> Any:
    """Returns the value of one reference, or of a list of them.

    Args:
        ref: a Ray object reference, or a list of them.
        what: what is waited for, with the role that works on it ("learner: optimizer step 12").
        deadline_s: seconds.
        knob: the configuration key that sets the deadline.

    Raises:
        DeadlineError: naming all three, and the processes that owe the answer where they are known.
        ActorLostError: the actor's process died.
        ActorStartError: it died of an error that it raised as it was made.
        LostObjectError: the value, or something it was to be made from, died with the process that owned it.
        AgonError: the remote side raised one; it is passed on as itself.
    """
    with waiting(what=what, knob=knob, deadline_s=deadline_s, refs=_listed(ref)):
        return _get(ref, what=what, deadline_s=deadline_s, left_s=deadline_s, knob=knob)


def fetch_with_progress(
    ref: Any, *, what: str, deadline_s: float, knob: str, on_tick: Callable[[], None], tick_s: float = 0.5
) -> Any:
    """Like `fetch`, and calls `on_tick` about every `tick_s` seconds while waiting."""
    end = time.monotonic() + deadline_s
    with waiting(what=what, knob=knob, deadline_s=deadline_s, refs=[ref]):
        while (left := end - time.monotonic()) > 0:
            ready, _ = ray.wait([ref], timeout=min(tick_s, left))
            if ready:
                break
            on_tick()
        left_s = max(0.001, end - time.monotonic())
        return _get(ref, what=what, deadline_s=deadline_s, left_s=left_s, knob=knob)


def last_words(error: Exception) -> str:
    """The line of a remote traceback that says what went wrong, and the lines that go on with it."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _ADDRESS.fullmatch(line)]
    start = max((index for index, line in enumerate(lines) if _RAISED.match(line)), default=len(lines) - 1)
    words = " ".join(lines[max(start, 0) :][:_LAST_LINES])
    return words.partition(_GUESSES)[0].rstrip() or repr(error)


def unwrap(error: RayTaskError, what: str) -> Exception:
    """The project's own error behind a Ray task error, or the Ray error with its remote stack.

    Args:
        error: as Ray raised it; an object that was lost on the way to the task becomes a LostObjectError.
        what: what the task was to do.
    """
    cause: Exception = error.cause
    if isinstance(cause, ObjectLostError):
        return lost(cause, what)
    return cause if isinstance(cause, AgonError) else error


def lost(error: ObjectLostError, what: str) -> LostObjectError:
    """The project's own error for bytes that nobody has any more."""
    # Ray does not say which of a task's arguments was lost.
    name = "an argument" if set(error.object_ref_hex) == {"f"} else f"object {error.object_ref_hex}"
    return LostObjectError(
        f"{what}: {name} died with the process or node that owned it"
        f" ({type(error).__name__}); whoever has its source must make it again"
    )


def _get(ref: Any, *, what: str, deadline_s: float, left_s: float, knob: str) -> Any:
    end = time.monotonic() + left_s
    try:
        while may_be_unwanted() and (left := end - time.monotonic()) > 0:
            check_wanted()
            refs = _listed(ref)
            if len(ray.wait(refs, num_returns=len(refs), timeout=min(_GLANCE_S, left))[0]) == len(refs):
                break
        return ray.get(ref, timeout=max(0.0, end - time.monotonic()))
    except RayTaskError as error:  # first: Ray gives it the class of its cause as a second parent
        raise unwrap(error, what) from None
    except DEATHS as error:
        at_start = isinstance(error, NO_START) or getattr(error, "actor_init_failed", False)
        kind = ActorStartError if at_start else ActorLostError
        raise kind(f"{what}: its process died: {last_words(error)}") from error
    except ObjectLostError as error:
        raise lost(error, what) from error
    except GetTimeoutError:
        named = ", ".join(map(str, owners(_listed(ref))))
        raise DeadlineError(
            f"{what}: no answer within {deadline_s:g} s{f' from {named}' * bool(named)}. Raise {knob} if the work is"
            " really that long, else look at the actor's log (`ray logs`, or the run's Ray folder)."
        ) from None


def _listed(ref: Any) -> list[Any]:
    return ref if isinstance(ref, list) else [ref]
