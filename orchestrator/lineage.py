"""Which policies a run has promoted, for as far back as its stages need them: it does not grow with the run."""

from __future__ import annotations

from collections import deque
from copy import copy
from typing import TYPE_CHECKING

import xxhash

from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Iterable

    from conf.schema import ReferenceConfig


class Lineage:
    """The promoted policies of a run, the initial model first.

    Args:
        reference: what the pairs of an iteration are trained against.
        max_staleness: how many policies before the current one may have sampled what it is trained on.
        versions: those promoted so far; an iteration that promoted none repeats the one before.
    """

    def __init__(
        self, reference: ReferenceConfig, *, max_staleness: int, versions: Iterable[PolicyVersion] = ()
    ) -> None:
        self._kind = reference.kind
        self._first: PolicyVersion | None = None
        self._latest: deque[PolicyVersion] = deque(maxlen=max_staleness + 1)
        self._chain = xxhash.xxh3_64(f"ema {reference.ema_decay!r}".encode())
        for version in versions:
            self.add(version)

    def add(self, version: PolicyVersion) -> None:
        """Notes the policy that an iteration left."""
        if self._latest and version == self._latest[-1]:
            return
        self._first = self._first or version
        self._latest.append(version)
        self._chain.update(f":{version.digest}".encode())

    def after(self, version: PolicyVersion) -> Lineage:
        """What this one is once `version` is added."""
        other = copy(self)
        other._latest, other._chain = self._latest.copy(), self._chain.copy()
        other.add(version)
        return other

    @property
    def latest(self) -> tuple[PolicyVersion, ...]:
        """Those that may have sampled what is trained on next, the current one last."""
        return tuple(self._latest)

    @property
    def reference(self) -> PolicyVersion:
        """The identity of the loss reference of the iteration that starts from the current one.

        Raises RuntimeError before the first is known.
        """
        if self._first is None:
            raise RuntimeError("no policy was promoted yet")
        current = self._latest[-1]
        if self._kind == "initial":
            return self._first
        if self._kind == "previous":
            return current
        return PolicyVersion(number=current.number, digest=self._chain.hexdigest())
