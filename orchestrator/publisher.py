"""Weights from the learner to every generator, and to each one that joins later."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.errors import LostObjectError, UnsettledError, WeightsLostError
from orchestrator.remote import fetch

if TYPE_CHECKING:
    from collections.abc import Callable

    from conf.schema import ClusterConfig
    from orchestrator.accounts import Accounts
    from orchestrator.rollouts import Roles
    from orchestrator.types import PolicyVersion
    from orchestrator.weights import Publication

_GLANCE_S = 0.5
_KNOB = "cluster.publish_deadline_s"


class Publisher:
    """Keeps the current publication alive and brings generators up to date."""

    def __init__(self, roles: Roles, accounts: Accounts, cluster: ClusterConfig) -> None:
        self._roles = roles
        self._accounts = accounts
        self._deadline_s = cluster.publish_deadline_s
        self._is_sent = cluster.weight_transport != "object_store"
        """Whether the learner sends to each generator (NCCL, IPC), and leaves no bytes to be read."""
        self._current: Publication | None = None
        self._shares = True
        """Whether the learner's memory is tried; not any more once it lived and nobody could read it."""
        self._bare: list[Any] = []
        """Generators that were started during a publication, which is to give them their first weights."""
        roles.generators.on_start = self._bring_up_to_date

    @property
    def is_published(self) -> bool:
        """Whether generators hold any weights."""
        return self._current is not None

    @property
    def version(self) -> PolicyVersion:
        """The weights that generators hold. Raises RuntimeError before the first publication."""
        if self._current is None:
            raise RuntimeError("no weights were published yet")
        return self._current.version

    def publish(self, number: int, iteration: int) -> PolicyVersion:
        """Publishes the learner's weights as version `number`; returns once every generator has proved to hold them.

        Raises:
            PublicationError: one does not.
            DeadlineError: one did not answer.
            UnsettledError: the learner died that held them.
        """
        with self._roles.generators.still:
            before, self._bare = self._current, []
            try:
                version = self._roles.learner.surviving(lambda: self._publish(number))
            except UnsettledError as error:
                self._current = before  # whoever is started now has to wait for the next ones
                self._roles.generators.vacate(self._bare, error)  # and so has who was started meanwhile
                raise
            self._roles.learner.now_at(number)
        self._accounts.publish(version, iteration)
        return version

    def _publish(self, number: int) -> PolicyVersion:
        self._current = None  # whoever is started now need not be given what is about to be replaced
        return self._send_to(self._load, number).version

    def _load(self, publication: Publication) -> None:
        self._roles.generators.broadcast(
            lambda actor: actor.update_weights.remote(publication, self._deadline_s),
            what=f"load weights {publication.version}",
            deadline_s=self._deadline_s,
            knob=_KNOB,
        )

    def _send_to(self, load: Callable[[Publication], None], number: int) -> Publication:
        """Through shared memory; where that cannot be read (a container may hide it), another way from then on.

        Raises:
            ActorLostError: the learner died, and its memory with it.
        """
        publication = self._send(number, share=self._shares)
        try:
            load(publication)
        except LostObjectError:
            if publication.shared is None:
                raise
            publication = self._send(number, share=False)
            load(publication)
            self._shares = False
        return publication

    def _send(self, number: int, *, share: bool) -> Publication:
        learner, generators = self._roles.learner, self._roles.generators
        # Whoever died since they were asked last is replaced before: NCCL waits for all whom it was told of, and who is
        # brought up to date may have it all published anew. Bytes that are to replace what there is are laid out
        # meanwhile: that takes no receiver. Where a new one is decides whether it can read them.
        before = self._is_sent or self._current is not None
        if before:
            self._replace_dead()
        while True:
            nodes = generators.nodes
            publishing = learner.actor.publish.remote(
                number, generators.actors, nodes if share else None, self._deadline_s
            )
            if not before:
                self._replace_dead()
            publication: Publication = fetch(
                publishing,
                what=f"learner: publish weights v{number}",
                deadline_s=self._deadline_s,
                knob=_KNOB,
            )
            if publication.shared is None or generators.nodes == nodes:
                self._current = publication
                return publication

    def _replace_dead(self) -> None:
        self._roles.generators.broadcast(
            lambda actor: actor.ready.remote(), what="sign of life", deadline_s=self._deadline_s, knob=_KNOB
        )

    def _bring_up_to_date(self, actor: Any) -> None:
        """A generator that starts after the first publication gets the current one before it answers anything.

        Raises:
            ActorLostError: it died.
            WeightsLostError: nobody has them any more: it has to wait for the next ones.
        """
        current, learner = self._current, self._roles.learner
        if current is None:
            self._bare.append(actor)
            return
        try:
            if not current.is_packed:
                raise LostObjectError("nothing is kept of weights that were sent by NCCL or IPC")
            self._update(actor, current)
        except LostObjectError as error:
            # NCCL and IPC send to all and make them wait for the proof.
            load = partial(self._update, actor) if current.is_packed else self._load
            # Whoever trains the learner may wait for what this thread is making: it is not waited for in turn.
            while self._can_give_again():
                if learner.alone.acquire(timeout=_GLANCE_S):
                    try:
                        if not self._can_give_again():
                            break
                        learner.surviving(lambda: self._send_to(load, current.version.number))
                        return
                    finally:
                        learner.alone.release()
            lost = f"weights {current.version} are lost, and the learner has gone on from them: {error}"
            raise WeightsLostError(lost) from error

    def _can_give_again(self) -> bool:
        """Whether the learner still is what was published last."""
        return not self._roles.learner.has_moved

    def _update(self, actor: Any, publication: Publication) -> None:
        fetch(
            actor.update_weights.remote(publication, self._deadline_s),
            what="generator: bring up to date",
            deadline_s=self._deadline_s,
            knob=_KNOB,
        )
