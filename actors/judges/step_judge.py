r"""Stepwise self-evaluation: the model's own probability that each step is right, all steps in one forward pass.

    what is scored     J5305+2471\n5+1+0=06Y\n0+7+0=07Y\n...#07776Y
    what is read                               ^          ^          ^  P(Y) at each

The verdict follows each step in line. The text holds "yes" at all of them, so that one pass reads every probability;
each is the probability of yes given the steps before, had they all been right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from conf.schema import JudgeConfig
    from orchestrator.judging import TextModel
    from orchestrator.types import Completion, RolloutGroup

    Tokens = tuple[int, ...]


class StepJudge:
    """Scores completions by the probability that all of their steps are right.

    Args:
        model: the policy itself, or a judge of its own.
        config: `head` and `yes` are read.

    Raises:
        ValueError: `yes` is not one token of the model's.
    """

    def __init__(self, model: TextModel, config: JudgeConfig) -> None:
        self._model = model
        self._head = model.encode(config.head)
        begin = len(model.encode(""))
        self._begin = begin
        self._yes = model.encode(config.yes)[begin:]
        if len(self._yes) != 1:
            raise ValueError(f"judge.yes={config.yes!r} has {len(self._yes)} tokens; a step_judge needs one")
        self._unjudged = self._judged = 0

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"step_judge:{self._model.version}@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. A completion that did not end by itself has no last step and is abstained on."""
        sequences, owners = [], []
        for number, group in enumerate(groups):
            question = group.prompt.token_ids[self._begin :]
            for index, completion in enumerate(group.completions):
                if completion.finish_reason is FinishReason.EOS and completion.text:
                    sequences.append((self._head + question, self._with_verdicts(completion)))
                    owners.append((number, index))
        scores = [[Score(value=None, reason="it did not end by itself") for _ in g.completions] for g in groups]
        read = self._model.logprobs([(prompt, tokens) for prompt, (tokens, _) in sequences])
        for (number, index), (_, (_, places)), logprobs in zip(owners, sequences, read, strict=True):
            scores[number][index] = Score(value=_all_right(logprobs[places]))
        self._judged += len(owners)
        self._unjudged += sum(len(group.completions) for group in groups) - len(owners)
        return [
            ScoredGroup(group=group, scores=tuple(found), scorer=self.name)
            for group, found in zip(groups, scores, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """See `Judge.metrics`."""
        total = self._judged + self._unjudged
        found = {"judge/abstained_fraction": self._unjudged / total} if total else {}
        self._judged = self._unjudged = 0
        return found

    def _with_verdicts(self, completion: Completion) -> tuple[Tokens, NDArray[np.int64]]:
        """The completion with a yes before each line end and at its own end, and where these stand."""
        tokens: list[int] = []
        places: list[int] = []
        for line in completion.text.splitlines(keepends=True):
            step = line.removesuffix("\n")
            tokens += self._model.encode(step)[self._begin :]
            places.append(len(tokens))
            tokens += self._yes
            if step != line:
                tokens += self._model.encode("\n")[self._begin :]
        return tuple(tokens), np.array(places)


def _all_right(logprobs: NDArray[np.float32]) -> float:
    """Probability that every step is right: the product of their probabilities."""
    return float(np.exp(logprobs.astype(np.float64).sum()))
