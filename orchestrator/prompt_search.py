"""One prompt's search: which rollouts it asks for next, and what became of those it asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.search.mcts import cancel, grow, revisit, select
from actors.search.pairs import best_path
from actors.search.tree import Tree
from orchestrator.rollouts import sampling_of
from orchestrator.seeds import derive_seed
from orchestrator.types import GenerationRequest, RolloutGroup, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.search.tree import Node, Step
    from conf.schema import Config
    from orchestrator.types import Completion, FinishReason, Prompt, Score


class PromptSearch:
    """One prompt's tree and what its rollouts were.

    Args:
        prompt: what is solved.
        iteration: of the run.
        config: `search`, and how the generators sample.
    """

    def __init__(self, prompt: Prompt, iteration: int, config: Config) -> None:
        self.prompt = prompt
        self.iteration = iteration
        self.seed = derive_seed(config.seed, "search", iteration, prompt.id)
        self.tree = Tree()
        self.completions: list[Completion] = []
        self.scores: list[Score] = []
        self.finish: dict[int, FinishReason] = {}
        self.outcomes: dict[int, float] = {}
        """Scores of finished solutions, by node."""
        self.scorer = ""
        self._config = config
        self._started = 0

    def select(self) -> list[tuple[PromptSearch, Node]]:
        """The leaves of the next wave. Visits of finished solutions cost nothing and are made on the way."""
        config = self._config.search
        leaves: list[tuple[PromptSearch, Node]] = []
        while len(leaves) < config.in_flight and (node := select(self.tree, config)) is not None:
            if node.terminal:
                revisit(self.tree, node, config)
            else:
                leaves.append((self, node))
        return leaves

    def request(self, node: Node, index: int) -> GenerationRequest:
        """A rollout from `node`, with what is left of the longest completion."""
        self._started += 1
        state = self.tree.tokens_to(node)
        sampling = sampling_of(self._config.generator)
        return GenerationRequest(
            id=f"search/{self.iteration}/{self.prompt.id}/{self._started}/{index}",
            prompt_token_ids=self.prompt.token_ids + state,
            sampling=replace(sampling, max_tokens=max(1, sampling.max_tokens - len(state))),
            seed=derive_seed(self.seed, self._started),
            cache_scope=f"search/{self.iteration}/{self.prompt.id}",
        )

    def take(
        self,
        node: Node,
        answer: Completion,
        whole: Completion,
        score: Score,
        steps: Sequence[Step],
        values: Sequence[float] | None,
    ) -> None:
        """Grows the tree by a rollout.

        Args:
            node: where the rollout began.
            answer: the rollout.
            whole: the solution that ends with it.
            score: of the solution.
            steps: of the rollout.
            values: beside the score, of the states that the steps lead to; None where something was left unsaid: then
                the rollout leaves no node and no value behind.
        """
        self.completions.append(whole)
        self.scores.append(score)
        if values is None or score.value is None:
            cancel(self.tree, node, len(answer.token_ids))
            return
        end = grow(self.tree, node, steps, score.value + values[-1], self._config.search, values[:-1])
        self.finish[end.index], self.outcomes[end.index] = answer.finish_reason, score.value

    def tokens_after(self, node: Node, steps: Sequence[Step]) -> tuple[int, ...]:
        """Of all steps to `node`, and of those from there."""
        return self.tree.tokens_to(node) + tuple(token for step in steps for token in step.tokens)

    def good_enough(self) -> bool:
        """Whether the tree's own solution scores `search.min_score` or more."""
        least = self._config.search.min_score
        return least is None or self.outcomes.get(best_path(self.tree)[-1].index, -math.inf) >= least

    def scored(self) -> ScoredGroup:
        """Every rollout with its score."""
        group = RolloutGroup(
            prompt=self.prompt, completions=tuple(self.completions), iteration=self.iteration, seed=self.seed
        )
        return ScoredGroup(group=group, scores=tuple(self.scores), scorer=self.scorer)
