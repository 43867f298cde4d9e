"""A searched tree to preferences between steps."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.search.mcts import prior

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actors.search.tree import Node, Tree
    from conf.schema import SearchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPair:
    """Two steps from the same state.

    Example: ``StepPair(state=3, chosen=9, rejected=4, gap=0.8, label=0.75)``
    """

    state: int
    """Node at which they were taken."""
    chosen: int
    rejected: int
    gap: float
    """Q of chosen minus Q of rejected, at least 0."""
    label: float
    """Probability that chosen is the better one, by visits: N_w / (N_w + N_l), at least 1/2."""


def best_path(tree: Tree) -> list[Node]:
    """From the root always to the child of most visits, then of the highest Q: the search's own solution."""
    found = [tree.root]
    while found[-1].children:
        children = tree.children(found[-1])
        found.append(max(children, key=lambda child: (child.visits, child.action_value, -child.index)))
    return found


def step_pairs(tree: Tree, config: SearchConfig, seed: int) -> tuple[list[StepPair], int]:
    """The best child against another one, at each state with two or more, widest gaps first.

    Children are ranked by (Q, prior), as in the code of Xie et al. 2024; the other one is the worst, or any but the
    best where `search.negative=random`, which is what that code does whatever its switches say. Its label smoothing by
    visit counts is the pair's label. States are those of the best path, as there, or of the whole tree.

    Args:
        tree: after the search.
        config: `states`, `negative`, `min_gap` and `max_pairs`.
        seed: of `negative=random`.

    Returns:
        At most `max_pairs` pairs, and the number of states looked at whose two steps are no further apart than
        `min_gap`, or equal.
    """
    states = best_path(tree) if config.states == "path" else list(tree.walk())
    states = [state for state in states if len(state.children) > 1]
    pairs = sorted(_pairs(tree, states, config, random.Random(seed)), key=lambda pair: -pair.gap)
    return pairs[: config.max_pairs], len(states) - len(pairs)


def _pairs(tree: Tree, states: list[Node], config: SearchConfig, lots: random.Random) -> Iterator[StepPair]:
    for state in states:
        ranked = sorted(tree.children(state), key=lambda child: (child.action_value, prior(child, config)))
        best = ranked[-1]
        other = lots.choice(ranked[:-1]) if config.negative == "random" else ranked[0]
        gap = best.action_value - other.action_value
        if gap > 0 and gap >= config.min_gap:
            share = best.visits / (best.visits + other.visits)
            yield StepPair(state=state.index, chosen=best.index, rejected=other.index, gap=gap, label=max(share, 0.5))


def continuation(tree: Tree, node: Node, span: str) -> list[Node]:
    """The nodes whose steps stand for taking the step to `node`.

    Args:
        tree: after the search.
        node: a child of the pair's state.
        span: `step`: it alone, with what always followed, as in the authors' code; `rollout`: to the end of the
            solution, along the most visited children.
    """
    found = [node]
    while found[-1].children and (span == "rollout" or len(found[-1].children) == 1):
        children = tree.children(found[-1])
        found.append(max(children, key=lambda child: (child.visits, child.action_value, -child.index)))
    return found
