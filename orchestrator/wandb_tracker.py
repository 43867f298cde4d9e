"""Weights & Biases: metrics by iteration and by step, the configuration, and a table of sampled pairs.

Offline unless there is a key; offline it neither asks for one nor touches the network. A network or a wandb that fails
costs the record, never the run: what was recorded stays in `<run>/wandb` and can be uploaded with `wandb sync`. The
errors that wandb raises have no base in common, so that here, and only around calls of wandb, every error is caught;
each is reported in one line.
"""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from contextlib import ExitStack, suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import psutil

from orchestrator.errors import ConfigError
from orchestrator.ledger import RunStatus
from orchestrator.tracking import RunInfo, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from conf.schema import TrackingConfig
    from orchestrator.types import PreferencePair

Mode = Literal["online", "offline", "disabled"]

_INIT_TIMEOUT_S = 20
_FINISH_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 3
"""Of each of two waits where the run was broken off, and somebody waits for the terminal."""
_TABLE_ROWS = 16
_COLUMNS = ["iteration", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin", "scorer"]
_BY_ITERATION = ("rollout/*", "pairs/*", "train/*", "eval/*", "time/*", "throughput/*")


def wandb_mode(choice: str) -> Mode:
    """`online`, `offline` or `disabled`, from `tracking.wandb` and from what wandb would find: its mode and its key.

    Raises:
        ConfigError: `online` is asked for and there is no key.
    """
    if choice == "auto":
        choice = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if choice == "disabled":
        return "disabled"
    if choice != "online":
        return "offline"
    if not _has_key():
        raise ConfigError(
            "wandb is to be online, but no key was found: set WANDB_API_KEY, run `wandb login`, or use"
            " tracking.wandb=offline"
        )
    return "online"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker(Tracker):
    """One wandb run for a run folder: a run that is resumed goes on under the same id.

    Args:
        config: mode, project, group.
        notify: told in one line when wandb has to be given up, or goes on offline.
    """

    def __init__(self, config: TrackingConfig, notify: Callable[[str], None]) -> None:
        self._config = config
        self._notify = notify
        self._run: Any = None
        self._cleanup = ExitStack()

    def start(self, run: RunInfo) -> None:
        """Opens the wandb run; offline where the server does not answer.

        Raises:
            ConfigError: `online` is asked for and there is no key.
        """
        mode = wandb_mode(self._config.wandb)
        if mode == "disabled":
            return
        folder = run.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._cleanup.callback(_restore_environment, dict(os.environ))
        self._cleanup.callback(_stop_service)  # of which there may be one from here on, whatever breaks off `init`
        os.environ |= {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
        self._run = self._init(run, mode)
        if self._run is None and mode == "online":
            self._run = self._init(run, "offline")
        self._attempt(_define_metrics)

    def _init(self, run: RunInfo, mode: Mode) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
        )
        try:
            return wandb.init(
                project=self._config.project,
                group=self._config.group,
                name=run.run_dir.name,
                id=_run_id(run.run_dir / "wandb" / "run-id"),
                resume="allow",
                dir=run.run_dir,
                config=dict(run.config),
                mode=mode,
                settings=settings,
            )
        except Exception as error:  # noqa: BLE001 - see above
            self._notify(f"wandb: could not start {mode}: {_first_line(error)}")
            _stop_service()  # which holds the run's id
            return None

    def log(self, metrics: Mapping[str, float], *, iteration: int, step: int) -> None:
        """Logs scalars."""
        self._attempt(lambda run: run.log({"iteration": iteration, "step": step, **metrics}))

    def pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Logs a table of pairs, evenly spaced over those of the iteration."""
        if self._run is None or not pairs:
            return
        import wandb

        shown = pairs[:: -(-len(pairs) // _TABLE_ROWS)]
        table = wandb.Table(columns=_COLUMNS, data=[_row(pair) for pair in shown])
        self._attempt(lambda run: run.log({"iteration": shown[0].iteration, "pairs/examples": table}))

    def finish(self, status: RunStatus) -> None:
        """Uploads what is left and ends wandb's service process: within a minute, or seconds if the run broke off."""
        if status is RunStatus.FINISHED:
            self._attempt(lambda run: run.finish(exit_code=0))
        elif self._run is not None:
            _within(_STOP_TIMEOUT_S, partial(self._run.finish, exit_code=1))
        self._give_up()

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        """Does something with the run; when wandb fails, the run goes on without it."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001 - see above
            self._notify(f"wandb: recording ended: {_first_line(error)}; the run goes on")
            self._give_up()

    def _give_up(self) -> None:
        self._run = None
        self._cleanup.close()


def _stop_service() -> None:
    if wandb := sys.modules.get("wandb"):
        _within(_STOP_TIMEOUT_S, wandb.teardown)


def _within(seconds: float, action: Callable[[], Any]) -> None:
    """Does something with wandb's service, and kills the service where that takes longer."""

    def work() -> None:
        # See above; and where its service is gone already, which is what is asked for, wandb wants to leave Python.
        with suppress(Exception, SystemExit):
            action()

    worker = Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        for process in psutil.Process().children():
            with suppress(psutil.Error):  # it ended by itself
                if "wandb" in process.name():
                    process.kill()
                    process.wait(1)


def _define_metrics(run: Any) -> None:
    run.define_metric("iteration", hidden=True)
    run.define_metric("step", hidden=True)
    run.define_metric("step/*", step_metric="step")
    for names in _BY_ITERATION:
        run.define_metric(names, step_metric="iteration")


def _row(pair: PreferencePair) -> list[Any]:
    scores = [pair.chosen_score, pair.rejected_score, pair.margin]
    return [pair.iteration, pair.prompt.text, pair.chosen.text, pair.rejected.text, *scores, pair.scorer]


def _run_id(path: Path) -> str:
    """The wandb id of this run folder, drawn once."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in ("WANDB_SILENT", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
