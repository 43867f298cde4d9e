"""Waiting for remote work, always with a deadline and a name."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from orchestrator.errors import ActorLostError, AgonError, DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

_RAISED = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(:|$)")
_ADDRESS = re.compile(r"([\w ]+ )?https?://\S+")
_LAST_LINES = 3


def fetch(ref: Any, *, what: str, deadline_s: float, knob: str) -> Any:
    """Returns the value of one reference, or of a list of them.

    Args:
        ref: a Ray object reference, or a list of them.
        what: what is waited for, with the role that works on it ("learner: optimizer step 12").
        deadline_s: seconds.
        knob: the configuration key that sets the deadline.

    Raises:
        DeadlineError: naming all three.
        ActorLostError: the actor's process died.
        AgonError: the remote side raised one; it is passed on as itself.
    """
    try:
        return ray.get(ref, timeout=deadline_s)
    except RayActorError as error:
        raise ActorLostError(f"{what}: its process died: {last_words(error)}") from error
    except GetTimeoutError:
        raise DeadlineError(
            f"{what}: no answer within {deadline_s:g} s. Raise {knob} if the work is really that long, else look at the"
            " actor's log (`ray logs`, or the run's Ray folder)."
        ) from None
    except RayTaskError as error:
        raise unwrap(error) from None


def last_words(error: RayActorError) -> str:
    """The line of a remote traceback that says what went wrong, and the lines that go on with it."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _ADDRESS.fullmatch(line)]
    start = max((index for index, line in enumerate(lines) if _RAISED.match(line)), default=len(lines) - 1)
    return " ".join(lines[max(start, 0) :][:_LAST_LINES]) or repr(error)


def unwrap(error: RayTaskError) -> Exception:
    """The project's own error behind a Ray task error, or the Ray error with its remote stack."""
    return error.cause if isinstance(error.cause, AgonError) else error


def fetch_with_progress(
    ref: Any, *, what: str, deadline_s: float, knob: str, on_tick: Callable[[], None], tick_s: float = 0.5
) -> Any:
    """Like `fetch`, and calls `on_tick` about every `tick_s` seconds while waiting."""
    end = time.monotonic() + deadline_s
    while (left := end - time.monotonic()) > 0:
        ready, _ = ray.wait([ref], timeout=min(tick_s, left))
        if ready:
            break
        on_tick()
    return fetch(ref, what=what, deadline_s=max(0.001, end - time.monotonic()), knob=knob)
