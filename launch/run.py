"""`agon run`: from a configuration to a finished run folder.

    preflight -> run folder -> initial model -> Ray and actors -> controller -> exported model -> summary.json

Everything before the run folder may refuse, and then nothing was written. Everything after it ends in `summary.json`,
whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import compose, flatten, resolved_yaml
from launch.children import children, end_children
from launch.console import make_console
from launch.export import export
from launch.fork_server import fork_server
from launch.initial_model import prepare_initial_model
from launch.judge_models import check_judge_model, prepare_judge_model
from launch.model_files import find_model, fingerprint
from launch.preflight import preflight
from orchestrator.disk import disk_error
from orchestrator.errors import ConfigError, FailureKind, kind_of
from orchestrator.events import Event, EventKind, EventLog
from orchestrator.files import atomic_file
from orchestrator.ledger import Ledger, RunStatus
from orchestrator.printable import printable
from orchestrator.runlock import RunLock
from orchestrator.startup import share_one_heap
from orchestrator.summary import build_summary, write_summary
from orchestrator.tracking import JsonlTracker, RunInfo, Tracker, Trackers
from orchestrator.waits import forget_everybody
from orchestrator.wandb_tracker import WandbTracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conf.schema import Config
    from launch.preflight import Inputs
    from orchestrator.tasks.base import Task

_MAY_CHANGE = (
    # How long, and what is kept.
    *("run_dir", "pipeline.iterations", "pipeline.keep_checkpoints", "learner.checkpoint_steps"),
    *("generator.restarts", "scorer.restarts", "learner.restarts"),
    # What it takes of the machine: changes no more than the last bits of a log-prob.
    *(
        "generator.num_actors",
        "pipeline.over_issue",
        "generator.kv_cache_mb",
        "generator.max_num_seqs",
        "generator.gpu_memory_utilization",
    ),
    *("learner.num_threads", "learner.micro_batch_tokens", "learner.activation_checkpointing"),
    *("learner.vocab_chunk", "learner.logits_mb"),
)
_FEW_PROBLEMS = 50
"""On fewer an accuracy is known to within some 14 points at best."""
_MOST_SHOWN = 200
"""Characters of a prompt in a command that is suggested."""
_STOPS = (signal.SIGINT, signal.SIGTERM)


def run(config: Config, resume: Path | None = None) -> int:
    """Runs or resumes, and returns the exit code: 0 finished, 1 failed, 130 interrupted.

    Raises:
        UserError: something was refused; nothing was written.
    """
    config = _with_absolute_paths(config)
    check_judge_model(config)
    with fork_server(config):
        return _begin(config, resume)


def _begin(config: Config, resume: Path | None) -> int:
    inputs = preflight(config, resume=resume)
    run_dir, identity = inputs.run_dir, _identity(config, inputs.verifier)
    with RunLock(run_dir), Ledger(run_dir) as ledger:
        if resume is not None:
            _check_unchanged(config, run_dir / "config.yaml")
            ledger.check_identity(identity)
            if _is_finished(ledger, config):
                more = config.pipeline.iterations + 1
                _say(
                    f"{_shown(run_dir)} is finished; for more: {_command()} run --resume {_shown(run_dir)}"
                    f" pipeline.iterations={more}"
                )
                return 0
        with atomic_file(run_dir / "config.yaml") as file:
            file.write(resolved_yaml(replace(config, run_dir=None)).encode())
        ledger.begin(
            recipe=config.recipe.name,
            seed=config.seed,
            config_hash=identity,
            iterations=config.pipeline.iterations,
        )
        return Run(config, inputs, ledger).go()


def _with_absolute_paths(config: Config) -> Config:
    """Files by their whole path, so that a run can be resumed and exported from any folder."""

    def whole(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    model = replace(config.model, path=whole(config.model.path))
    task = replace(config.task, path=whole(config.task.path), test_path=whole(config.task.test_path))
    judge = replace(
        config.judge,
        model=whole(config.judge.model),
        rubric=whole(config.judge.rubric),
        principles=whole(config.judge.principles),
    )
    search = replace(config.search, rubric=whole(config.search.rubric))
    learner = replace(config.learner, replay_path=whole(config.learner.replay_path))
    return replace(config, model=model, task=task, judge=judge, search=search, learner=learner)


def _lasting(config: Config) -> dict[str, Any]:
    """The settings that make a run the run it is: those that may not change when it is resumed."""
    settings = flatten(asdict(config))
    return {
        key: value
        for key, value in settings.items()
        if not (key in _MAY_CHANGE or key.startswith(("cluster.", "tracking.")) or key.endswith("deadline_s"))
    }


def _identity(config: Config, verifier: str | None) -> str:
    """Of the lasting settings and of what they name: other prompts or another model make another run."""
    digest = hashlib.sha256(json.dumps([_lasting(config), verifier]).encode())
    task, judge, others = config.task, config.judge, (config.search.rubric, config.learner.replay_path)
    for path in (task.path, task.test_path, judge.rubric, judge.principles, *others):
        if path is not None:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    for model, key in ((config.model.path, "model.path"), (judge.model, "judge.model")):
        if model is not None:
            digest.update(fingerprint(find_model(model, key)).encode())
    return digest.hexdigest()[:16]


def _is_finished(ledger: Ledger, config: Config) -> bool:
    """Whether there is nothing left to do."""
    known, last = ledger.run(), ledger.resume_point()
    ended = known is not None and known.status is RunStatus.FINISHED
    return ended and last is not None and last.iteration >= config.pipeline.iterations


def _check_unchanged(config: Config, path: Path) -> None:
    before, now = _lasting(compose([], path)), _lasting(config)
    if changed := [f"{key}={now[key]} (was {before[key]})" for key in before if before[key] != now[key]]:
        raise ConfigError(
            f"{', '.join(changed)}: cannot change when a run is resumed; start a new run from its config instead:"
            f" agon run --config {path} run_dir=... {changed[0].partition(' ')[0]}"
        )


class Run:
    """One process's work on a run folder."""

    def __init__(self, config: Config, inputs: Inputs, ledger: Ledger) -> None:
        self._config = config
        self._inputs = inputs
        self._ledger = ledger
        self._run_dir = inputs.run_dir
        console = make_console(config.tracking.console)
        wandb = WandbTracker(config.tracking, notify=console.message)
        self._tracker: Tracker = Trackers([JsonlTracker(), wandb, console])
        self._events = EventLog(self._run_dir, show=self._tracker.message)
        self._seconds: dict[str, float] = {}
        self._children_before = children()

    def go(self) -> int:
        """Runs to the end, to an error or to a signal; leaves `summary.json` in each case."""
        with _signals_restored():
            return self._say_goodbye(*self._go())

    def _go(self) -> tuple[RunStatus, str | None]:
        """How it ended, and the error that it ended with."""
        status = RunStatus.FAILED
        error: str | None = "the process ended without a word"
        stopped: Event | None = None
        try:
            with _signals_interrupt():
                self._run()
            status, error = RunStatus.FINISHED, None
        except KeyboardInterrupt:
            status, error = RunStatus.INTERRUPTED, None
        except Exception as failure:  # noqa: BLE001 - whatever it was is recorded, shown, and ends in exit code 1
            kind = kind_of(failure)
            error = disk_error(failure, self._run_dir) or (
                traceback.format_exc() if kind is FailureKind.BUG else str(failure)
            )
            stopped = Event(kind=EventKind.STOPPED, failure=kind, text=f"stopped: {error}")
        finally:
            try:
                self._end(status, error, stopped)
            except (OSError, sqlite3.DatabaseError) as failure:
                why = disk_error(failure, self._run_dir) or str(failure)
                _say(f"how the run ended could not be noted: {why}", sys.stderr)
                status, error = RunStatus.FAILED, error or why
        return status, error

    def _end(self, status: RunStatus, error: str | None, stopped: Event | None) -> None:
        with ExitStack() as last:  # each of these is done whatever the others raise
            last.callback(end_children, self._children_before)
            last.callback(self._tracker.finish, status)
            last.callback(self._write_summary)
            last.callback(self._ledger.end, status, error)
            last.callback(self._shut_down_ray)
            last.callback(self._events.close)
            if stopped is not None:
                last.callback(self._events, stopped)

    def _run(self) -> None:
        share_one_heap()
        self._write_summary()  # and again with each iteration: it is there even when this process is killed
        config, last = self._config, self._ledger.resume_point()
        self._tracker.start(
            RunInfo(
                recipe=config.recipe.name,
                seed=config.seed,
                run_dir=self._run_dir,
                iterations=config.pipeline.iterations,
                start_iteration=last.iteration + 1 if last else 0,
                config=asdict(config),
            )
        )
        with self._stage("warm start" if config.model.kind == "tiny" else "prepare"):
            model_dir = prepare_initial_model(config, self._run_dir, self._show_warm_start)
            config = prepare_judge_model(config, self._run_dir, model_dir, self._show_judge_training)
        # Read as Ray is imported: an event says the same of a death, with who and what it did.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
        from launch.wiring import build_context
        from orchestrator.controller import Controller
        from orchestrator.watchdog import Watchdog

        with Watchdog(self._events, config.cluster.stall_s):
            with self._stage("start"):
                self._warn_of_few_problems()
                context = build_context(
                    config, self._inputs, model_dir, ledger=self._ledger, tracker=self._tracker, emit=self._events
                )
            Controller(context).run()
            with self._stage("export"):
                # By the learner, which has loaded all that it takes.
                write = partial(context.learning.call, "export", what="export")
                export(self._run_dir, self._run_dir / "model", replace=True, write=write)

    def _write_summary(self) -> None:
        write_summary(self._run_dir, build_summary(self._ledger, seconds=self._seconds))

    def _shut_down_ray(self) -> None:
        # Imported when the actors were: a run that stops before needs no Ray to be shut down.
        if ray := sys.modules.get("ray"):
            ray.shutdown()
        forget_everybody()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        last = self._ledger.resume_point()
        self._tracker.stage(last.iteration if last else 0, name)
        start = time.monotonic()
        yield
        self._seconds[name.replace(" ", "_")] = time.monotonic() - start

    def _warn_of_few_problems(self) -> None:
        """What is measured on a handful says little, and the interval alone may go unnoticed."""
        evaluation, found = self._config.evaluation, len(self._inputs.test_prompts)
        asked = evaluation.final_problems
        if evaluation.scorer == "none" or found >= asked:
            return
        if found < _FEW_PROBLEMS:
            self._tracker.message(
                f"only {found} held-out prompts to evaluate on: raise task.test_fraction, or name a file of them"
                " (task.test_path)"
            )
        else:
            self._tracker.message(f"{found} prompts are held out: evaluation.final_problems={asked} takes all of them")

    def _show_warm_start(self, step: int, total: int, loss: float, accuracy: float) -> None:
        self._tracker.progress("warm start", step, total, 0)

    def _show_judge_training(self, step: int, total: int, loss: float) -> None:
        self._tracker.progress("judge training", step, total, 0)

    def _say_goodbye(self, status: RunStatus, error: str | None) -> int:
        """The last lines: what happened, where it is, what to do next."""
        folder, agon = _shown(self._run_dir), _command()
        if status is RunStatus.FINISHED:
            _say(f"accuracy        {_headline(build_summary(self._ledger)['accuracy'])}")
            _say(f"run folder      {folder}  (summary.json, metrics.jsonl, rollouts/, pairs/)")
            _say(f"exported model  {folder / 'model'}")
            _say(f"next            {_ask(agon, folder / 'model', self._inputs.task)}")
            _say(f"                {agon} status {folder}")
            return 0
        finished = self._ledger.resume_point()
        done = f"iteration {finished.iteration} is finished" if finished else "no iteration was finished"
        if status is RunStatus.INTERRUPTED:
            _say(f"interrupted: {done}; go on with: {agon} run --resume {folder}", sys.stderr)
            return 130
        _say(f"error: {error}", sys.stderr)
        _say(f"{done}. Once the cause is mended, go on with: {agon} run --resume {folder}", sys.stderr)
        _say(f"With other settings: {agon} run --config {folder / 'config.yaml'} key=value", sys.stderr)
        return 1


def _headline(accuracy: dict[str, Any]) -> str:
    """``greedy 67.4% -> 99.1%, sampled 32.5% -> 86.0% (1,024 held-out problems)``."""
    start, end = accuracy["start"], accuracy["end"]
    if not end["greedy"]:
        return "no iteration was evaluated"
    shown = ", ".join(f"{kind} {start[kind]['value']:.1%} -> {end[kind]['value']:.1%}" for kind in end)
    n = end["greedy"]["n"]
    return f"{shown} ({n:,} held-out problem{'s' * (n != 1)})"


def _command() -> str:
    """How to call this program again: by its name where that is found, else as it was called."""
    if shutil.which("agon"):
        return "agon"
    return f"{sys.executable} -m launch" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _shown(folder: Path) -> Path:
    """As short as it can be typed from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _say(text: str, stream: Any = None) -> None:
    print(printable(text), file=stream or sys.stdout, flush=True)


def _ask(agon: str, model: Path, task: Task) -> str:
    """The command that asks the model a held-out problem as it was asked in the run, whose prompt may end its line."""
    content = task.test(1)[0].content
    text = content if isinstance(content, str) else content[-1].content
    if len(text) > _MOST_SHOWN:
        text = "your prompt"
    if text.endswith("\n"):
        return f"echo {shlex.quote(text[:-1])} | {agon} generate {model} -"
    return f"{agon} generate {model} {shlex.quote(text)}"


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM stops the block as ctrl-C does: cluster jobs are stopped that way. Behind it neither does anything.

    A second ctrl-C must not break the writing of the summary, nor one that comes as the block ends.
    """
    for number in _STOPS:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Whatever the block makes of signals is undone at its end."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
