r"""Stepwise self-evaluation: the model's own probability that each step is right, all steps in one forward pass.

    what is scored     J5305+2471\n5+1+0=06:06Y\n0+7+0=07:07Y\n...#07776:07776Y
    what is read                               ^^^           ^^^             ^^^^^^

Behind each step the judge writes the step's result itself, and then its verdict. The scored text holds the step's own
result and "yes" there, so that one forward pass reads the probability that the judge comes to the same result and
approves of it, at every step, had those before been right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from actors.judges.reliability import Reliability
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from conf.schema import JudgeConfig
    from orchestrator.judging import TextModel
    from orchestrator.types import Completion, RolloutGroup

    Tokens = tuple[int, ...]


class StepJudge:
    """Scores completions by the mean, over their steps, of the probability that the judge approves of the step.

    Args:
        model: the policy itself, or a judge of its own; taught to judge this way (`launch/judge_start.py`).
        config: `head`, `derive` and `yes` are read.
    """

    def __init__(self, model: TextModel, config: JudgeConfig) -> None:
        self._model = model
        self._begin = len(model.encode(""))
        self._head = model.encode(config.head)
        self._yes = config.yes
        self._result = (
            re.compile(f"[{re.escape(config.derive)}]([^{re.escape(config.derive)}]*)$") if config.derive else None
        )
        self._reliability = Reliability()

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"step_judge:{self._model.version}@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. A completion that did not end by itself has no last step and is abstained on."""
        name = self.name
        scores = [[Score(value=None, reason="it did not end by itself") for _ in group.completions] for group in groups]
        asked: list[tuple[int, int, Tokens, Tokens, list[slice]]] = []
        for number, group in enumerate(groups):
            prompt = self._head + group.prompt.token_ids[self._begin :]
            for index, completion in enumerate(group.completions):
                if completion.finish_reason is not FinishReason.EOS or not completion.text:
                    continue
                tokens, places = self._with_verdicts(completion)
                if len(prompt) + len(tokens) <= self._model.max_length:
                    asked.append((number, index, prompt, tokens, places))
                else:
                    scores[number][index] = Score(value=None, reason="with its verdicts it is longer than the context")
        read = self._model.logprobs([(prompt, tokens) for _, _, prompt, tokens, _ in asked])
        for (number, index, _, _, places), logprobs in zip(asked, read, strict=True):
            scores[number][index] = Score(value=_approval(logprobs, places))
        scored = [
            ScoredGroup(group=group, scores=tuple(found), scorer=name)
            for group, found in zip(groups, scores, strict=True)
        ]
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> dict[str, float]:
        """See `Judge.metrics`."""
        return self._reliability.report()

    def _with_verdicts(self, completion: Completion) -> tuple[Tokens, list[slice]]:
        """The completion with an approval behind each step, and where in its tokens the approvals stand."""
        tokens: list[int] = []
        places: list[slice] = []
        for line in completion.text.splitlines(keepends=True):
            step = line.removesuffix("\n")
            tokens += self._encode(f"{step}:")
            approval = self._encode(self._derived(step) + self._yes)
            places.append(slice(len(tokens), len(tokens) + len(approval)))
            tokens += approval + self._encode(line.removeprefix(step))
        return tuple(tokens), places

    def _derived(self, step: str) -> str:
        found = self._result and self._result.search(step)
        return found[1] if found else ""

    def _encode(self, text: str) -> Tokens:
        return self._model.encode(text)[self._begin :]


def _approval(logprobs: NDArray[np.float32], places: list[slice]) -> float:
    """Mean over the steps of the probability of the whole approval."""
    return float(np.mean([np.exp(logprobs[place].astype(np.float64).sum()) for place in places]))
