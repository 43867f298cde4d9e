"""One tree of errors. Every message says what was found, where, and what to change.

    AgonError
    +-- UserError            bad input, found before any actor starts. Exit code 2.
    |   +-- ConfigError      a key or a value
    |   +-- DataError        a prompt file or a record in it
    |   +-- ModelError       a model folder, tokenizer or checkpoint
    |   +-- ResourceError    memory, disk, cluster resources
    +-- DeadlineError        a wait that ran out; names what was waited for. Exit code 1.
    +-- PublicationError     a generator that does not hold the published weights. Exit code 1.
    +-- ActorLostError       an actor whose process died. Exit code 1.
    +-- PoolError            actors that died more often than their restart budget allows. Exit code 1.
    +-- JudgeError           a judge that says next to nothing that can be used. Exit code 1.
    +-- TrainingError        a loss or gradient that is not finite. Exit code 1.
    +-- LostObjectError      bytes in the object store that died with the process that owned them. Exit code 1.
    +-- QueueClosedError     put or lease on a closed queue (control flow, never shown to users)

`kind_of` says whose fault an error is, and that decides what is done about it (docs/reliability.md):

    infrastructure    a process, node, disk or network: replaced, retried, moved, until its budget is used up
    data              a prompt, a batch, a judge's words: set aside, counted and reported, until there is too much of it
    user              a setting or file: refused, with the mend
    bug               anything else: the run stops with the traceback, and can be resumed

All are picklable (they cross actor boundaries): their arguments are the arguments of `Exception`.
"""

from __future__ import annotations

import sqlite3
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.types import UpdateResult


class AgonError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(AgonError):
    """Input that the user can mend."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that is refused."""


class DataError(UserError, ValueError):
    """A prompt file, or a record in it, that is refused."""


class ModelError(UserError, ValueError):
    """A model folder, tokenizer or checkpoint that is refused."""


class ResourceError(UserError, RuntimeError):
    """The plan needs more memory, disk or devices than there are."""


class DeadlineError(AgonError, TimeoutError):
    """A wait ran out; the message names what was waited for, since when, and what to change."""


class PublicationError(AgonError, RuntimeError):
    """A generator does not hold the published weights; the message names generator, tensor and version."""


class ActorLostError(AgonError, RuntimeError):
    """An actor's process died; whoever started it puts another in its place, for as long as its restarts last."""


class ActorStartError(ActorLostError):
    """An actor raised an error as it was made: another one would meet the same cause."""


class PoolError(AgonError, RuntimeError):
    """Actors of a pool died more often than the restart budget allows."""


class JudgeError(AgonError, RuntimeError):
    """A judge gave no verdict in more of its judgements than the configuration allows."""


class TrainingError(AgonError, RuntimeError):
    """The update produced a loss or gradient that is not finite.

    Args:
        message: what was found, and what to change.
        results: what the batches of the call did, the one that was too many last.
    """

    def __init__(self, message: str, results: tuple[UpdateResult, ...] = ()) -> None:
        super().__init__(message, results)
        self.results = results

    def __str__(self) -> str:
        return str(self.args[0])


class LostObjectError(AgonError, RuntimeError):
    """Bytes in the object store died with the process that owned them; whoever has the source makes them again."""


class WeightsLostError(LostObjectError):
    """Weights that an actor is to be given are nowhere any more: their learner died, and another has gone on."""


class UnsettledError(WeightsLostError):
    """The learner died before what it was trained on was on disk: whoever took its place is to be trained again."""


class QueueClosedError(AgonError, RuntimeError):
    """The queue was closed; nothing more will come or be accepted."""


class FailureKind(StrEnum):
    """Whose fault a failure is."""

    INFRASTRUCTURE = "infrastructure"
    DATA = "data"
    USER = "user"
    BUG = "bug"


_OF_DISKS = (OSError, sqlite3.OperationalError)
_INFRASTRUCTURE = (DeadlineError, ActorLostError, PoolError, LostObjectError, PublicationError, *_OF_DISKS)
_DATA = (JudgeError, TrainingError)


def kind_of(error: BaseException) -> FailureKind:
    """Whose fault `error` is."""
    if isinstance(error, UserError):
        return FailureKind.USER
    if isinstance(error, _DATA):
        return FailureKind.DATA
    if isinstance(error, _INFRASTRUCTURE):
        return FailureKind.INFRASTRUCTURE
    # What is raised on purpose and is nobody else's fault lies in what the run was given: prompts that make no pairs.
    return FailureKind.DATA if isinstance(error, AgonError) else FailureKind.BUG
