"""A trained model that gives each answer a scalar: higher is better, comparable within one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from actors.judges.preference_model import load_for_judging, read_answers
from orchestrator.errors import ModelError
from orchestrator.types import Score, ScoredGroup

if TYPE_CHECKING:
    from learners.preference.folder import LoadedModel
    from orchestrator.types import RolloutGroup


class RewardScorer:
    """Scores with a reward model of `learners.preference`, or a sequence classifier with one label."""

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.model.head.kind != "reward_model":
            raise ModelError(
                f"a {loaded.model.head.kind} compares and has no reward: choose scorer=preference_model, or name a"
                " reward model in judge.model"
            )
        self._model = loaded.model
        self._encoder = loaded.encoder
        self.name = f"reward_model@{loaded.digest[:8]}"

    @torch.inference_mode()
    def score(self, group: RolloutGroup) -> ScoredGroup:
        """See `Scorer.score`."""
        answers, reasons = read_answers(self._encoder, group)
        prompt = self._encoder.prompt(group.prompt.text)
        rows = [(prompt, answer) for answer in answers if answer]
        rewards = iter(self._model.rewards(rows).tolist() if rows else [])
        scores = tuple(Score(value=None if reason else next(rewards), reason=reason) for reason in reasons)
        return ScoredGroup(group=group, scores=scores, scorer=self.name)


def build_reward_scorer(folder: str) -> RewardScorer:
    """The scorer of a folder, on the GPU where there is one. Raises ModelError where it is no reward model."""
    return RewardScorer(load_for_judging(folder))
