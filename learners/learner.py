"""The learner: a Ray actor around a `Trainer`. It takes batches from the queue and gives versions of the weights."""

from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray

from actors.vllm_transfer import WeightSender
from orchestrator.errors import DeadlineError, TrainingError
from orchestrator.remote import fetch
from orchestrator.shared_memory import SharedSlots
from orchestrator.stacks import Observable
from orchestrator.startup import uncollected
from orchestrator.weights import Probe, Publication, checksums, pack, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
    from learners.checkpoint import State
    from orchestrator.queues import BatchQueue
    from orchestrator.shared_memory import SharedArray
    from orchestrator.types import Completion, PreferenceBatch, Prompt, SeedSequence, UpdateResult
    from orchestrator.weights import TensorRecord

Result = TypeVar("Result")

_PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest allowed difference of a token's log-prob between two engines. Two orders of summation through 24 layers were
seen to differ by 1.2e-4 in float32 and by 0.5 in bfloat16 (benchmarks/RESULTS.md); wrong weights, by whole units."""


class Learner(Observable):
    """Created with ``max_concurrency=4``: `progress` and `saved` answer while others run, which exclude each other."""

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: str,
        loss: LossConfig,
        reference: ReferenceConfig,
        learner: LearnerConfig,
        keep_initial: bool,
        probe_token_ids: tuple[int, ...],
        weight_transport: str,
        workers_per_receiver: int,
        seeds: Sequence[SeedSequence],
        seed: int,
    ) -> None:
        # Here, since the controller, which has to know this class, needs nothing of them.
        with uncollected():
            from learners.saving import Saver
            from learners.trainer import Trainer

        self._thread = ThreadPoolExecutor(1, "computes")
        self._steps_done = 0
        self._step_deadline_s = learner.step_deadline_s
        self._saver = Saver(learner.step_deadline_s)
        self._publish_deadline_s = 0.0
        self._probe_token_ids = probe_token_ids
        self._probe: Probe | None = None
        """Of the weights as they are; None: not scored yet."""
        self._dtype = dtype
        self._transport = weight_transport
        self._workers_per_receiver = workers_per_receiver
        self._slots = SharedSlots()
        self._shared: int | None = None
        """Number of the version that was shared last."""
        self._receivers: list[Any] = []
        self._sender: WeightSender | None = None
        self._results: dict[int, UpdateResult] = {}
        """Of batches of the iteration, by number, that were consumed since the state that was loaded last."""
        make = partial(
            Trainer,
            model_dir=model_dir,
            dtype=dtype,
            loss=loss,
            reference=reference,
            learner=learner,
            keep_initial=keep_initial,
            seeds=seeds,
            seed=seed,
        )
        self._trainer = self._alone(make)

    def ready(self) -> int:
        """The process id, once the model is loaded."""
        return os.getpid()

    def packing_refused(self) -> str | None:
        """Why the model's completions are scored in padded rows; None when they are packed."""
        return self._trainer.policy.packing_refused

    def progress(self) -> int:
        """Optimizer steps done in the current call of `train`."""
        return self._steps_done

    def begin_iteration(self, iteration: int, total_steps: int, version: int) -> int:
        """Moves the reference if it is one that moves, and starts the learning-rate schedule.

        Changes nothing of an iteration under way. Returns how many of its batches are done. `version` is the policy's
        that the iteration begins with, from which staleness is counted.
        """

        def begin() -> int:
            self._trainer.version = version
            if iteration != self._trainer.iteration:
                self._results.clear()
            return self._trainer.begin_iteration(iteration, total_steps)

        return self._alone(begin)

    def train(self, queue: BatchQueue, start: int, end: int, *, acknowledged: int) -> list[UpdateResult]:
        """Consumes batches of the iteration from the queue until `end` of them are done, each once.

        A batch that comes again, because its lease ran out or the queue was filled anew, is acknowledged and dropped.
        The reference scores each completion when it is first seen; later epochs of the iteration reuse its log-probs.

        Args:
            queue: holds those that are not done, in order.
            start: number of the first batch whose result is asked for; it may be done already.
            end: number behind the last one.
            acknowledged: batches that count; what the others did may be asked for again.

        Returns:
            What each of the batches from `start` on did, those that an earlier call consumed included.

        Raises:
            TrainingError: too many batches of the iteration were skipped; it has the results from `start` on.
            DeadlineError: no batch came.
            ActorLostError: the queue died. What was consumed before counts: call again with another queue.
            RuntimeError: a batch is missing in the queue.
        """
        return self._alone(lambda: self._train(queue, start, end, acknowledged))

    def _train(self, queue: BatchQueue, start: int, end: int, acknowledged: int) -> list[UpdateResult]:
        self._steps_done = 0
        self._results = {number: result for number, result in self._results.items() if number >= acknowledged}
        done: list[int] = []
        while self._trainer.batches_done < end:
            duration_s = self._step_deadline_s * queue.at_once
            leases = queue.lease(timeout_s=self._step_deadline_s, duration_s=duration_s, done=done)
            if not leases:
                raise DeadlineError(f"learner: no batch in the queue within {self._step_deadline_s:g} s")
            done = []  # one whose lease ran out meanwhile comes again, and is dropped then
            for lease, batch in zip(leases, self._read([lease.item for lease in leases]), strict=True):
                if self._trainer.batches_done < end:
                    self._consume(batch)
                    done.append(lease.id)
                else:
                    queue.redeliver(lease.id)
        if done:
            queue.acknowledge(done)
        self._score_probe()  # now: in async mode generators are at work, and a publication makes them wait
        return [self._results[number] for number in range(start, end)]

    def _read(self, references: list[Any]) -> list[PreferenceBatch]:
        """In place, in the object store."""
        batches: list[PreferenceBatch] = fetch(
            references,
            what="learner: batches out of the queue",
            deadline_s=self._step_deadline_s,
            knob="learner.step_deadline_s",
        )
        return batches

    def _consume(self, batch: PreferenceBatch) -> None:
        if self._is_next(batch):
            self._probe = None
            self._results[batch.number] = self._update(batch)
            self._steps_done += 1

    def _update(self, batch: PreferenceBatch) -> UpdateResult:
        try:
            with self.spans.during("reference"):
                annotated = self._trainer.annotate(batch)
            with self.spans.during("step"):
                return self._trainer.update(annotated)
        except TrainingError as error:
            raise TrainingError(str(error), (*self._results.values(), *error.results)) from error

    def _is_next(self, batch: PreferenceBatch) -> bool:
        """False of one that was consumed before. Raises RuntimeError of one whose turn it is not yet."""
        found, due = (batch.iteration, batch.number), (self._trainer.iteration, self._trainer.batches_done)
        if found > due:
            raise RuntimeError(
                f"the queue gave batch {found[1]} of iteration {found[0]} where batch {due[1]} of iteration {due[0]}"
                " was due: batches in between were lost"
            )
        return found == due

    def publish(
        self, number: int, receivers: Sequence[Any], nodes: Collection[str] | None, deadline_s: float
    ) -> Publication:
        """Makes the weights version `number`: lays them where receivers find them, or sends them.

        Args:
            number: of the version.
            receivers: the generators.
            nodes: ids of the nodes that they are on; None: memory is not shared.
            deadline_s: `cluster.publish_deadline_s`.

        Raises:
            DeadlineError: a receiver has not got them within `deadline_s`.
        """
        return self._alone(lambda: self._publish(number, receivers, nodes, deadline_s), "publish")

    def _publish(
        self, number: int, receivers: Sequence[Any], nodes: Collection[str] | None, deadline_s: float
    ) -> Publication:
        self._trainer.version = number
        tensors, buckets, shared = self._trainer.named_tensors(), (), None
        if self._transport != "object_store":
            self._publish_deadline_s = deadline_s
            self._send(receivers)
            records = checksums(tensors)
        elif nodes is not None and set(nodes) <= {ray.get_runtime_context().get_node_id()}:
            if number == self._shared:  # not everyone may have got it, and gone on from the one before
                self._slots.leave()
            self._shared = number
            records, shared = self._share(tensors)
        else:
            records, packed = pack(tensors)
            buckets = tuple(ray.put(bucket) for bucket in packed)
        version = version_of(number, records)
        return Publication(version=version, records=records, buckets=buckets, shared=shared, probe=self._score_probe())

    def _share(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[TensorRecord, ...], SharedArray]:
        """Copies tensors to where every process of the node can read them."""
        places: list[SharedArray] = []

        def allocate(sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
            array, place = self._slots.take(*sizes)
            places.append(place)
            return [array]

        records, _ = pack(tensors, bucket_bytes=sys.maxsize, allocate=allocate)
        return records, places[0]

    def _send(self, receivers: Sequence[Any]) -> None:
        """Over vLLM's weight transfer; a group is formed anew when a generator was replaced."""
        if self._sender is None or self._receivers != list(receivers):
            if self._sender is not None:
                self._sender.close()
            self._receivers = list(receivers)
            self._sender = WeightSender(
                backend=self._transport,
                tensors=self._trainer.named_tensors,
                call=self._call_receivers,
                num_receivers=len(receivers),
                workers_per_receiver=self._workers_per_receiver,
                master_address=ray.util.get_node_ip_address(),
                master_port=_free_port(),
            )
        self._sender.send()

    def _call_receivers(self, method: str, payloads: Sequence[dict[str, Any]]) -> None:
        pairs = zip(self._receivers, payloads, strict=True)
        fetch(
            [actor.transfer.remote(method, payload) for actor, payload in pairs],
            what=f"generators: {method} weights over {self._transport}",
            deadline_s=self._publish_deadline_s,
            knob="cluster.publish_deadline_s",
        )

    def kl_to_initial(self, samples: Sequence[tuple[Prompt, Completion]]) -> float:
        """KL(policy || initial model) per completion, nats, estimated on completions the policy sampled."""
        return self._alone(lambda: self._trainer.kl_to_initial(samples), "KL")

    def reference_logprobs(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[NDArray[np.float32]] | None:
        """See `Trainer.reference_logprobs`."""
        return self._alone(lambda: self._trainer.reference_logprobs(sequences), "reference")

    def save(self, folder: str) -> None:
        """Copies the state, which is then written while training goes on; `saved` tells when it is durable."""
        self._saver.save(folder, self._copied_state)

    def saved(self, folder: str) -> str:
        """Waits until a checkpoint is durable, and returns the digest of its manifest; see `Saver.saved`."""
        return self._saver.saved(folder)

    def load(self, folder: str, version: int) -> int:
        """Goes on from what `save` wrote.

        Args:
            folder: a checkpoint.
            version: number of the policy version last published, from which staleness is counted.

        Returns:
            The batches consumed in the run so far.
        """

        def restore() -> int:
            self._saver.wait()
            self._probe = None
            self._trainer.load(folder)
            self._trainer.version = version
            return self._trainer.step

        return self._alone(restore)

    def export(self, model_dir: str, checkpoint: str | None, dtype: str, folder: str) -> None:
        """See `learners.export.write_model`."""
        from learners.export import write_model

        write_model(model_dir, checkpoint, dtype, folder)

    def _copied_state(self) -> State:
        return self._alone(lambda: self._trainer.state().copy(), "copy state")

    def _alone(self, work: Callable[[], Result], what: str | None = None) -> Result:
        """Does it in the one thread that computes, after what came before; `what` it does is noted.

        OpenMP gives every thread that computes a team of its own. Teams that together are larger than the machine sleep
        between two loops instead of spinning: with a second one an optimizer step was seen to take twice as long.
        """

        def job() -> Result:
            with self.spans.during(what) if what else nullcontext():
                return work()

        return self._thread.submit(job).result()

    def _score_probe(self) -> Probe:
        """Under the weights as they are; once for each state of them."""
        if self._probe is None:
            logprobs: Any = np.asarray(self._trainer.score([self._probe_token_ids])[0], dtype=np.float64)
            self._probe = Probe(
                token_ids=self._probe_token_ids,
                logprobs=tuple(float(value) for value in logprobs),
                tolerance=_PROBE_TOLERANCE[self._dtype],
            )
        return self._probe


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
