"""The implicit reward of a policy: how much likelier it says something than the model it comes from.

    r(x, y) = beta (log pi(y|x) - log pi_0(y|x))

What DPO trains is this reward up to a function of the prompt (Rafailov et al. 2023, arXiv:2305.18290, eq. 5), so scores
of different prompts cannot be compared. The sum grows with length in either direction; the mean over tokens does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actors.judges.reliability import Reliability
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from conf.schema import JudgeConfig
    from orchestrator.judging import TextModel
    from orchestrator.types import RolloutGroup


class Implicit:
    """Scores completions by the log-ratio of two models with one tokenizer.

    Args:
        policy: numerator.
        initial: denominator.
        beta: of the loss, in whose units the scores are.
        length_normalized: mean over the completion's tokens, its EOS included, instead of their sum.
    """

    def __init__(self, policy: TextModel, initial: TextModel, *, beta: float, length_normalized: bool) -> None:
        self._policy, self._initial = policy, initial
        self._beta, self._length_normalized = beta, length_normalized
        self._reliability = Reliability()

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        kind = "mean" if self._length_normalized else "sum"
        return f"implicit:{kind}:{self._policy.version}/{self._initial.version}@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. Completions that were aborted or have no token are abstained on."""
        judged = [
            (g, c)
            for g, group in enumerate(groups)
            for c, completion in enumerate(group.completions)
            if completion.token_ids and completion.finish_reason is not FinishReason.ABORTED
        ]
        sequences = [(groups[g].prompt.token_ids, groups[g].completions[c].token_ids) for g, c in judged]
        ratios = [
            self._reduced(policy.astype(np.float64) - initial.astype(np.float64))
            for policy, initial in zip(
                self._policy.logprobs(sequences) if sequences else [],
                self._initial.logprobs(sequences) if sequences else [],
                strict=True,
            )
        ]
        scores = {place: Score(value=self._beta * ratio) for place, ratio in zip(judged, ratios, strict=True)}
        silent = Score(value=None, reason="the completion was aborted or has no token")
        scored = [
            ScoredGroup(
                group=group,
                scores=tuple(scores.get((g, c), silent) for c in range(len(group.completions))),
                scorer=self.name,
            )
            for g, group in enumerate(groups)
        ]
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> dict[str, float]:
        """See `Judge.metrics`."""
        return self._reliability.report()

    def _reduced(self, ratios: NDArray[np.float64]) -> float:
        return float(ratios.mean() if self._length_normalized else ratios.sum())


def build_implicit(config: JudgeConfig, policy: TextModel, initial: TextModel, beta: float) -> Implicit:
    """The implicit reward of `policy` over `initial`, with `loss.beta`."""
    return Implicit(policy, initial, beta=beta, length_normalized=config.length_normalized)
