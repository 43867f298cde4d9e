"""What judges are to the loop, and the language model behind those that read text.

    groups --Judge.score--> scored groups
                 |  asks
                 v
             TextModel     the generators themselves, or a pool of the judge's own

A judge gets all groups of a wave at once, so that whatever it asks of a model travels as a few large batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.tally import Tally
    from orchestrator.tasks.base import Message
    from orchestrator.types import Completion, GenerationRequest, Prompt, RolloutGroup, ScoredGroup

    Tokens = tuple[int, ...]


class Judge(Protocol):
    """Says how good completions are, or which of two is better, or nothing where it cannot tell."""

    @property
    def name(self) -> str:
        """With a version, so that scores of different judges are never taken for one another."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """One scored group for each group, in order. A failure is an abstention, never an invented label.

        Raises:
            AgonError: the judge as a whole failed (its actors died, its deadline passed).
        """

    def metrics(self) -> Tally:
        """Of the judgements since the last call, for `judge/`: rates of failures, abstentions, ties, agreement.

        Raises:
            JudgeError: next to none of these judgements could be used.
        """


class StateEvaluator(Protocol):
    """Says how probably the last step of a solution, finished or not, is right."""

    def evaluate(self, states: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """P(right) of (prompt, solution so far) each; None where nothing could be read.

        Raises:
            AgonError: it failed as a whole.
        """

    def metrics(self) -> Tally:
        """Of the evaluations since the last call, for `search/`."""


class EarlierPolicy(Protocol):
    """The policy before the present one."""

    def logprobs(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[NDArray[np.float32]] | None:
        """As `TextModel.logprobs`; None where there is none before the present one."""


class TextModel(Protocol):
    """A language model that answers in batches."""

    @property
    def version(self) -> str:
        """Changes with the weights: part of a judgement's identity and of its cache key."""

    @property
    def max_length(self) -> int:
        """Context in tokens: what is asked and what is answered together."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Texts that the tokenizer reads as tokens of control wherever they stand."""

    def encode(self, text: str) -> Tokens:
        """Token ids of a text as it stands, with the tokens that begin a sequence."""

    def encode_chat(self, messages: Sequence[Message]) -> Tokens:
        """Token ids of a chat that the model is to answer: by its chat template, else the turns as plain text."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Completes the requests, in their order, as one wave; a reply that nobody can give comes back aborted."""

    def logprobs(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[NDArray[np.float32]]:
        """Of (prompt, completion) sequences: the log-prob of each completion token, in their order, as one wave.

        NaN where nobody can compute them.
        """
