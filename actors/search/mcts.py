r"""Monte Carlo tree search over steps, with PUCT.

    select   from the root along the best PUCT to a state that may still be tried, or to a finished solution
    grow     a rollout from there to the end becomes nodes, down to its scored end
    back up  visits and action values along the whole path

    r(c) = v(c) - v(parent)          Q(c) = r(c) + gamma V(c)         V(s) = sum N_c Q_c / sum N_c over its children
    PUCT(c) = Q(c) + w p(c) sqrt(N(s)) / (1 + N(c))                   p = exp(sum log pi(step) / length^1.25)

Xie et al. 2024, "Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning" (arXiv:2405.00451),
equations 1 to 4, as in the authors' code; simulations that are still out count as visits when others choose (virtual
visits: Liu et al. 2020, "Watch the Unobserved", arXiv:1810.11755), so that many leaves of a tree are in flight at once.
The authors' code quadruples the simulations at the root and counts its visits twice; here a simulation is one visit.
There a node is expanded by single steps and its path then followed to the end; here each rollout goes to the end in one
piece, and its steps become nodes at once: the same tokens, without waiting for each step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.search.tree import Node, Step, Tree
    from conf.schema import SearchConfig


def select(tree: Tree, config: SearchConfig) -> Node | None:
    """Where the next simulation goes; its path counts as visited until `grow`, `revisit` or `cancel`.

    Returns:
        A state to roll out from, or a finished solution to `revisit`. None when the budget is spent, or when all that
        could be tried there is in flight.
    """
    if exhausted(tree, config):
        return None
    node = tree.root
    while not node.terminal and not _may_branch(node, config):
        if not node.children:
            return None
        node = max(tree.children(node), key=lambda child: (puct(tree, child, config), -child.index))
    node.attempts += not node.terminal
    for on in tree.path(node):
        on.pending += 1
    return node


def exhausted(tree: Tree, config: SearchConfig) -> bool:
    """Whether the simulations, those in flight included, or the tokens of the budget are used up."""
    spent = config.max_tokens is not None and tree.tokens >= config.max_tokens
    return spent or tree.simulations + tree.root.pending >= config.simulations


def puct(tree: Tree, child: Node, config: SearchConfig) -> float:
    """The upper bound by which the parent of `child` chooses; infinite parts there are none."""
    assert child.parent is not None
    parent = tree.nodes[child.parent]
    around, here = parent.visits + parent.pending, child.visits + child.pending
    return child.action_value + config.exploration * prior(child, config) * math.sqrt(around) / (1 + here)


def prior(child: Node, config: SearchConfig) -> float:
    """How likely the policy takes the step, its length taken out: in (0, 1]."""
    assert child.step is not None
    return math.exp(sum(child.step.logprobs) / len(child.step.tokens) ** config.length_exponent)


def grow(
    tree: Tree,
    node: Node,
    steps: Sequence[Step],
    value: float,
    config: SearchConfig,
    between: Sequence[float] | None = None,
) -> Node:
    """Adds a rollout from `node` and its value, and backs it up.

    Args:
        tree: changed in place.
        node: from `select`.
        steps: at least one, to the end of the solution.
        value: of the finished solution, higher is better.
        config: the discount.
        between: values of the states that all steps but the last lead to; None: 0. Those of the others are known.

    Returns:
        The end of the solution.
    """
    for on in tree.path(node):
        on.pending -= 1
    for step, known in zip(steps, [*(between or [0.0] * (len(steps) - 1)), value], strict=True):
        node = tree.add(node, step)
        if not node.visits:
            node.value = known
    node.terminal, node.value = True, value
    tree.tokens += sum(len(step.tokens) for step in steps)
    _back_up(tree, node, config)
    return node


def revisit(tree: Tree, node: Node, config: SearchConfig) -> None:
    """Counts one more visit of a finished solution that `select` came to; nothing is sampled for it."""
    for on in tree.path(node):
        on.pending -= 1
    _back_up(tree, node, config)


def cancel(tree: Tree, node: Node, tokens: int = 0) -> None:
    """Takes back a selection whose rollout has no value; its `tokens` are spent all the same, and so is the attempt."""
    for on in tree.path(node):
        on.pending -= 1
    tree.simulations += 1
    tree.tokens += tokens


def _may_branch(node: Node, config: SearchConfig) -> bool:
    deep = config.depth is not None and node.depth >= config.depth
    return node.attempts < config.breadth and not (deep and node.children)


def _back_up(tree: Tree, node: Node, config: SearchConfig) -> None:
    tree.simulations += 1
    path = tree.path(node)
    for on in path:
        on.visits += 1
    for parent, child in zip(path[-2::-1], path[:0:-1], strict=True):
        gain = child.value - parent.value
        child.action_value = gain + config.discount * _state_value(tree, child)


def _state_value(tree: Tree, node: Node) -> float:
    children = tree.children(node)
    visits = sum(max(1, child.visits) for child in children)
    return sum(max(1, child.visits) * child.action_value for child in children) / visits if children else 0.0
