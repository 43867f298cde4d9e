"""The queue of preference batches against the bare object store, and against `ray.util.queue.Queue`.

    python -m benchmarks.queue_bandwidth

One process makes batches of 10 MB, another reads every byte of them. `queue` is the learner's path: put into the object
store, hand references over while the next batches are put there, lease, read, acknowledge. `raw` passes the reference
as an argument of a call. `ray queue` carries the same pairs as pickled Python objects, as one would without packing.
`queue, packing` makes each batch out of such objects first, which takes longer than to carry it.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.queue import Queue

from benchmarks.report import Comparison, in_turn, of_medians, report
from conf.schema import PipelineConfig
from orchestrator.batching import pack
from orchestrator.queues import BatchQueue
from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferenceBatch, PreferencePair, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH_BYTES = 10_000_000
BATCHES = 30
CAPACITY = PipelineConfig().queue_capacity
"""Of the queues."""
PENDING = (4, CAPACITY)
"""Batches on their way without a queue; the ratio is to the faster one."""
PAIRS = 512
VERSION = PolicyVersion(number=0, digest="0" * 16)
WAIT_S = 120.0


def make_pairs() -> list[PreferencePair]:
    """Pairs whose packed columns take about `BATCH_BYTES`, at 8 bytes a token: ids and reference log-probs."""
    random = np.random.default_rng(0)
    length = BATCH_BYTES // (8 * 2 * PAIRS)

    def completion() -> Completion:
        return Completion(
            token_ids=tuple(random.integers(0, 32000, length).tolist()),
            text="",
            logprobs=tuple(random.random(length).tolist()),
            finish_reason=FinishReason.EOS,
            policy=VERSION,
        )

    return [
        PreferencePair(
            id=f"1/{number}/0>1",
            prompt=Prompt(id=str(number), text="", token_ids=(number,)),
            chosen=completion(),
            rejected=completion(),
            chosen_score=1.0,
            rejected_score=0.0,
            iteration=1,
            reference=VERSION,
            scorer="random",
        )
        for number in range(PAIRS)
    ]


def read(batch: PreferenceBatch) -> int:
    """Touches every byte of the large columns."""
    return int(batch.tokens.sum()) + int(batch.reference_logprobs.sum() if batch.reference_logprobs is not None else 0)


@ray.remote(num_cpus=0)
class Consumer:
    """The learner's side."""

    def meet(self, queue: BatchQueue) -> int:
        """Connects to a queue, as every learner has long before its first batch."""
        return queue.size()

    def drain_queue(self, queue: BatchQueue, count: int) -> int:
        """Leases, reads and acknowledges `count` batches."""
        done: list[int] = []
        total, left = 0, count
        while left:
            leases = queue.lease(timeout_s=WAIT_S, duration_s=WAIT_S, done=done)
            assert leases
            total += sum(map(read, ray.get([lease.item for lease in leases])))
            done = [lease.id for lease in leases]
            left -= len(leases)
        queue.acknowledge(done)
        return total

    def read_one(self, batch: PreferenceBatch) -> int:
        """Reads a batch that came as an argument."""
        return read(batch)

    def drain_ray_queue(self, queue: Queue, count: int) -> int:
        """Takes `count` lists of pairs; to pack them, which our batches were before, is nobody's in the figures."""
        return sum(len(pair.chosen.token_ids) for _ in range(count) for pair in queue.get(timeout=WAIT_S))


def through_queue(consumer: Any, make: Callable[[], PreferenceBatch], size: float) -> float:
    """MB/s."""
    queue = BatchQueue.create(CAPACITY, deadline_s=WAIT_S)
    queue.wait_ready(WAIT_S)
    ray.get(consumer.meet.remote(queue))
    start = time.perf_counter()
    drained = consumer.drain_queue.remote(queue, BATCHES)
    refs: list[Any] = []
    before: tuple[int, Any] | None = None
    for number in range(BATCHES):
        refs.append(ray.put(make()))
        if len(refs) < queue.at_once and 0 < number < BATCHES - 1:
            continue
        if before is not None and queue.taken(before[1], timeout_s=WAIT_S) < before[0]:
            raise TimeoutError("the queue did not take a batch")
        before, refs = (len(refs), queue.offer(refs, timeout_s=WAIT_S)), []
    ray.get(drained)
    rate = size * BATCHES / (time.perf_counter() - start)
    queue.end()
    return rate


def through_store(consumer: Any, batch: PreferenceBatch, size: float, at_most: int) -> float:
    """MB/s."""
    start = time.perf_counter()
    pending: list[Any] = []
    for _ in range(BATCHES):
        pending.append(consumer.read_one.remote(ray.put(batch)))
        if len(pending) == at_most:
            ray.get(pending.pop(0))
    ray.get(pending)
    return size * BATCHES / (time.perf_counter() - start)


def through_ray_queue(consumer: Any, pairs: list[PreferencePair], size: float) -> float:
    """MB/s of the packed columns that come out."""
    count = 2
    queue = Queue(maxsize=CAPACITY, actor_options={"num_cpus": 0})
    queue.qsize()  # it is up
    start = time.perf_counter()
    drained = consumer.drain_ray_queue.remote(queue, count)
    for _ in range(count):
        queue.put(pairs, timeout=WAIT_S)
    ray.get(drained)
    rate = size * count / (time.perf_counter() - start)
    queue.shutdown(force=True)
    return rate


def main() -> int:
    """Measures and keeps both ratios."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=1 << 30, logging_level="ERROR")
    pairs = make_pairs()
    make = partial(pack, pairs, sampled_reference=True)
    batch = make()
    size = (batch.tokens.nbytes + 4 * batch.num_completion_tokens) / 1e6
    consumer = Consumer.remote()  # type: ignore[attr-defined]
    sides = in_turn(
        {
            "queue": partial(through_queue, consumer, lambda: batch, size),
            **{f"raw, {count}": partial(through_store, consumer, batch, size, count) for count in PENDING},
            "queue, packing": partial(through_queue, consumer, make, size),
            "ray queue": partial(through_ray_queue, consumer, pairs, size),
        }
    )
    ray.shutdown()
    notes = (
        f"Batches of {size:.1f} MB ({PAIRS} pairs), one producer and one consumer. The queues hold {CAPACITY} batches;"
        " without one, as many are on their way as the row says."
    )
    packages = ("ray", "numpy")
    raw = Comparison(
        key="queue_vs_raw",
        title="Queue of batches against bare `ray.put` and `ray.get`",
        unit="MB/s",
        sides={name: values for name, values in sides.items() if name == "queue" or name.startswith("raw")},
        ratio=min(of_medians(sides["queue"], values) for name, values in sides.items() if name.startswith("raw")),
        least=0.8,
        notes=notes,
    )
    pickled = Comparison(
        key="queue_vs_ray_queue",
        title="Queue of packed batches against `ray.util.queue.Queue` of pickled pairs",
        unit="MB/s",
        sides={name: sides[name] for name in ("queue", "queue, packing", "ray queue")},
        ratio=of_medians(sides["queue"], sides["ray queue"]),
        least=20,
        notes=f"{notes} What either queue carries is there before the clock starts, but in the row that packs.",
    )
    return max(report(raw, packages=packages), report(pickled, packages=packages))


if __name__ == "__main__":
    sys.exit(main())
