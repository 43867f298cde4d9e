"""The record of one search: a tree whose edges are steps of a solution.

The root is the prompt. Two rollouts that begin with the same steps share those nodes, so that the tree holds each step
once, with how often it was taken and what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step as it was sampled.

    Example: ``Step(tokens=(8, 13, 4), logprobs=(-0.1, -0.02, -0.6))``
    """

    tokens: tuple[int, ...]
    """At least one; its separator, or the end of sequence, is the last."""
    logprobs: tuple[float, ...]
    """Of each token under the policy that sampled it, nats."""


@dataclass(kw_only=True, slots=True)
class Node:
    """A state: the prompt and the steps down to here."""

    index: int
    parent: int | None
    depth: int
    """Steps from the root."""
    step: Step | None
    """The step that leads here; None for the root."""
    children: list[int] = field(default_factory=list)
    visits: int = 0
    """N: simulations that went through."""
    pending: int = 0
    """Simulations that went through and are not back yet."""
    attempts: int = 0
    """Rollouts started here, whether back yet or not."""
    value: float = 0.0
    """v: what is known of the state by itself; of a finished solution its score."""
    action_value: float = 0.0
    """Q of the step that leads here."""
    terminal: bool = False
    """Whether the solution ends here."""


@dataclass(kw_only=True, slots=True)
class Tree:
    """Nodes by index; the root is 0."""

    nodes: list[Node] = field(default_factory=lambda: [Node(index=0, parent=None, depth=0, step=None)])
    simulations: int = 0
    """Simulations that came back."""
    tokens: int = 0
    """Tokens sampled for it."""

    @property
    def root(self) -> Node:
        """The prompt itself."""
        return self.nodes[0]

    def children(self, node: Node) -> list[Node]:
        """In the order in which they were found."""
        return [self.nodes[index] for index in node.children]

    def path(self, node: Node) -> list[Node]:
        """From the root to `node`, both included."""
        found = [node]
        while found[-1].parent is not None:
            found.append(self.nodes[found[-1].parent])
        return found[::-1]

    def tokens_to(self, node: Node) -> tuple[int, ...]:
        """Of all steps from the root to `node`."""
        return tuple(token for on in self.path(node) if on.step for token in on.step.tokens)

    def add(self, parent: Node, step: Step) -> Node:
        """The child of `parent` that `step` leads to; a new one where no child has the same tokens."""
        for child in self.children(parent):
            if child.step and child.step.tokens == step.tokens:
                return child
        child = Node(index=len(self.nodes), parent=parent.index, depth=parent.depth + 1, step=step)
        self.nodes.append(child)
        parent.children.append(child.index)
        return child

    def walk(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        return iter(self.nodes)
