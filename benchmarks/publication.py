"""Publishing 100M parameters to a generator of the same node, proof included, against copying the bytes once.

    python -m benchmarks.publication

`agon` is all that stands between the end of training and a generator that answers with the new weights: copy with
checksums and, meanwhile, a sign of life of the generator, adopt, read back, compare. Weights change between two
publications. `memcpy` copies the same bytes from one array to another, both touched before. The probe sequence, whose
log-probs under the learner's weights a generator must reproduce, is scored by the learner as training ends and by a
generator until weights that differ enough have agreed: neither is in the figures. `floor` is what is left without
processes and calls: the bytes copied once, to where both see them, and summed up twice (as they leave, and where they
arrived), by two threads.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import xxhash
from numpy.typing import NDArray

from actors.generator import Generator
from benchmarks.models import make_llama
from benchmarks.report import Comparison, in_turn, of_medians, report, seconds
from conf.compose import compose
from launch.environment import KEEPS_MEMORY
from launch.placement import start_learner, start_ray
from launch.wiring import PROBE_TOKENS
from orchestrator.types import PolicyVersion
from orchestrator.weights import copy_and_sum_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from learners.learner import Learner

Bytes = NDArray[np.uint8]
WAIT_S = 600.0
PROBE = tuple(range(3, 3 + PROBE_TOKENS))


def start_actors(model: Path) -> tuple[Any, Any]:
    """A learner and a generator of a run."""
    config = compose([f"model={model}", "learner.num_threads=2"])
    learner = start_learner(config, model_dir=str(model), probe_token_ids=PROBE, seeds=())
    options = {"dtype": "float32", "max_length": 256, "max_num_seqs": 8, "kv_cache_mb": 256}
    rest = {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1, "seed": 0, "model_dir": str(model)}
    environment = {"env_vars": KEEPS_MEMORY | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}}
    generator = (
        ray.remote(Generator)
        .options(num_cpus=1, runtime_env=environment)
        .remote("generator-0", "vllm", options | rest, PolicyVersion(number=0, digest="0" * 16))
    )
    ray.get([learner.ready.remote(), generator.ready.remote()], timeout=WAIT_S)
    return learner, generator


def train(learner: Learner) -> float:
    """Changes all weights, and scores the probe, as a step of the learner does; returns the seconds of the latter."""
    with torch.no_grad():
        for parameter in learner._trainer.policy.model.parameters():
            parameter.mul_(1.02)
    learner._probe = None
    return seconds(lambda: learner._alone(learner._score_probe))


def published(learner: Any, generator: Any, node: str, numbers: Iterator[int], probes: list[float]) -> float:
    """Seconds of what `Publisher.publish` waits for, with other weights each time; adds to `probes`."""
    probes.append(ray.get(learner.__ray_call__.remote(train), timeout=WAIT_S))
    return seconds(partial(publish, learner, generator, node, numbers))


def publish(learner: Any, generator: Any, node: str, numbers: Iterator[int]) -> None:
    """See `published`."""
    publishing = learner.publish.remote(next(numbers), [generator], [node], WAIT_S)
    ray.get(generator.ready.remote(), timeout=WAIT_S)
    publication = ray.get(publishing, timeout=WAIT_S)
    ray.get(generator.update_weights.remote(publication, WAIT_S), timeout=WAIT_S)


def copied_and_proved(source: Bytes, target: Bytes) -> None:
    """With a checksum of what is copied, and of what came out."""
    edges = np.linspace(0, len(source), 17, dtype=int)
    parts = list(pairwise(edges.tolist()))

    def copy(part: tuple[int, int]) -> None:
        copy_and_sum_up(target[slice(*part)], source[slice(*part)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(copy, parts))
        list(pool.map(lambda part: xxhash.xxh3_64_hexdigest(target[slice(*part)].data), parts))


def main() -> int:
    """Measures and keeps the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama(Path(folder) / "model", hidden=768, layers=11, heads=12)
        size = (model / "model.safetensors").stat().st_size
        start_ray(compose(["cluster.num_cpus=4", "cluster.object_store_mb=256"]))
        node = ray.get_runtime_context().get_node_id()
        actors = start_actors(model)
        numbers = count(1)
        probes: list[float] = []
        published(*actors, node, numbers, probes)
        source, target = (np.full(size, value, np.uint8) for value in range(2))
        taken = in_turn(
            {
                "agon": partial(published, *actors, node, numbers, probes),
                "floor": partial(seconds, partial(copied_and_proved, source, target)),
                "memcpy": partial(seconds, partial(np.copyto, target, source)),
            },
            repetitions=15,
        )
        ray.shutdown()
    return report(
        Comparison(
            key="publication_vs_memcpy",
            title="Publication of weights on one node against one copy of the bytes",
            unit="s",
            sides=taken | {"probe, beforehand": probes[2:]},
            ratio=of_medians(taken["agon"], taken["memcpy"]),
            most=2.5,
            notes=(
                f"{size / 2**20:.0f} MiB in float32, one generator. Bytes are copied, summed up as they leave and where"
                " they arrived, and compared. Not in the ratio: the learner scores a probe of 16 tokens as training"
                " ends, before it is asked for its weights; generators tried theirs in the publications before."
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
