"""A trained model that compares: every two answers of a group, and from that how often each beats the policy.

An answer's score is P(y beats pi), the mean of its row of the win matrix, or the mean of its row of logits. Answers
that cannot be read are left out of all rows and get no score.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.judges.win_rates import aggregated, mean_scores, win_matrix, win_rates
from learners.preference.folder import load_model
from learners.preference.records import Comparison, Group
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from actors.judges.win_rates import Matrix
    from conf.schema import JudgeConfig
    from learners.preference.encoding import Encoder
    from learners.preference.folder import LoadedModel
    from learners.preference.records import Tokens
    from orchestrator.types import Completion, RolloutGroup


class PreferenceScorer:
    """Compares with a model of `learners.preference`, whichever of its kinds.

    Args:
        loaded: the model.
        win_probability: "pairwise" or "aggregated"; see `JudgeConfig.win_probability`.
        score: "win_rate" or "mean_logit"; see `JudgeConfig.score`.
    """

    def __init__(self, loaded: LoadedModel, *, win_probability: str = "pairwise", score: str = "win_rate") -> None:
        self._model = loaded.model
        self._encoder = loaded.encoder
        self._aggregate = win_probability == "aggregated"
        self._mean_logit = score == "mean_logit"
        suffix = ("+aggregated" if self._aggregate else "") + ("+mean_logit" if self._mean_logit else "")
        self.name = f"preference_model:{loaded.model.head.kind}@{loaded.digest[:8]}{suffix}"

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """See `Scorer.score`."""
        answers, reasons = read_answers(self._encoder, group)
        logits = self._compare(self._encoder.prompt(group.prompt.text), answers)
        wins = win_matrix(aggregated(logits) if self._aggregate else logits)
        rates = mean_scores(logits) if self._mean_logit else win_rates(wins)
        known = np.isfinite(wins).sum(axis=1)
        scores = []
        for index, reason in enumerate(reasons):
            if not reason and known[index] < 2:
                reason = "there is no other completion that it could be compared with"
            scores.append(Score(value=None if reason else float(rates[index]), reason=reason))
        preferences = tuple(
            tuple(float(value) if np.isfinite(value) and answers[i] else None for value in row)
            for i, row in enumerate(wins)
        )
        return ScoredGroup(group=group, scores=tuple(scores), scorer=self.name, preferences=preferences)

    @torch.inference_mode()
    def _compare(self, prompt: Tokens, answers: list[Tokens]) -> Matrix:
        """L [K][K]; NaN where one of the two is missing, or both together are too long to be read side by side."""
        logits = np.full((len(answers), len(answers)), np.nan)
        pairs = [(i, j) for i, j in combinations(range(len(answers)), 2) if self._fit(prompt, answers[i], answers[j])]
        if pairs:
            comparisons = tuple(Comparison(first=i, second=j) for i, j in pairs)
            values = self._model([Group(prompt=prompt, answers=tuple(answers), comparisons=comparisons)])
            first, second = np.array(pairs).T
            logits[first, second] = values.double().cpu().numpy()
            logits[second, first] = -logits[first, second]
        return logits

    def _fit(self, prompt: Tokens, first: Tokens, second: Tokens) -> bool:
        together = self._model.head.kind == "preference_model"
        length = len(prompt) + (len(first) + len(second) if together else max(len(first), len(second)))
        return bool(first) and bool(second) and length <= self._encoder.max_length


def read_answers(encoder: Encoder, group: RolloutGroup) -> tuple[list[Tokens], list[str]]:
    """Tokens of each completion, and why a model cannot judge it; empty where it can, empty tokens where it cannot."""
    prompt = len(encoder.prompt(group.prompt.text))
    answers: list[Tokens] = []
    reasons = []
    for completion in group.completions:
        tokens, reason = _read(encoder, completion, prompt)
        answers.append(tokens)
        reasons.append(reason)
    return answers, reasons


def _read(encoder: Encoder, completion: Completion, prompt: int) -> tuple[Tokens, str]:
    if completion.finish_reason is FinishReason.ABORTED:
        return (), "the completion was aborted"
    tokens = encoder.answer(completion.text, ended=completion.finish_reason is not FinishReason.LENGTH)
    if not tokens:
        return (), "the completion is empty"
    if prompt + len(tokens) > encoder.max_length:
        return (), f"prompt and completion have {prompt + len(tokens)} tokens; the judge reads {encoder.max_length}"
    return tokens, ""


def build_preference_scorer(folder: str, config: JudgeConfig) -> PreferenceScorer:
    """The scorer of a folder, on the GPU where there is one. Raises ModelError where the folder cannot be loaded."""
    return PreferenceScorer(load_for_judging(folder), win_probability=config.win_probability, score=config.score)


def load_for_judging(folder: str) -> LoadedModel:
    """A preference or reward model on the GPU in bfloat16, or on the CPU in float32."""
    cuda = torch.cuda.is_available()
    loaded = load_model(folder, dtype=torch.bfloat16 if cuda else torch.float32)
    loaded.model.to("cuda" if cuda else "cpu")
    return loaded
