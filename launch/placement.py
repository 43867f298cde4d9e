"""From a configuration to running actors: who gets which cores and devices."""

from __future__ import annotations

import math
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from actors.generator import Generator
from actors.scorer import ScorerActor
from conf.judging import has_own_judge, own_language_model, pooled_kinds
from conf.roles import cpus_needed
from launch.children import children, end_children
from launch.environment import KEEPS_MEMORY, QUIET, threads
from launch.fork_server import forked
from launch.model_files import find_model, folder_version
from learners.learner import Learner
from orchestrator.errors import DeadlineError
from orchestrator.pools import ActorPool
from orchestrator.queues import BatchQueue
from orchestrator.remote import actor_class
from orchestrator.rollouts import Roles
from orchestrator.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from conf.schema import Config, JudgeConfig, ScorerConfig
    from orchestrator.events import Emit
    from orchestrator.learning import Learning
    from orchestrator.types import PolicyVersion, SeedSequence

_TRIES = 3
"""To start a Ray of this run's own, which gives itself 30 s: too few where the machine is busy."""
_LATE = ("timed out during startup", "Timed out waiting for file")


def start_ray(config: Config) -> None:
    """Joins the cluster at `cluster.address`, or starts a Ray of this run's own on this machine.

    Raises:
        DeadlineError: neither could be done in the time that Ray gives itself.
    """
    os.environ |= QUIET
    address, before = config.cluster.address, children()
    for tries_left in reversed(range(1 if address else _TRIES)):
        try:
            with _signals_held():
                _init_ray(config)
            return
        except Exception as error:
            if not (tries_left and is_late(error)):
                where = f"joined at cluster.address={address}" if address else "started here"
                raise DeadlineError(f"Ray could not be {where}: {error}") from error
        end_children(before)


def is_late(error: Exception) -> bool:
    """Whether Ray gave up because it took too long to start."""
    return any(text in str(error) for text in _LATE)


@contextmanager
def _signals_held() -> Iterator[None]:
    """A signal that comes while Ray starts is answered when it is up: half a Ray cannot be shut down.

    Handlers are put back afterwards: Ray takes SIGTERM, and would end the process before it can write its summary.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except SystemExit:  # Ray has taken SIGTERM meanwhile, and it came
        came.append(signal.SIGTERM)
    except Exception:
        if not came:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _init_ray(config: Config) -> None:
    cluster = config.cluster
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if cluster.address is not None:
        ray.init(address=cluster.address, **quiet)
        return
    cores = cluster.num_cpus or max(os.cpu_count() or 1, math.ceil(cpus_needed(config)))
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",  # nobody else's business
        num_cpus=cores,
        object_store_memory=cluster.object_store_mb << 20,
        include_dashboard=False,
        _system_config={
            # Nobody reads what Ray notes of every call for its dashboard, and a controller holds up to 100,000 of them.
            "task_events_report_interval_ms": 0,
            # Workers in advance: actors have environments of their own, so that those would only take time from them.
            "prestart_worker_first_driver": False,
            # A node whose own object store does not listen yet, as where cores are busy, tries again so soon, not
            # after a second.
            "raylet_client_connect_timeout_milliseconds": 50,
            "raylet_client_num_connect_attempts": 200,
        },
        **quiet,
    )


def start_roles(config: Config, *, model_dir: str, learner: Learning, emit: Emit) -> Roles:
    """Starts generators and scorers at once, and waits until each actor, the learner's among them, is up.

    Args:
        config: the run.
        model_dir: Hugging Face folder of the initial policy.
        learner: starting already.
        emit: told of actors that are lost and replaced.

    Raises:
        DeadlineError: one is not up in time.
        PoolError: a generator or scorer died while starting.
        ActorLostError: the learner did.
    """
    generators: ActorPool[Any, Any] = ActorPool(
        role="generator",
        make=lambda index: _start_generator(config, model_dir, index),
        num_actors=config.generator.num_actors,
        restarts=config.generator.restarts,
        start_deadline_s=config.generator.start_deadline_s,
        emit=emit,
    )
    roles = Roles(
        generators=generators,
        scorers={kind: _scorer_pool(kind, config, emit) for kind in pooled_kinds(config)},
        judges=_judge_pool(config, model_dir, emit) if has_own_judge(config) else None,
        learner=learner,
    )
    for pool in (roles.generators, *roles.scorers.values(), roles.judges):
        if pool is not None:
            pool.wait_ready()
    learner.wait_ready()
    return roles


def _scorer_pool(kind: str, config: Config, emit: Emit) -> ActorPool[Any, Any]:
    scorer = replace(config.scorer, kind=kind)
    return ActorPool(
        role=kind,
        section="scorer",
        make=lambda index: _start_scorer(f"{kind}-{index}", scorer, config.judge),
        num_actors=scorer.num_actors,
        restarts=scorer.restarts,
        start_deadline_s=scorer.start_deadline_s,
        emit=emit,
    )


def _judge_pool(config: Config, model_dir: str, emit: Emit) -> ActorPool[Any, Any]:
    """Generators of the judge's own, whose weights are those of their folder for the whole run."""
    named = own_language_model(config)
    folder = model_dir if named is None else str(find_model(named, "judge.model"))
    version = folder_version(folder)
    own = replace(
        config,
        generator=replace(config.generator, gpus_per_actor=config.judge.gpus_per_actor, tensor_parallel_size=1),
        cluster=replace(config.cluster, weight_transport="object_store"),
    )
    return ActorPool(
        role="judge",
        section="generator",
        make=lambda index: _start_generator(own, folder, index, name="judge", fixed_version=version),
        num_actors=config.judge.num_actors,
        restarts=config.generator.restarts,
        start_deadline_s=config.generator.start_deadline_s,
        emit=emit,
    )


def _start_generator(
    config: Config, model_dir: str, index: int, *, name: str = "generator", fixed_version: PolicyVersion | None = None
) -> Any:
    generator, model = config.generator, config.model
    options = {
        "model_dir": model_dir,
        "dtype": model.dtype,
        "max_length": model.max_length,
        "max_num_seqs": generator.max_num_seqs,
        "kv_cache_mb": generator.kv_cache_mb,
        "gpu_memory_utilization": generator.gpu_memory_utilization,
        "tensor_parallel_size": generator.tensor_parallel_size,
        "weight_transport": config.cluster.weight_transport,
        "seed": derive_seed(config.seed, name, index),
    }
    environment = _environment(max(1, int(generator.cpus_per_actor)), generator.gpus_per_actor)
    actor = actor_class(Generator).options(
        num_cpus=generator.cpus_per_actor, num_gpus=generator.gpus_per_actor, runtime_env=environment
    )
    return actor.remote(f"{name}-{index}", generator.kind, options, fixed_version)


def _start_scorer(name: str, scorer: ScorerConfig, judge: JudgeConfig) -> Any:
    gpus = 0 if scorer.kind == "verifier" else judge.gpus_per_actor
    # One call at a time runs in the main thread, the only one that math-verify can break off (by a signal).
    alone = scorer.kind == "verifier" and scorer.verifier == "math"
    actor = actor_class(ScorerActor).options(
        num_cpus=scorer.cpus_per_actor,
        num_gpus=gpus,
        max_concurrency=1 if alone else 2,
        runtime_env=_environment(max(1, int(scorer.cpus_per_actor)), gpus),
    )
    return actor.remote(name, scorer, judge)


def start_learner(
    config: Config, *, model_dir: str, probe_token_ids: tuple[int, ...], seeds: Sequence[SeedSequence]
) -> Any:
    """Starts a learner's actor, and does not wait for it.

    Args:
        config: the run.
        model_dir: Hugging Face folder of the initial policy.
        probe_token_ids: a sequence that generators and learner must agree on after each publication.
        seeds: seed data that the learner replays.
    """
    learner = config.learner
    environment = _environment(learner.num_threads, learner.gpus)
    actor = actor_class(Learner).options(
        num_cpus=learner.cpus, num_gpus=learner.gpus, max_concurrency=4, runtime_env=environment
    )
    return actor.remote(
        model_dir=model_dir,
        dtype=config.model.dtype,
        loss=config.loss,
        reference=config.reference,
        learner=learner,
        keep_initial=config.evaluation.kl_prompts > 0,
        probe_token_ids=probe_token_ids,
        weight_transport=config.cluster.weight_transport,
        workers_per_receiver=config.generator.tensor_parallel_size,
        seeds=seeds,
        seed=derive_seed(config.seed, "learner"),
    )


def start_queue(config: Config) -> BatchQueue:
    """Starts the queue between packing and the learner, and does not wait for it."""
    return BatchQueue.create(
        config.pipeline.queue_capacity,
        deadline_s=config.learner.step_deadline_s,
        runtime_env=_environment(1, gpus=0),
    )


def _environment(count: int, gpus: float) -> dict[str, Any]:
    """Ray's `runtime_env` of an actor with threads and GPUs: how its process is made, and what that finds set."""
    variables = QUIET | threads(count)
    return {"env_vars": variables} if gpus else {"env_vars": variables | KEEPS_MEMORY, **forked()}
