"""Scores by a function of the user's.

It runs in a confined process (`actors/sandbox`), where it may be wrong, slow or greedy without harm to the run, and
sees none of the run's secrets.
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TYPE_CHECKING

from actors.sandbox.process import FORGED, Confined, Limits, Stopped
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from conf.schema import ScorerConfig
    from orchestrator.types import RolloutGroup

_WANTED = "scorer.function must be module.name of f(prompt, completion, answer) -> float | None"
LARGEST = 1e30
"""Scores beyond it are no scores: margins are float32, and so are sums of them."""
_ABORTED = Score(value=None, reason="the completion was aborted")


class FunctionScorer:
    """Asks the function; what it raises or returns amiss, and a call that ends its process, is an abstention.

    All completions of a group go to one process in one message. A process that ended, by the function or because a
    limit was hit, is replaced for the next completion.

    Args:
        config: `scorer.function` and its limits.

    Raises:
        ConfigError: there is no such function, or it does not take three arguments; of `score`: its file was changed.
    """

    def __init__(self, config: ScorerConfig) -> None:
        self._config = config
        self._limits = Limits(time_s=config.call_timeout_s, memory_mb=config.call_memory_mb)
        self._process: Confined | None = None
        self._process, self._version = self._start()
        self.name = f"verifier:{config.function}@{self._version}"

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """See `Scorer.score`."""
        scores: dict[int, Score] = {}
        waiting = []
        for index, completion in enumerate(group.completions):
            if completion.finish_reason is FinishReason.ABORTED:
                scores[index] = _ABORTED
            else:
                waiting.append(index)
        while waiting:
            scores |= self._call(group, waiting)
            waiting = [index for index in waiting if index not in scores]
        ordered = tuple(scores[index] for index in range(len(group.completions)))
        return ScoredGroup(group=group, scores=ordered, scorer=self.name)

    def _call(self, group: RolloutGroup, waiting: list[int]) -> dict[int, Score]:
        """The scores of some of the completions that wait, in order, at least of the first."""
        prompt, scores = group.prompt, dict[int, Score]()
        calls = [[index, prompt.text, group.completions[index].text, prompt.answer] for index in waiting]
        try:
            if self._process is None:
                self._process, version = self._start()
                if version != self._version:
                    raise ConfigError(
                        f"scorer.function={self._config.function}: its file was changed while the run goes on; scores"
                        " of two functions are not to be mixed: put it back and resume, or start a new run"
                    )
            self._process.send(calls, time.monotonic() + self._limits.time_s)
            for index in waiting:
                reply = self._process.receive(time.monotonic() + self._limits.time_s)
                if reply.get("call") != index:
                    raise self._process.stop(FORGED)
                scores[index] = _score(reply)
                if reply.get("spent"):  # it holds all that it may: later calls would fail for what earlier ones took
                    self._process.close()
                    self._process = None
                    break
        except Stopped as stopped:
            self._process = None
            limits = f"scorer.call_timeout_s={self._limits.time_s:g}, scorer.call_memory_mb={self._limits.memory_mb}"
            scores[waiting[len(scores)]] = Score(value=None, reason=f"the function {stopped} ({limits})")
        return scores

    def _start(self) -> tuple[Confined, str]:
        """A process with the function in it, and the digest of the file that it comes from."""
        dotted = self._config.function or ""
        if not all(dotted.rpartition(".")):
            raise ConfigError(f"{_WANTED}; found {self._config.function!r}.")
        path = [os.path.abspath(folder) for folder in sys.path]
        start_s = self._config.start_deadline_s
        try:
            process = Confined(self._limits, start_s, function=dotted, path=path)
            loaded = process.receive(time.monotonic() + start_s)
        except Stopped as stopped:
            raise ConfigError(
                f"{_WANTED}; importing {dotted.rpartition('.')[0]!r} {stopped}. It has scorer.start_deadline_s="
                f"{start_s:g} and scorer.call_memory_mb={self._limits.memory_mb}."
            ) from stopped
        if "version" not in loaded:
            process.close()
            raise ConfigError(f"{_WANTED}; {loaded.get('refused')}")
        return process, str(loaded["version"])


def _score(reply: dict[str, object]) -> Score:
    value = reply.get("value")
    if isinstance(value, float) and abs(value) > LARGEST:  # not true of NaN
        return Score(value=None, reason=f"the function returned {value:g}, beyond {LARGEST:g}")
    if isinstance(value, float) and math.isfinite(value):
        return Score(value=value)
    return Score(value=None, reason=str(reply.get("silent", "the function's process gave no usable reply")))
