"""Tree search over the generators: many trees and many leaves in flight at once.

    each round  every tree selects up to `search.in_flight` leaves -> one batch of rollouts -> one batch of judgements
                -> every tree grows

A rollout goes on from the tokens of its leaf, whose keys and values the engine's prefix cache still holds, to the end
of the solution. A round has as many requests as trees times leaves in flight, and fewer when trees are done.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.search.pairs import continuation, step_pairs
from actors.search.steps import split_steps
from actors.search.tree import Node, Tree
from orchestrator.collecting import Collected
from orchestrator.prompt_search import PromptSearch
from orchestrator.tally import Tally
from orchestrator.types import (
    Completion,
    FinishReason,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Score,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from actors.search.pairs import StepPair
    from actors.search.tree import Step
    from conf.schema import Config
    from orchestrator.judging import Judge, StateEvaluator
    from orchestrator.prompts import PromptTokenizer
    from orchestrator.rollouts import Rollouts
    from orchestrator.store import Store
    from orchestrator.types import PolicyVersion
    from orchestrator.waves import Wave


class TreeCollector:
    """Searches a tree of steps for each prompt and pairs the steps that compete.

    Args:
        config: `search`, and how the generators sample.
        rollouts: completes requests.
        judge: scores finished solutions. It is asked about whole rollouts and never shown a tree.
        store: where rollouts and trees are kept.
        tokenizer: of the policy.
        evaluator: says of solutions how probably their last step is right (`search.evaluation_weight`); None: nobody.
        quarantined: prompts that were set aside; what was found of their trees before that makes no pair.
    """

    def __init__(
        self,
        config: Config,
        rollouts: Rollouts,
        judge: Judge,
        store: Store,
        tokenizer: PromptTokenizer,
        evaluator: StateEvaluator | None = None,
        *,
        quarantined: Collection[str],
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._judge = judge
        self._store = store
        self._tokenizer = tokenizer
        self._evaluator = evaluator
        self._quarantined = quarantined
        self._ends = step_ends(tokenizer, config.search.separator)

    def draw(self, wave: Wave) -> int:
        """Nothing: how a tree grows depends on what is said of its leaves."""
        return 0

    def collect(self, wave: Wave) -> Collected:
        """See `Collector.collect`."""
        searches = [PromptSearch(prompt, wave.iteration, self._config) for prompt in wave.prompts]
        rounds = 0
        while leaves := [leaf for search in searches for leaf in search.select()]:
            rounds += 1
            self._simulate(leaves, f"search, iteration {wave.iteration}, round {rounds}")
        scored = [search.scored() for search in searches if search.completions]
        trees = [(search.prompt, search.tree) for search in searches]
        files = [
            self._store.write_rollouts(wave.iteration, wave.number, scored),
            self._store.write_trees(wave.iteration, wave.number, trees, self._text),
        ]
        pairs: list[PreferencePair] = []
        counts: Counter[str] = Counter()
        counts["abstentions"] = sum(score.value is None for search in searches for score in search.scores)
        fine = [search for search in searches if search.prompt.id not in self._quarantined]
        good = [search for search in fine if search.good_enough()]
        for search in good:
            found, ties = step_pairs(search.tree, self._config.search, search.seed)
            counts["ties"] += ties
            pairs += [self._pair(search, pair, wave.reference) for pair in found]
        counts["pairs"] = len(pairs)
        return Collected(
            scored=scored,
            pairs=pairs,
            counts=counts,
            tokens=sum(search.tree.tokens for search in searches),
            tally=_figures([search.tree for search in searches], pairs, rounds, len(fine) - len(good))
            + (self._evaluator.metrics() if self._evaluator else Tally()),
            files=files,
        )

    def _simulate(self, leaves: list[tuple[PromptSearch, Node]], what: str) -> None:
        requests = [search.request(node, index) for index, (search, node) in enumerate(leaves)]
        answers = self._rollouts.complete(requests, what, prompt_ids=[search.prompt.id for search, _ in leaves])
        whole = [
            self._solution(search.tree, node, answer) for (search, node), answer in zip(leaves, answers, strict=True)
        ]
        by_search: dict[PromptSearch, list[int]] = {}
        for index, (search, _) in enumerate(leaves):
            by_search.setdefault(search, []).append(index)
        groups = [
            RolloutGroup(
                prompt=search.prompt,
                completions=tuple(whole[index] for index in own),
                iteration=search.iteration,
                seed=search.seed,
            )
            for search, own in by_search.items()
        ]
        scores: dict[int, Score] = {}
        for (search, own), scored in zip(by_search.items(), self._judge.score(groups), strict=True):
            search.scorer = scored.scorer
            scores |= zip(own, scored.scores, strict=True)
        steps = {
            index: split_steps(answer, self._ends)
            for index, answer in enumerate(answers)
            if answer.token_ids and answer.finish_reason is not FinishReason.ABORTED and scores[index].value is not None
        }
        values = self._evaluate(leaves, steps)
        for index, (search, node) in enumerate(leaves):
            search.take(node, answers[index], whole[index], scores[index], steps.get(index, []), values.get(index))

    def _evaluate(
        self, leaves: list[tuple[PromptSearch, Node]], steps: Mapping[int, list[Step]]
    ) -> dict[int, list[float]]:
        """Of each rollout, w P(right) of the states that its steps lead to; none where the judge was silent on one.

        Where nothing is discounted, what is said of the states between cancels out of Q: Q(c) = W(c) - v(parent) with
        W = v + V, and W of a state is the mean of W over its children. So only the end is asked about then.
        """
        config = self._config.search
        values: dict[int, list[float | None]] = {index: [0.0] * len(taken) for index, taken in steps.items()}
        if self._evaluator is not None:
            places = [
                (index, place)
                for index, taken in steps.items()
                for place in range(len(taken))
                if config.discount < 1 or place == len(taken) - 1
            ]
            states = []
            for index, place in places:
                search, node = leaves[index]
                states.append((search.prompt, self._text(search.tokens_after(node, steps[index][: place + 1]))))
            for (index, place), right in zip(places, self._evaluator.evaluate(states), strict=True):
                penalty = depth_penalty(leaves[index][1].depth + place) if config.depth_penalty else 1
                values[index][place] = None if right is None else config.evaluation_weight * right / penalty
        return {
            index: known
            for index, found in values.items()
            if len(known := [value for value in found if value is not None]) == len(found)
        }

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

    def _pair(self, search: PromptSearch, pair: StepPair, reference: PolicyVersion | None) -> PreferencePair:
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

    def _completion(self, search: PromptSearch, node: Node) -> Completion:
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


def depth_penalty(before: int) -> int:
    """What the released code divides P(right) of a step by, `before` being the depth of the state that it leaves."""
    return max(before - 3, 1)


def step_ends(tokenizer: PromptTokenizer, separator: str) -> frozenset[int]:
    """The tokens whose text holds the separator."""
    return frozenset(token for token in range(len(tokenizer)) if separator in tokenizer.decode([token]))


def _figures(trees: Sequence[Tree], pairs: Sequence[PreferencePair], rounds: int, poor: int) -> Tally:
    found = Tally()
    found.sum("search/waves", rounds)
    found.mean("search/nodes_mean", (len(tree.nodes) - 1 for tree in trees))
    branched = (sum(len(node.children) > 1 for node in tree.walk()) for tree in trees)
    found.mean("search/branched_states_mean", branched)
    found.max("search/depth_max", max(node.depth for tree in trees for node in tree.walk()))
    found.mean("search/simulations_mean", (tree.simulations for tree in trees))
    found.mean("search/tokens_mean", (tree.tokens for tree in trees))
    found.mean("search/label_mean", (pair.label for pair in pairs))
    found.sum("search/poor_trees", poor)
    return found
