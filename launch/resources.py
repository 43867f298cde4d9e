"""What a plan needs of memory, disk and devices, and whether a machine has it.

Sizes are those of the parts as they are written (fp32 master weights, gradients, Adam's two moments, snapshots), plus
what their processes were seen to take. They are estimates; the learner's activations are the roughest of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.judging import TRAINED_KINDS, has_own_judge, own_language_model, pooled_kinds
from conf.roles import gpus_needed, roles
from launch import machines
from launch.model_files import count_parameters, find_model, inspect_model
from orchestrator.errors import ResourceError

if TYPE_CHECKING:
    from pathlib import Path

    from conf.schema import Config
    from launch.machines import Machine
    from launch.model_files import ModelShape

MIB, GIB = 1 << 20, 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
ENGINE_OVERHEAD = {"vllm": int(0.9 * GIB), "transformers": int(0.6 * GIB)}
"""A process that imported the engine, its weights and cache aside."""
RAY_OVERHEAD, CONTROLLER_OVERHEAD, LEARNER_OVERHEAD, SCORER_OVERHEAD = 512 * MIB, 400 * MIB, 512 * MIB, 128 * MIB
"""Seen: 0.4, 0.4, 0.3 to 0.6 and 0.1 GiB."""
KV_BLOCK = 128
"""Tokens of one block of vLLM's cache on a CPU."""
ROLLOUT_BYTES_PER_TOKEN = 12
"""Of a completion in Parquet: id, log-prob and some four characters, before compression."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One row of a plan.

    Example: ``Need(role="generator", what="2 x generator: weights in float32", each=3_200_000, count=2)``
    """

    role: str
    what: str
    each: int
    """Bytes."""
    count: int = 1
    keys: tuple[str, ...] = ()
    """Keys that make it smaller."""
    on_gpu: bool = False

    @property
    def bytes(self) -> int:
        """Of all of them together."""
        return self.count * self.each


def memory_plan(config: Config, shape: ModelShape) -> list[Need]:
    """Peak memory of every part of a run, bytes, in host memory and on GPUs."""
    generator = config.generator
    engines, on_gpu = generator.num_actors, generator.gpus_per_actor > 0
    smaller_cache = "generator.max_num_seqs" if generator.kind == "transformers" else "generator.kv_cache_mb"
    store = config.cluster.object_store_mb * MIB
    return [
        Need(role="ray", what="Ray: processes", each=RAY_OVERHEAD),
        Need(role="ray", what="Ray: object store", each=store, keys=("cluster.object_store_mb",)),
        Need(role="controller", what="controller: process", each=CONTROLLER_OVERHEAD),
        *_scorers(config),
        *_judge_engines(config, shape),
        Need(
            role="generator",
            what=f"{engines} x generator: process",
            each=ENGINE_OVERHEAD[generator.kind],
            count=engines,
            keys=("generator.num_actors",),
        ),
        Need(
            role="generator",
            what=f"{engines} x generator: weights in {config.model.dtype}",
            each=shape.num_parameters * BYTES[config.model.dtype],
            count=engines,
            keys=("generator.num_actors", "model.dtype"),
            on_gpu=on_gpu,
        ),
        Need(
            role="generator",
            what=f"{engines} x generator: KV cache",
            each=_kv_cache(config, shape),
            count=engines,
            keys=("generator.num_actors", "model.max_length" if on_gpu else smaller_cache),
            on_gpu=on_gpu,
        ),
        *_learner(config, shape),
    ]


def _scorers(config: Config) -> list[Need]:
    """Actors of each pooled kind; a trained model brings torch and its weights along."""
    count, needs = config.scorer.num_actors, []
    for kind in pooled_kinds(config):
        trained = kind in TRAINED_KINDS
        each = (LEARNER_OVERHEAD if trained else SCORER_OVERHEAD) + (_judge_bytes(config) if trained else 0)
        keys = ("scorer.num_actors",)
        needs.append(Need(role=kind, what=f"{count} x {kind}: process", each=each, count=count, keys=keys))
    return needs


def _judge_bytes(config: Config) -> int:
    """fp32 weights of the judge's own model; a tiny one is made when there is none."""
    if config.judge.model is None:
        return 0
    return count_parameters(find_model(config.judge.model, "judge.model")) * 4


def _judge_engines(config: Config, shape: ModelShape) -> list[Need]:
    """Engines of a judge's own."""
    if not has_own_judge(config):
        return []
    if (own := own_language_model(config)) is not None:
        shape = inspect_model(find_model(own, "judge.model"))
    count, kind, dtype = config.judge.num_actors, config.generator.kind, config.model.dtype
    size = shape.num_parameters * BYTES[dtype] + _kv_cache(config, shape)
    on_gpu = config.judge.gpus_per_actor > 0
    return [
        Need(
            role="judge",
            what=f"{count} x judge: process",
            each=ENGINE_OVERHEAD[kind],
            count=count,
            keys=("judge.num_actors",),
        ),
        Need(
            role="judge",
            what=f"{count} x judge: weights in {dtype} and KV cache",
            each=size,
            count=count,
            keys=("judge.num_actors", "judge.engine=policy"),
            on_gpu=on_gpu,
        ),
    ]


def _learner(config: Config, shape: ModelShape) -> list[Need]:
    learner, on_gpu = config.learner, config.learner.gpus > 0
    initial_too = config.evaluation.kl_prompts > 0 and config.reference.kind != "initial"
    snapshots = (config.reference.kind != "none") + initial_too
    cast = 2 if config.model.dtype == "bfloat16" else 0
    tokens = min(learner.micro_batch_tokens, 2 * learner.batch_pairs * config.model.max_length)
    saved = 8 * shape.hidden_size + 3 * shape.intermediate_size
    values = {
        "none": shape.num_layers * saved,
        "selective": shape.num_layers * (7 * shape.hidden_size + 2 * shape.intermediate_size) + saved,
        "full": shape.num_layers * shape.hidden_size + saved,
    }[learner.activation_checkpointing]
    logits = tokens * min(learner.vocab_chunk, shape.vocab_size) * 4
    logits += min(learner.logits_mb * MIB, tokens * shape.vocab_size * 4)  # at most: kept, beside a chunk
    activations = tokens * values * BYTES[config.model.dtype] + logits
    return [
        Need(role="learner", what="learner: process", each=LEARNER_OVERHEAD),
        Need(
            role="learner",
            what="learner: fp32 weights, gradients and Adam (16 B a parameter)",
            each=shape.num_parameters * (16 + cast),
            on_gpu=on_gpu,
        ),
        Need(
            role="learner",
            what="learner: reference and initial weights" if initial_too else "learner: reference weights",
            each=snapshots * shape.num_parameters * 4,
            keys=("evaluation.kl_prompts=0",) if initial_too else (),
            on_gpu=on_gpu,
        ),
        Need(
            role="learner",
            what=f"learner: activations of {tokens} tokens",
            each=activations,
            keys=("learner.micro_batch_tokens", "learner.activation_checkpointing=full"),
            on_gpu=on_gpu,
        ),
    ]


def kv_bytes_per_token(config: Config, shape: ModelShape) -> int:
    """Keys and values of one token in every layer, bytes."""
    return 2 * shape.num_layers * shape.kv_width * BYTES[config.model.dtype]


def kv_cache_mb_needed(config: Config, shape: ModelShape) -> int:
    """MiB that hold one sequence of the longest kind: vLLM refuses to start with less."""
    blocks = math.ceil(config.model.max_length / KV_BLOCK) + 1  # one block is always kept empty
    return math.ceil(blocks * KV_BLOCK * kv_bytes_per_token(config, shape) / MIB)


def _kv_cache(config: Config, shape: ModelShape) -> int:
    generator = config.generator
    if generator.kind == "vllm" and not generator.gpus_per_actor:
        return generator.kv_cache_mb * MIB
    if generator.kind == "vllm":
        return kv_cache_mb_needed(config, shape) * MIB  # the least; vLLM takes what is left of its share
    requests = config.pipeline.prompts_per_iteration * generator.samples_per_prompt / generator.num_actors
    together = min(generator.max_num_seqs, math.ceil(requests))
    return together * config.model.max_length * kv_bytes_per_token(config, shape)


def disk_plan(config: Config, shape: ModelShape) -> list[Need]:
    """What the run folder will hold at most, bytes."""
    pipeline, generator = config.pipeline, config.generator
    kept = min(pipeline.keep_checkpoints, pipeline.iterations) + 1  # the new one is whole before an old one goes
    checkpoint = shape.num_parameters * (12 if config.reference.kind in ("initial", "none") else 16)
    searched = config.search.kind != "none"
    samples = config.search.simulations if searched else generator.samples_per_prompt
    completions = pipeline.iterations * pipeline.prompts_per_iteration * samples * (2 if searched else 1)  # and trees
    rollouts = completions * generator.max_tokens * ROLLOUT_BYTES_PER_TOKEN
    return [
        Need(
            role="run folder",
            what=f"{kept} checkpoints",
            each=checkpoint,
            count=kept,
            keys=("pipeline.keep_checkpoints",),
        ),
        Need(
            role="run folder",
            what=f"rollouts: {completions} completions",
            each=rollouts,
            keys=("pipeline.prompts_per_iteration", "generator.samples_per_prompt"),
        ),
    ]


def table(needs: list[Need]) -> str:
    """The rows of a plan, biggest first, with the keys that make each smaller."""
    rows = sorted(needs, key=lambda need: -need.bytes)
    width = max(len(need.what) for need in rows)
    lines = (f"  {need.what:<{width}}  {gib(need.bytes):>9}  {', '.join(need.keys)}".rstrip() for need in rows)
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def check_resources(config: Config, shape: ModelShape, run_dir: Path, machine: Machine) -> None:
    """Compares the plan with the machine. A cluster at `cluster.address` is not looked at.

    Raises:
        ResourceError: too little memory, disk or devices; with the plan and the keys that make it smaller.
    """
    found = []
    disk, free = disk_plan(config, shape), machines.free_disk(run_dir)
    if (needed := sum(need.bytes for need in disk)) > free:
        parent = machines.existing_parent(run_dir)
        found.append(_too_little("disk", needed, free, disk, f"{parent} has"))
    if config.cluster.address is None:
        plan = memory_plan(config, shape)
        host = [need for need in plan if not need.on_gpu]
        if (needed := sum(need.bytes for need in host)) > machine.memory:
            found.append(_too_little("memory", needed, machine.memory, host, "this machine has"))
        found += _gpu_complaints(config, plan, machine)
    found += _store_complaints(config, shape)
    if found:
        raise ResourceError("\n".join(found))


def _too_little(what: str, needed: int, free: int, needs: list[Need], place: str) -> str:
    return (
        f"too little {what}: the plan needs {gib(needed)}, {place} {gib(free)} free. What needs it, and the keys that"
        f" make it smaller:\n{table(needs)}"
    )


def _gpu_complaints(config: Config, plan: list[Need], machine: Machine) -> list[str]:
    generator, learner = config.generator, config.learner
    needed = gpus_needed(config)
    if needed > len(machine.gpus):
        parts = [
            f"{role.count_key}={role.count} x " * (role.count_key is not None) + f"{role.gpus_key}={role.gpus:g}"
            for role in roles(config)
            if role.gpus
        ]
        return [
            f"the plan needs {needed:g} GPUs ({', '.join(parts)}), this machine has {len(machine.gpus)}: lower these,"
            " or name a cluster in cluster.address"
        ]
    complaints = []
    for role, share in (
        ("learner", min(1.0, learner.gpus)),
        ("generator", generator.num_actors * generator.gpus_per_actor * generator.gpu_memory_utilization),
    ):
        rows = [need for need in plan if need.on_gpu and need.role == role]
        room = share * min(machine.gpus, default=0)
        if rows and (total := sum(need.bytes for need in rows)) > room:
            complaints.append(
                f"too little GPU memory: the {role} role needs {gib(total)}, its share of the GPUs is {gib(room)}:\n"
                f"{table(rows)}"
            )
    return complaints


def _store_complaints(config: Config, shape: ModelShape) -> list[str]:
    """What is too small for the model whatever the machine has."""
    complaints = []
    weights = shape.num_parameters * BYTES[config.model.dtype]
    store = config.cluster.object_store_mb
    if config.cluster.address is None and weights > store * MIB:
        complaints.append(
            f"cluster.object_store_mb={store}: smaller than the weights that travel through it ({gib(weights)}): set it"
            f" to {2 * weights // MIB + 1}, which holds a version that leaves and one that comes"
        )
    generator, least = config.generator, kv_cache_mb_needed(config, shape)
    if generator.kind == "vllm" and not generator.gpus_per_actor and generator.kv_cache_mb < least:
        complaints.append(
            f"generator.kv_cache_mb={generator.kv_cache_mb}: cannot hold one sequence of model.max_length="
            f"{config.model.max_length}: set it to {least} or more, or lower model.max_length"
        )
    return complaints
