"""Tree search over the generators: many trees and many leaves in flight at once.

    each wave   every tree selects up to `search.in_flight` leaves -> one batch of rollouts -> one batch of judgements
                -> every tree grows

A rollout goes on from the tokens of its leaf, whose keys and values the engine's prefix cache still holds, to the end
of the solution. A wave has as many requests as trees times leaves in flight, so that engines run full to the last wave.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.search.mcts import cancel, grow, revisit, select
from actors.search.pairs import continuation, step_pairs
from actors.search.steps import split_steps
from actors.search.tree import Node, Tree
from orchestrator.collecting import Collected
from orchestrator.rollouts import sampling_of
from orchestrator.seeds import derive_seed
from orchestrator.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Score,
    ScoredGroup,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.search.pairs import StepPair
    from conf.schema import Config
    from orchestrator.judging import Judge
    from orchestrator.prompts import PromptTokenizer
    from orchestrator.rollouts import Rollouts
    from orchestrator.store import Store
    from orchestrator.types import PolicyVersion


class TreeCollector:
    """Searches a tree of steps for each prompt and pairs the steps that compete.

    Args:
        config: `search`, and how the generators sample.
        rollouts: completes requests.
        judge: scores finished solutions. It is asked about whole rollouts and never shown a tree.
        store: where rollouts and trees are kept.
        tokenizer: of the policy.
    """

    def __init__(
        self, config: Config, rollouts: Rollouts, judge: Judge, store: Store, tokenizer: PromptTokenizer
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._judge = judge
        self._store = store
        self._tokenizer = tokenizer
        self._ends = step_ends(tokenizer, config.search.separator)

    def collect(self, prompts: Sequence[Prompt], iteration: int, reference: PolicyVersion) -> Collected:
        """See `Collector.collect`."""
        searches = [_Search(prompt, iteration, self._config) for prompt in prompts]
        waves = 0
        while wave := [leaf for search in searches for leaf in search.select()]:
            waves += 1
            self._simulate(wave, f"search, iteration {iteration}, wave {waves}")
        scored = [search.scored() for search in searches if search.completions]
        self._store.write_rollouts(iteration, scored)
        self._store.write_trees(iteration, [(search.prompt, search.tree) for search in searches], self._text)
        pairs: list[PreferencePair] = []
        counts: Counter[str] = Counter()
        for search in searches:
            found = step_pairs(search.tree, self._config.search, search.seed)
            counts["ties"] += sum(len(node.children) > 1 for node in search.tree.walk()) - len(found)
            counts["abstentions"] += sum(score.value is None for score in search.scores)
            pairs += [self._pair(search, pair, reference) for pair in found]
        counts["pairs"] = len(pairs)
        return Collected(
            scored=scored,
            pairs=pairs,
            counts=counts,
            tokens=sum(search.tree.tokens for search in searches),
            metrics=_metrics([search.tree for search in searches], pairs, waves),
        )

    def _simulate(self, wave: list[tuple[_Search, Node]], what: str) -> None:
        requests = [search.request(node, index) for index, (search, node) in enumerate(wave)]
        answers = self._rollouts.complete(requests, what)
        by_search: dict[int, list[int]] = {}
        whole = []
        for index, ((search, node), answer) in enumerate(zip(wave, answers, strict=True)):
            by_search.setdefault(id(search), []).append(index)
            whole.append(self._solution(search.tree, node, answer))
        groups = [
            RolloutGroup(
                prompt=wave[own[0]][0].prompt,
                completions=tuple(whole[index] for index in own),
                iteration=wave[own[0]][0].iteration,
                seed=wave[own[0]][0].seed,
            )
            for own in by_search.values()
        ]
        for own, scored in zip(by_search.values(), self._judge.score(groups), strict=True):
            for index, score in zip(own, scored.scores, strict=True):
                search, node = wave[index]
                search.scorer = scored.scorer
                search.take(node, answers[index], whole[index], score, self._ends)

    def _solution(self, tree: Tree, node: Node, answer: Completion) -> Completion:
        """The whole solution, from the prompt on, that ends with the rollout `answer` from `node`."""
        steps = [on.step for on in tree.path(node) if on.step]
        tokens = tuple(token for step in steps for token in step.tokens) + answer.token_ids
        return replace(
            answer,
            token_ids=tokens,
            text=self._text(tokens),
            logprobs=tuple(value for step in steps for value in step.logprobs) + answer.logprobs,
        )

    def _pair(self, search: _Search, pair: StepPair, reference: PolicyVersion) -> PreferencePair:
        tree, prompt = search.tree, search.prompt
        state = tree.tokens_to(tree.nodes[pair.state])
        text = self._text(state)
        chosen, rejected = (self._completion(search, tree.nodes[index]) for index in (pair.chosen, pair.rejected))
        return PreferencePair(
            id=f"{search.iteration}/{prompt.id}#{pair.state}/{pair.chosen}>{pair.rejected}",
            prompt=Prompt(
                id=f"{prompt.id}#{pair.state}",
                text=prompt.text + text,
                token_ids=prompt.token_ids + state,
                answer=prompt.answer,
            ),
            chosen=chosen,
            rejected=rejected,
            chosen_score=tree.nodes[pair.chosen].action_value,
            rejected_score=tree.nodes[pair.rejected].action_value,
            iteration=search.iteration,
            reference=reference,
            scorer=f"search:{search.scorer}",
            label=pair.label,
        )

    def _completion(self, search: _Search, node: Node) -> Completion:
        nodes = continuation(search.tree, node, self._config.search.span)
        steps = [on.step for on in nodes if on.step]
        tokens = tuple(token for step in steps for token in step.tokens)
        return Completion(
            token_ids=tokens,
            text=self._text(tokens),
            logprobs=tuple(value for step in steps for value in step.logprobs),
            finish_reason=search.finish[nodes[-1].index] if nodes[-1].terminal else FinishReason.STOP,
            policy=search.completions[0].policy,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


class _Search:
    """One prompt's tree and what its rollouts were."""

    def __init__(self, prompt: Prompt, iteration: int, config: Config) -> None:
        self.prompt = prompt
        self.iteration = iteration
        self.seed = derive_seed(config.seed, "search", iteration, prompt.id)
        self.tree = Tree()
        self.completions: list[Completion] = []
        self.scores: list[Score] = []
        self.finish: dict[int, FinishReason] = {}
        self.scorer = ""
        self._config = config
        self._started = 0

    def select(self) -> list[tuple[_Search, Node]]:
        """The leaves of the next wave. Visits of finished solutions cost nothing and are made on the way."""
        config = self._config.search
        leaves: list[tuple[_Search, Node]] = []
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
        )

    def take(self, node: Node, answer: Completion, whole: Completion, score: Score, ends: frozenset[int]) -> None:
        """Grows the tree by a rollout; one that the judge did not score leaves no node and no value behind."""
        self.completions.append(whole)
        self.scores.append(score)
        if score.value is None or answer.finish_reason is FinishReason.ABORTED or not answer.token_ids:
            cancel(self.tree, node, len(answer.token_ids))
            return
        end = grow(self.tree, node, split_steps(answer, ends), score.value, self._config.search)
        self.finish[end.index] = answer.finish_reason

    def scored(self) -> ScoredGroup:
        """Every rollout with its score."""
        group = RolloutGroup(
            prompt=self.prompt, completions=tuple(self.completions), iteration=self.iteration, seed=self.seed
        )
        return ScoredGroup(group=group, scores=tuple(self.scores), scorer=self.scorer)


def step_ends(tokenizer: PromptTokenizer, separator: str) -> frozenset[int]:
    """The tokens whose text holds the separator."""
    return frozenset(token for token in range(len(tokenizer)) if separator in tokenizer.decode([token]))


def _metrics(trees: Sequence[Tree], pairs: Sequence[PreferencePair], waves: int) -> dict[str, float]:
    nodes = sum(len(tree.nodes) - 1 for tree in trees)
    branched = sum(len(node.children) > 1 for tree in trees for node in tree.walk())
    found = {
        "waves": waves,
        "nodes_mean": nodes / len(trees),
        "branched_states_mean": branched / len(trees),
        "depth_max": max(node.depth for tree in trees for node in tree.walk()),
        "simulations_mean": sum(tree.simulations for tree in trees) / len(trees),
        "tokens_mean": sum(tree.tokens for tree in trees) / len(trees),
        "label_mean": sum(pair.label for pair in pairs) / len(pairs) if pairs else 0.0,
    }
    return {f"search/{name}": float(value) for name, value in found.items()}
