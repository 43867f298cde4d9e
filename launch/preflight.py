"""Refuses what cannot work before Ray starts: within seconds, nothing written, everything that was found at once.

What it loads on the way (task, tokenizer, prompts) is what the run uses. Ray, vLLM and the model's weights are not
loaded; the tokenizer and then the names of the weights come last, because importing transformers, and for them torch,
takes longer than all the rest.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from conf.compose import CONFIG_FILE
from conf.judging import judge_kinds, own_language_model, pooled_kinds
from conf.validate import validate
from launch.machines import existing_parent, this_machine
from launch.model_files import TINY_VOCABULARY, find_model, inspect_model, read_shapes, tiny_shape
from launch.resources import check_resources
from launch.resuming import check_resumable
from launch.seeds import load_seeds
from launch.tokenizers import load_tokenizer
from orchestrator import ledger, runlock
from orchestrator.errors import ConfigError, DataError, ModelError, UserError
from orchestrator.prompts import PromptStream, Renderer, check_lengths, fitting
from orchestrator.tasks import build_task
from orchestrator.wandb_tracker import wandb_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conf.schema import Config
    from launch.machines import Machine
    from launch.model_files import ModelShape
    from orchestrator.tasks.base import Task
    from orchestrator.types import Prompt

T = TypeVar("T")

MAX_RENDERED = 10_000
"""Prompts that are rendered and tokenized, longest text first. The rest are if one of these is too long; else they are
checked when they are drawn."""
GENERATED = 16
"""Of a generated task all prompts are alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run can start from."""

    run_dir: Path
    """Absolute; does not exist yet, or is empty, or is the run to be resumed."""
    model_dir: Path | None
    """Folder of the initial policy; None for the tiny model, which is made after this."""
    tokenizer: Any
    task: Task
    prompts: PromptStream
    """At its beginning."""
    test_prompts: Sequence[Prompt]
    """`evaluation.final_problems` held-out prompts, or as many as there are."""
    verifier: str | None
    """The name that its scores carry, with the version of its file where it is the user's; None where there is none."""


def preflight(config: Config, *, resume: Path | None = None, machine: Machine | None = None) -> Inputs:
    """Checks everything that can be checked without starting anything.

    Args:
        config: The run.
        resume: The run folder to go on with; None: a new run.
        machine: What there is to use; None: this machine.

    Raises:
        UserError: What was found, one problem after the other, each with its place and its mend.
    """
    validate(config)
    found: list[UserError] = []

    def collect(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            found.append(error)
            return None

    run_dir = run_folder(config) if resume is None else resume.absolute()
    collect(lambda: _check_run_dir(run_dir, resume))
    if resume is not None:
        collect(lambda: check_resumable(config, run_dir))
    task = collect(lambda: build_task(config.task, config.seed))
    verifier = collect(lambda: _check_scorer(config, task))
    collect(lambda: wandb_mode(config.tracking.wandb))
    model = collect(lambda: _find_model(config))
    if model is not None:
        collect(lambda: check_resources(config, model[1], run_dir, machine or this_machine()))
    _raise(found)
    assert task is not None
    assert model is not None
    tokenizer = _load_tokenizer(config, *model)
    if config.learner.replay_path is not None and config.learner.replay_sequences:
        load_seeds(config, model[0] or run_dir, tokenizer)
    collect(lambda: _check_separator(config, tokenizer))
    collect(lambda: _check_verdicts(config, tokenizer))
    _raise(found)
    prompts, test_prompts = _prompts(config, task, tokenizer)
    if model[0] is not None and resume is None:  # seconds, and it was done when the run began
        _check_weights(model[0])
    return Inputs(
        run_dir=run_dir,
        model_dir=model[0],
        tokenizer=tokenizer,
        task=task,
        prompts=prompts,
        test_prompts=test_prompts,
        verifier=verifier,
    )


def _raise(found: list[UserError]) -> None:
    if found:
        raise type(found[0])("\n".join(map(str, found)))


def run_folder(config: Config) -> Path:
    """The absolute path of a new run: `run_dir`, or one named after the time, the recipe and the seed."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.recipe.name}-{config.seed}"
    return Path(config.run_dir or Path("runs", name)).absolute()


_BEFORE_IT_BEGINS = (
    runlock.FILE_NAME,
    *(f"{ledger.FILE_NAME}{end}" for end in ("", "-wal", "-shm")),
    *(f".{name}.partial" for name in (ledger.FILE_NAME, CONFIG_FILE)),
)
"""What a run that died before it noted its configuration may have left; there is nothing in it."""


def _check_run_dir(run_dir: Path, resume: Path | None) -> None:
    if resume is not None:
        if not (run_dir / CONFIG_FILE).is_file():
            raise ConfigError(f"{run_dir}: holds no run (there is no {CONFIG_FILE})")
    elif run_dir.is_dir() and any(path.name not in _BEFORE_IT_BEGINS for path in run_dir.iterdir()):
        if (run_dir / CONFIG_FILE).exists():
            raise ConfigError(
                f"run_dir={run_dir}: holds another run: go on with it (agon run --resume {run_dir}), or choose"
                " another run_dir"
            )
        raise ConfigError(f"run_dir={run_dir}: is not empty: choose a folder that does not exist yet")
    parent = existing_parent(run_dir)
    if not parent.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {parent} is a file: choose another run_dir")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {parent} is not writable for you: choose another run_dir")


def _check_scorer(config: Config, task: Task | None) -> str | None:
    """The name of the verifier, where there is one."""
    from actors.judges import build_scorer
    from actors.judges.llm_judge import check_llm_judge
    from actors.judges.majority import build_majority

    kinds = judge_kinds(config)
    if "llm_judge" in kinds:
        check_llm_judge(config.judge, config.model.max_length)
    if "majority" in kinds:
        build_majority(config.scorer)
    if "verifier" not in pooled_kinds(config):
        return None
    scorer = build_scorer(replace(config.scorer, kind="verifier"))
    if task is not None and not task.has_answers and config.scorer.verifier != "function":
        raise ConfigError(f"scorer.verifier={config.scorer.verifier}: needs reference answers: set task.answer_field")
    return scorer.name


def _find_model(config: Config) -> tuple[Path | None, ModelShape]:
    if config.model.kind == "tiny":
        return None, tiny_shape(config.model, TINY_VOCABULARY)
    folder = find_model(config.model.path or "")
    shape = inspect_model(folder)
    if 0 < shape.context < config.model.max_length:
        raise ModelError(
            f"model.max_length={config.model.max_length}: {folder / 'config.json'} says that the model reads at most"
            f" {shape.context} tokens: lower it"
        )
    return folder, shape


def _check_weights(folder: Path) -> None:
    # The learner's own imports, seconds of them: after everything that can be refused without.
    from transformers import AutoModelForCausalLM

    from learners.loading import check_weights

    check_weights(AutoModelForCausalLM, folder, read_shapes(folder))


def _load_tokenizer(config: Config, folder: Path | None, shape: ModelShape) -> Any:
    if folder is not None:
        tokenizer = load_tokenizer(folder, shape.vocab_size)
    else:
        from launch.tiny import make_tokenizer

        tokenizer = make_tokenizer(config.model.max_length)
    tokenizer.model_max_length = sys.maxsize  # too long prompts are told of below, not by the library's own warning
    return tokenizer


def _check_separator(config: Config, tokenizer: Any) -> None:
    """A tree without a token that ends a step has no steps: every solution would be a leaf of its root."""
    separator = config.search.separator
    if config.search.kind == "none" or any(separator in tokenizer.decode([token]) for token in range(len(tokenizer))):
        return
    raise ConfigError(
        f"search.separator={separator!r}: is part of no token of the policy's tokenizer, so that no step would end:"
        " give a shorter text that ends a step, such as a newline"
    )


def _check_verdicts(config: Config, tokenizer: Any) -> None:
    """Builds judges that read the probability of their verdicts over no engines: they know what they cannot read."""
    from actors.judges.last_step import LastStep
    from actors.judges.llm_judge import build_llm_judge

    reads = "llm_judge" in judge_kinds(config) and config.judge.verdict == "probability"
    if not (reads or config.search.evaluation_weight):
        return
    if (named := own_language_model(config)) is not None:
        folder = find_model(named, "judge.model")
        tokenizer = load_tokenizer(folder, inspect_model(folder).vocab_size)
    encode = Renderer(tokenizer, config.task).encode
    never_asked: Any = SimpleNamespace(encode=encode, special_tokens=(), max_length=config.model.max_length)
    if reads:
        build_llm_judge(config.judge, never_asked, config.seed)
    if config.search.evaluation_weight:
        LastStep(never_asked, config.search, config.judge, config.seed)


def _prompts(config: Config, task: Task, tokenizer: Any) -> tuple[PromptStream, list[Prompt]]:
    """Renders the prompts of a run once, to find those that are refused."""
    render = Renderer(tokenizer, config.task)
    lengths = {"max_length": config.model.max_length, "max_tokens": config.generator.max_tokens}
    on_too_long = config.task.on_too_long
    if config.task.kind == "addition":
        problems = list(islice(task.train(0), GENERATED))
    else:
        problems = sorted(islice(task.train(0), task.num_train), key=lambda problem: -len(str(problem.content)))
    rendered = [render(problem) for problem in problems[:MAX_RENDERED]]
    if check_lengths(rendered, **lengths).num_too_long:
        rendered += [render(problem) for problem in problems[MAX_RENDERED:]]  # they are to be counted
    left = fitting(rendered, **lengths, on_too_long=on_too_long, locate=task.locate)
    usable = task.num_train - len(rendered) + len(left)
    wanted = config.pipeline.prompts_per_iteration
    if wanted > usable:
        raise DataError(
            f"pipeline.prompts_per_iteration={wanted}: {config.task.path or task.name} has {usable} training prompts:"
            " lower it to that or less, or give more prompts"
        )
    stream = PromptStream(task, render, **lengths, on_too_long=on_too_long)
    return stream, stream.held_out(config.evaluation.final_problems)
