"""The implicit reward of a policy: how much likelier it says something than the model it comes from.

    r(x, y) = beta (log pi(y|x) - log pi_0(y|x))

What DPO trains is this reward up to a function of the prompt (Rafailov et al. 2023, arXiv:2305.18290, eq. 5), so scores
of different prompts cannot be compared. The sum grows with length in either direction; the mean over tokens does not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from actors.judges.consistency import consistency, consistent_table, kendall_tau
from actors.judges.reliability import Reliability
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from conf.schema import JudgeConfig
    from orchestrator.judging import EarlierPolicy, TextModel, Tokens
    from orchestrator.tally import Tally
    from orchestrator.types import RolloutGroup

    Logprobs = NDArray[np.float32]


class Implicit:
    """Scores completions by the log-ratio of two models with one tokenizer.

    With `consistency` the scores stay what they are, and each comparison gets for its probability how far the ranking
    by this policy agrees with that by the one before: its own log-ratios, or, before the first iteration, the mean
    log-prob per token of the initial model, which has no model to be compared with (as the authors' code has it).

    Args:
        policy: numerator.
        initial: denominator.
        previous: the policy before, for `consistency`.
        beta: of the loss, in whose units the scores are.
        length_normalized: mean over the completion's tokens, its EOS included, instead of their sum.
        consistency: "none", or of each "prompt" or the "mean" of all (`actors/judges/consistency.py`).
    """

    def __init__(
        self,
        policy: TextModel,
        initial: TextModel,
        previous: EarlierPolicy,
        *,
        beta: float,
        length_normalized: bool,
        consistency: str,
    ) -> None:
        self._policy, self._initial, self._previous = policy, initial, previous
        self._beta, self._length_normalized, self._consistency = beta, length_normalized, consistency
        self._reliability = Reliability()
        self._agreements: list[float] = []

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        kind = "mean" if self._length_normalized else "sum"
        cream = "" if self._consistency == "none" else f":consistency={self._consistency}"
        return f"implicit:{kind}{cream}:{self._policy.version}/{self._initial.version}@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. Completions that were aborted or have no token are abstained on."""
        places = [
            (g, c)
            for g, group in enumerate(groups)
            for c, completion in enumerate(group.completions)
            if completion.token_ids and completion.finish_reason is not FinishReason.ABORTED
        ]
        sequences = [(groups[g].prompt.token_ids, groups[g].completions[c].token_ids) for g, c in places]
        initial = self._initial.logprobs(sequences) if sequences else []
        rewards = self._rewards(self._policy.logprobs(sequences) if sequences else [], initial)
        silent = Score(value=None, reason="the completion was aborted or has no token")
        unread = Score(value=None, reason="it kills whoever computes its log-probs")
        by_place = {
            place: unread if math.isnan(reward) else Score(value=self._beta * reward)
            for place, reward in zip(places, rewards, strict=True)
        }
        scored = [
            ScoredGroup(
                group=group,
                scores=tuple(by_place.get((g, c), silent) for c in range(len(group.completions))),
                scorer=self.name,
            )
            for g, group in enumerate(groups)
        ]
        if self._consistency != "none" and sequences:
            before = dict(zip(places, self._ranked_before(sequences, initial), strict=True))
            scored = self._labelled(scored, before)
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> Tally:
        """See `Judge.metrics`; `judge/consistency` is the mean of all prompts."""
        found = self._reliability.report()
        found.mean("judge/consistency", self._agreements)
        self._agreements = []
        return found

    def _rewards(self, policy: Sequence[Logprobs], initial: Sequence[Logprobs]) -> list[float]:
        ratios = (one.astype(np.float64) - other for one, other in zip(policy, initial, strict=True))
        return [float(ratio.mean() if self._length_normalized else ratio.sum()) for ratio in ratios]

    def _ranked_before(self, sequences: Sequence[tuple[Tokens, Tokens]], initial: Sequence[Logprobs]) -> list[float]:
        previous = self._previous.logprobs(sequences)
        return [float(one.mean()) for one in initial] if previous is None else self._rewards(previous, initial)

    def _labelled(self, scored: Sequence[ScoredGroup], before: Mapping[tuple[int, int], float]) -> list[ScoredGroup]:
        found: dict[int, float] = {}
        for g, group in enumerate(scored):
            known = [(score.value, before[g, c]) for c, score in enumerate(group.scores) if score.value is not None]
            if len(known) > 1:
                found[g] = consistency(kendall_tau(*zip(*known, strict=True)))
        self._agreements += found.values()
        mean = fmean(found.values()) if found else 0.5
        return [
            replace(
                group,
                preferences=consistent_table(
                    [score.value for score in group.scores],
                    found.get(g, mean) if self._consistency == "prompt" else mean,
                ),
            )
            for g, group in enumerate(scored)
        ]


def build_implicit(
    config: JudgeConfig, policy: TextModel, initial: TextModel, previous: EarlierPolicy, beta: float
) -> Implicit:
    """The implicit reward of `policy` over `initial`, with `loss.beta`."""
    return Implicit(
        policy,
        initial,
        previous,
        beta=beta,
        length_normalized=config.length_normalized,
        consistency=config.consistency,
    )
