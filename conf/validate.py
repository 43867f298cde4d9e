"""What the types cannot say: the limits beside each key of the schema, and which values go together."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.judging import TRAINED_KINDS, compares, judge_kinds, needs_main_thread, own_language_model
from conf.objectives import OBJECTIVES, PAIR_LABELS, needs_reference
from conf.pipeline import grows_old
from conf.roles import cpus_needed
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from conf.schema import Config

NEEDS_ANSWERS = ("final_answer", "exact", "math", "tests")
"""Verifiers that compare with a reference answer."""


class Problem(NamedTuple):
    """A refused value: its dotted key, and a whole message that begins with the key."""

    key: str
    message: str


def validate(config: Config) -> None:
    """Refuses what is out of its limits or does not go together.

    Raises:
        ConfigError: every problem that was found, a line each.
    """
    if found := problems(config):
        raise ConfigError("\n".join(problem.message for problem in found))


def problems(config: Config) -> list[Problem]:
    """Everything `validate` would refuse, in the order of its checks; one problem a key."""
    found = list(_out_of_limits(config, ""))
    for check in (_inputs, _judging, _evaluation, _consistency, _objective, _ahead, _searching, _sampling, _devices):
        found += check(config)
    return list({problem.key: problem for problem in reversed(found)}.values())[::-1]


def _out_of_limits(section: Any, prefix: str) -> Iterator[Problem]:
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            yield from _out_of_limits(value, f"{key}.")
        elif value is not None and (complaint := _complaint(value, field.metadata)):
            yield Problem(key, f"{key}={value}: {complaint}")


def _complaint(value: Any, limits: Mapping[str, Any]) -> str | None:
    choices, low, above, high = (limits[name] for name in ("choices", "low", "above", "high"))
    for each in (value if isinstance(value, list) else [value]) if choices else ():
        if each not in choices:
            near = get_close_matches(str(each), choices, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            return f"{f'{each}: ' if isinstance(value, list) else ''}{hint}choices: {', '.join(choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if low is not None and value < low:
        return f"must be at least {low:g}"
    if above is not None and value <= above:
        return f"must be above {above:g}"
    if high is not None and value > high:
        return f"must be at most {high:g}"
    return None


def _inputs(config: Config) -> Iterator[Problem]:
    """Model, task and scorer."""
    model, task, scorer = config.model, config.task, config.scorer
    if model.kind == "hf" and not model.path:
        yield Problem("model.path", "model.path: model.kind=hf needs one: write model=<folder or hub id>")
    if model.kind == "tiny":
        if model.path:
            yield Problem(
                "model.path", f"model.path={model.path}: not read with model.kind=tiny: write model={model.path}"
            )
        width, heads = model.tiny.hidden_size, model.tiny.num_heads
        if heads > 0 and (width % heads or width // heads % 2):
            key = "model.tiny.hidden_size"
            yield Problem(
                key, f"{key}={width}: must be an even multiple of model.tiny.num_heads={heads} (rotary heads)"
            )
    if task.kind != "addition" and not task.path:
        yield Problem("task.path", f"task.path: task.kind={task.kind} needs one: a .jsonl or .parquet file of prompts")
    if task.kind == "addition" and task.path:
        mend = "choose task=prompts to train on the file"
        yield Problem("task.path", f"task.path={task.path}: not read with task.kind=addition: {mend}")
    if task.kind != "addition" and task.test_path is None and task.test_fraction == 0:
        message = "task.test_fraction=0: nothing would be held out: set it above 0, or set task.test_path"
        yield Problem("task.test_fraction", message)
    kinds = judge_kinds(config)
    verified = "verifier" in kinds or config.evaluation.scorer == "verifier"
    if verified and task.kind == "prompts" and task.answer_field is None and scorer.verifier in NEEDS_ANSWERS:
        without = "scorer.verifier=function scorer.function=module.name"
        if "verifier" not in kinds:
            other = "none" if compares(config) or scorer.kind == "majority" else "judge"
            without += f", or evaluation.scorer={other}"
        message = (
            f"scorer.verifier={scorer.verifier}: needs reference answers, but task.answer_field is null: set it to the"
            f" field that holds them, or judge without answers: {without}"
        )
        yield Problem("scorer.verifier", message)
    if scorer.verifier == "tests" and task.kind != "prompts":
        message = f"scorer.verifier=tests: the answers of task.kind={task.kind} are no Python: choose task=prompts"
        yield Problem("scorer.verifier", message)
    if scorer.verifier == "function" and not scorer.function:
        yield Problem("scorer.function", "scorer.function: scorer.verifier=function needs one, as module.name")
    if scorer.verifier != "function" and scorer.function:
        message = (
            f"scorer.function={scorer.function}: not called with scorer.verifier={scorer.verifier}: set it to function"
        )
        yield Problem("scorer.function", message)


def _judging(config: Config) -> Iterator[Problem]:
    """Judges, and the seed data that keeps them able."""
    learner, tiny = config.learner, config.model.kind == "tiny"
    taught = tiny and config.model.tiny.judge_steps > 0
    if learner.replay_sequences and learner.replay_path is None and not taught:
        message = (
            f"learner.replay_sequences={learner.replay_sequences}: of which seed data? Set learner.replay_path to a"
            " .jsonl file" + (", or teach the tiny model to judge: model.tiny.judge_steps=200" if tiny else "")
        )
        yield Problem("learner.replay_sequences", message)
    kinds = judge_kinds(config)
    if "step_judge" in kinds and tiny and not taught and own_language_model(config) is None:
        message = (
            f"scorer.kind={config.scorer.kind}: the tiny model must be taught to judge step by step: set"
            " model.tiny.judge_steps=200"
        )
        yield Problem("scorer.kind", message)
    if config.scorer.kind == "ensemble":
        members = f"judge.members={config.judge.members}"
        if len(set(kinds)) < max(2, len(kinds)):
            message = f"{members}: an ensemble needs at least two judges, all of them different"
            yield Problem("judge.members", message)
        if set(TRAINED_KINDS) <= set(kinds):
            message = f"{members}: {' and '.join(TRAINED_KINDS)} would share one judge.model: leave one of them out"
            yield Problem("judge.members", message)


def _evaluation(config: Config) -> Iterator[Problem]:
    """Who can evaluate."""
    if config.evaluation.scorer == "judge" and (compares(config) or config.scorer.kind == "majority"):
        message = (
            f"evaluation.scorer=judge: scorer.kind={config.scorer.kind} compares the answers to a prompt with each"
            " other, and an evaluation has one to each: choose evaluation.scorer=none, or a verifier"
        )
        yield Problem("evaluation.scorer", message)


def _consistency(config: Config) -> Iterator[Problem]:
    """What labels by consistency need."""
    if config.judge.consistency == "none":
        return
    needed = {
        "scorer.kind": (config.scorer.kind, "implicit"),
        "loss.labels": (config.loss.labels, "soft"),
        "reference.kind": (config.reference.kind, "previous"),
        "search.kind": (config.search.kind, "none"),
    }
    for key, (found, right) in needed.items():
        if found != right:
            message = f"{key}={found}: judge.consistency={config.judge.consistency} needs {key}={right}"
            yield Problem(key, message)
    wave, prompts = config.pipeline.wave_prompts, config.pipeline.prompts_per_iteration
    if config.judge.consistency == "mean" and wave < prompts:
        yield Problem(
            "pipeline.wave_prompts",
            f"pipeline.wave_prompts={wave}: judge.consistency=mean is a mean over all prompts of the iteration, which"
            f" must be judged together: set it to pipeline.prompts_per_iteration={prompts}, or"
            " judge.consistency=prompt",
        )


def _objective(config: Config) -> Iterator[Problem]:
    """What the loss needs of labels, scores, reference and pairs."""
    loss = config.loss
    objective = OBJECTIVES.get(loss.name)
    if objective is None:
        return
    if config.reference.kind == "none" and needs_reference(loss):
        free = ", ".join(name for name, facts in OBJECTIVES.items() if not facts.reference)
        message = (
            f"reference.kind=none: the loss (loss.name={loss.name}) depends on a reference: choose previous, initial or"
            f" ema, or one of the losses without: {free}"
        )
        yield Problem("reference.kind", message)
    if objective.unit == "group" and (loss.labels != "hard" or loss.label_smoothing or loss.weighting != "none"):
        key = (
            "loss.labels"
            if loss.labels != "hard"
            else "loss.label_smoothing"
            if loss.label_smoothing
            else "loss.weighting"
        )
        yield Problem(
            key, f"{key}: of pairs, but loss.name={loss.name} compares all completions of a prompt: leave it out"
        )
    if loss.labels == "robust" and loss.label_smoothing == 0.5:
        yield Problem("loss.label_smoothing", "loss.label_smoothing=0.5: labels=robust divides by 1 - 2 eps: lower it")
    if loss.labels in ("posterior", "denoised") and not loss.label_smoothing:
        message = (
            f"loss.label_smoothing=0: loss.labels={loss.labels} needs a share of wrong labels to begin with: set 0.1"
        )
        yield Problem("loss.label_smoothing", message)
    if objective.by_rank and (loss.labels in PAIR_LABELS or loss.weighting != "none"):
        key = "loss.labels" if loss.labels in PAIR_LABELS else "loss.weighting"
        message = (
            f"{key}={getattr(loss, key.removeprefix('loss.'))}: of single pairs, but loss.name={loss.name} orders whole"
            " distributions, so that its values belong to no pair: leave it out"
        )
        yield Problem(key, message)
    if objective.on_policy and config.reference.kind != "previous":
        message = (
            f"reference.kind={config.reference.kind}: loss.name={loss.name} clips ratios to the policy that sampled:"
            " set reference=previous"
        )
        yield Problem("reference.kind", message)
    if loss.name == "sppo" and not compares(config) and config.scorer.kind != "verifier":
        message = (
            f"loss.name=sppo: regresses to win probabilities, which scorer.kind={config.scorer.kind} does not give:"
            " choose scorer=preference_model, a pairwise llm_judge, or loss=sppo_hard"
        )
        yield Problem("loss.name", message)
    if loss.name == "gpo" and (config.scorer.kind != "preference_model" or config.judge.score != "mean_logit"):
        message = (
            "loss.name=gpo: regresses to mean logits of winning: choose scorer=preference_model judge.score=mean_logit"
        )
        yield Problem("loss.name", message)
    if loss.name == "sppo" and config.scorer.kind == "preference_model" and config.judge.score != "win_rate":
        message = f"judge.score={config.judge.score}: loss.name=sppo regresses to win rates: leave it at win_rate"
        yield Problem("judge.score", message)


def _ahead(config: Config) -> Iterator[Problem]:
    """What goes with a learner that is trained while pairs are collected."""
    loss, learner, pipeline = config.loss, config.learner, config.pipeline
    mode, objective = f"pipeline.mode={pipeline.mode}", OBJECTIVES.get(loss.name)
    ahead = pipeline.mode == "semi_online" or grows_old(config)
    if "implicit" in judge_kinds(config) and ahead:
        message = f"{mode}: scorer.kind={config.scorer.kind} asks the learner, which is being trained then: set sync"
        yield Problem("pipeline.mode", message)
    if needs_main_thread(config) and ahead:
        message = (
            f"{mode}: scorer.kind=majority with scorer.verifier=math compares formulas in a thread that nothing can"
            " interrupt then, and one may take for ever: set sync, or scorer.verifier=final_answer"
        )
        yield Problem("pipeline.mode", message)
    if pipeline.mode == "semi_online":
        wave, prompts = pipeline.wave_prompts, pipeline.prompts_per_iteration
        if wave >= prompts:
            message = (
                f"pipeline.wave_prompts={wave}: with {mode} the learner begins when a wave is there: set it below"
                f" pipeline.prompts_per_iteration={prompts}"
            )
            yield Problem("pipeline.wave_prompts", message)
        if learner.schedule != "constant":
            message = f"learner.schedule={learner.schedule}: with {mode} nobody knows how many steps there will be"
            yield Problem("learner.schedule", f"{message}: set constant")
        if loss.labels == "denoised":
            message = f"loss.labels=denoised: warms up within an iteration, whose length is not known with {mode}"
            yield Problem("loss.labels", f"{message}: set pipeline.mode=sync")
    if not grows_old(config) or objective is None:
        return
    if objective.on_policy:
        message = (
            f"{mode}: loss.name={loss.name} clips ratios to the policy that sampled, which is not the reference then:"
            " set sync"
        )
        yield Problem("pipeline.mode", message)
    if loss.importance_clip > 1 and (objective.unit == "group" or objective.by_rank or loss.include_prompt):
        what = "include_prompt=true" if loss.include_prompt else f"name={loss.name}"
        message = (
            f"loss.importance_clip={loss.importance_clip:g}: {mode} weighs single pairs by it, which does not go with"
            f" loss.{what}: set it to 1 to train on older pairs as if they were new, or pipeline.mode=sync"
        )
        yield Problem("loss.importance_clip", message)


def _searching(config: Config) -> Iterator[Problem]:
    """What a tree search needs of its judge and of the loss."""
    if config.search.kind == "none":
        return
    if not config.search.separator:
        yield Problem(
            "search.separator", "search.separator: is empty: give the text that ends a step, such as a newline"
        )
    if config.search.show_answer and config.task.kind == "prompts" and config.task.answer_field is None:
        yield Problem("search.show_answer", "search.show_answer=true: there are no answers: set task.answer_field")
    compares = {"preference_model", "majority", "ensemble"}
    if config.scorer.kind in compares or (config.scorer.kind == "llm_judge" and config.judge.style == "pairwise"):
        message = (
            f"scorer.kind={config.scorer.kind}: says how one completion stands among others, but a search compares"
            " the scores of rollouts from different states: choose a scorer that judges each by itself"
        )
        yield Problem("scorer.kind", message)
    objective = OBJECTIVES.get(config.loss.name)
    if objective is not None and objective.unit == "group":
        message = (
            f"loss.name={config.loss.name}: compares all completions of a prompt, but a search makes pairs of steps"
        )
        yield Problem("loss.name", message)


def _sampling(config: Config) -> Iterator[Problem]:
    """Lengths, groups and pairs."""
    generator, pairing = config.generator, config.pairing
    if generator.max_tokens >= config.model.max_length:
        message = (
            f"generator.max_tokens={generator.max_tokens}: leaves no room for a prompt in"
            f" model.max_length={config.model.max_length}: lower the one or raise the other"
        )
        yield Problem("generator.max_tokens", message)
    if "" in generator.stop:
        yield Problem("generator.stop", "generator.stop: holds an empty text, which every completion begins with")
    solution = 10 * config.task.digits + 3  # nine characters and a line end a column, `#`, the sum
    if config.task.kind == "addition" and generator.max_tokens < solution:
        message = (
            f"generator.max_tokens={generator.max_tokens}: a solution with task.digits={config.task.digits} has"
            f" {solution} tokens with its end: raise it to that or more"
        )
        yield Problem("generator.max_tokens", message)
    most = generator.samples_per_prompt // 2
    if config.search.kind == "none" and pairing.policy == "best_worst" and pairing.max_pairs > most >= 1:
        message = (
            f"pairing.max_pairs={pairing.max_pairs}: best_worst uses each completion once, so"
            f" generator.samples_per_prompt={generator.samples_per_prompt} give at most {most}"
        )
        yield Problem("pairing.max_pairs", message)


def _devices(config: Config) -> Iterator[Problem]:
    """Cores, GPUs and how weights travel."""
    generator, learner, cluster = config.generator, config.learner, config.cluster
    shards = generator.tensor_parallel_size
    if shards > 1 and (generator.kind != "vllm" or generator.gpus_per_actor != shards):
        key = "generator.tensor_parallel_size"
        yield Problem(key, f"{key}={shards}: needs generator.kind=vllm and generator.gpus_per_actor={shards}")
    for key, gpus in (("generator.gpus_per_actor", generator.gpus_per_actor), ("learner.gpus", learner.gpus)):
        if gpus > 1 and not float(gpus).is_integer():
            yield Problem(key, f"{key}={gpus:g}: above 1, only whole GPUs can be reserved")
    if cluster.weight_transport != "object_store" and not (generator.gpus_per_actor and learner.gpus):
        message = (
            f"cluster.weight_transport={cluster.weight_transport}: needs GPUs on both sides: set learner.gpus and"
            " generator.gpus_per_actor, or cluster.weight_transport=object_store"
        )
        yield Problem("cluster.weight_transport", message)
    needed = cpus_needed(config)
    if cluster.num_cpus is not None and cluster.address is None and cluster.num_cpus < needed:
        message = (
            f"cluster.num_cpus={cluster.num_cpus}: the plan reserves {needed:g} (learner.cpus, generator.num_actors x"
            " generator.cpus_per_actor, scorer.num_actors x scorer.cpus_per_actor): raise it, or set it to null"
        )
        yield Problem("cluster.num_cpus", message)
    if cluster.num_cpus is not None and cluster.address is not None:
        message = f"cluster.num_cpus={cluster.num_cpus}: a Ray at cluster.address brings its own: set one of the two"
        yield Problem("cluster.num_cpus", message)
