"""Scores generated Python code by unit tests: the reference answer is a script of asserts that follows the code.

Each completion has a confined process of its own (`actors/sandbox`), so that nothing is handed on from one to the next.
The process must send back a token that it is given only behind the last assert: leaving early, whatever the exit code,
or printing what success looks like, proves nothing.
"""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING

from actors.sandbox.process import FORGED, Confined, Limits, Stopped, new_token
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from conf.schema import ScorerConfig
    from orchestrator.types import Completion, Prompt, RolloutGroup

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_INSTALLED = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix})


class TestScorer:
    """1 where the tests hold; 0 where code or tests raise, leave, or run out of time or memory; the reason says which.

    It abstains where the prompt has no tests, the tests are no Python, or no process could be had.

    Raises:
        ConfigError: no confined process can be started here.
    """

    __test__ = False  # its name is not meant for pytest

    def __init__(self, config: ScorerConfig) -> None:
        self.name = "verifier:tests@1"
        self._start_s = config.start_deadline_s
        self._limits = Limits(time_s=config.call_timeout_s, memory_mb=config.call_memory_mb)
        try:
            self._process().close()
        except Stopped as stopped:
            raise ConfigError(
                f"scorer.verifier=tests: the process for code under test {stopped} when it was started, with"
                f" scorer.call_memory_mb={config.call_memory_mb}, scorer.start_deadline_s={self._start_s:g}: raise them"
            ) from stopped

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """See `Scorer.score`."""
        scores = tuple(self._judge(group.prompt, completion) for completion in group.completions)
        return ScoredGroup(group=group, scores=scores, scorer=self.name)

    def _judge(self, prompt: Prompt, completion: Completion) -> Score:
        if prompt.answer is None:
            return Score(value=None, reason="the prompt has no tests as its reference answer")
        if completion.finish_reason is FinishReason.ABORTED:
            return Score(value=None, reason="the completion was aborted")
        if completion.finish_reason is FinishReason.LENGTH:
            return Score(value=0.0, reason="the completion was cut off")
        try:
            process = self._process()
        except Stopped as stopped:
            return Score(value=None, reason=f"the process for the tests {stopped} when it was started")
        try:
            return _examine(process, code_of(completion.text), prompt.answer, self._limits.time_s)
        except Stopped as stopped:
            return Score(value=0.0, reason=f"the code {stopped}")
        finally:
            process.close()

    def _process(self) -> Confined:
        return Confined(self._limits, self._start_s, path=_packages())


def code_of(text: str) -> str:
    """The last fenced block of a completion, closed or not; the whole text where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _packages() -> list[str]:
    """Folders of Python's own and of installed modules, not of the project that is being worked on."""
    return [folder for folder in sys.path if folder.startswith(_INSTALLED)]


def _examine(process: Confined, code: str, tests: str, time_s: float) -> Score:
    deadline, token = time.monotonic() + time_s, new_token()
    process.send({"code": code}, deadline)
    reply = process.receive(deadline)
    if "ran" in reply:
        process.send({"tests": tests}, deadline)
        process.send({"token": token}, deadline)
        reply = process.receive(deadline)
    if reply.get("token") == token:
        return Score(value=1.0)
    if "unusable" in reply:
        return Score(value=None, reason=f"the tests cannot be compiled: {reply['unusable']}")
    return Score(value=0.0, reason=str(reply.get("failed", f"the code {FORGED}")))
