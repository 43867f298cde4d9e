"""What an iteration takes at best, and which role it waits for: reckoned, before anything runs.

Generation reads all weights and what is cached once for each token of a batch (bandwidth), or multiplies (arithmetic),
whichever takes longer; the learner multiplies: 2 operations a parameter and token in a forward pass, 6 with the
backward pass, 8 with layers computed again. Lengths are the longest that the settings allow, so that all of it is an
upper bound of the work and a rough measure of which part is the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.devices import CORE
from launch.resources import BYTES, kv_bytes_per_token

if TYPE_CHECKING:
    from conf.schema import Config
    from launch.devices import Device
    from launch.model_files import ModelShape

LEARNS, READS, DECODES = 0.4, 0.5, 0.6
"""Shares of a device's arithmetic, or of its bandwidth, that learners, prompts and decoding are reckoned to reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one role has to do in one iteration.

    Example: ``Work(role="generator", what="decode 1024 completions", tokens=1_048_576, seconds=210.0)``
    """

    role: str
    what: str
    tokens: int
    seconds: float


def estimate(config: Config, shape: ModelShape, gpu: Device) -> list[Work]:
    """Sampling and learning of one iteration; judging is left out: it depends on the judge.

    Args:
        config: the run.
        shape: of its policy.
        gpu: of every role that reserves GPUs; the others use the cores that they reserve.
    """
    return [_generation(config, shape, gpu), _learning(config, shape, gpu)]


def prompt_length(config: Config) -> int:
    """Longest prompt that leaves room for its completions, tokens."""
    return max(1, config.model.max_length - config.generator.max_tokens)


def _generation(config: Config, shape: ModelShape, gpu: Device) -> Work:
    generator, prompts = config.generator, config.pipeline.prompts_per_iteration
    flops, bandwidth = _speed(config, gpu, generator.gpus_per_actor, generator.cpus_per_actor)
    samples = config.search.simulations if config.search.kind != "none" else generator.samples_per_prompt
    own = math.ceil(prompts * samples / generator.num_actors)  # of one engine
    together = min(own, generator.max_num_seqs)
    length, new = prompt_length(config), generator.max_tokens
    cached = together * (length + new / 2) * kv_bytes_per_token(config, shape)
    step = max(
        (shape.num_parameters * BYTES[config.model.dtype] + cached) / (DECODES * bandwidth),
        2 * shape.num_parameters * together / (READS * flops),
    )
    read = 2 * shape.num_parameters * length * prompts / generator.num_actors / (READS * flops)
    return Work(
        role="generator",
        what=f"{prompts} prompts of {length} tokens, {samples} completions of {new} each",
        tokens=prompts * samples * new,
        seconds=read + math.ceil(own / together) * new * step,
    )


def _learning(config: Config, shape: ModelShape, gpu: Device) -> Work:
    learner, prompts = config.learner, config.pipeline.prompts_per_iteration
    flops, _ = _speed(config, gpu, learner.gpus, learner.num_threads)
    pairs = prompts * (config.pairing if config.search.kind == "none" else config.search).max_pairs
    tokens = pairs * 2 * config.generator.max_tokens + prompts * prompt_length(config)
    passes = (8 if learner.activation_checkpointing == "full" else 6) * learner.epochs
    passes += 2 if config.reference.kind != "none" else 0
    return Work(
        role="learner",
        what=f"{pairs} pairs",
        tokens=tokens * learner.epochs,
        seconds=passes * shape.num_parameters * tokens / (LEARNS * flops),
    )


def _speed(config: Config, gpu: Device, gpus: float, cores: float) -> tuple[float, float]:
    """Operations and bytes a second of what an actor reserves."""
    if not gpus:
        return CORE.flops * cores, CORE.bandwidth * cores
    return gpu.flops * gpus * (1 if config.model.dtype == "bfloat16" else 0.5), gpu.bandwidth * gpus
