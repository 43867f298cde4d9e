"""Judges and their language models over actor pools: the transports behind `orchestrator/judging.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.judges.reliability import Reliability
from orchestrator.blame import Poisoned
from orchestrator.errors import JudgeError
from orchestrator.prompts import Renderer
from orchestrator.tally import Tally
from orchestrator.tasks.base import Problem
from orchestrator.types import Completion, FinishReason, PolicyVersion, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from conf.schema import TaskConfig
    from orchestrator.learning import Learning
    from orchestrator.pools import ActorPool
    from orchestrator.prompts import PromptTokenizer
    from orchestrator.tasks.base import Message
    from orchestrator.types import GenerationRequest, RolloutGroup

    Tokens = tuple[int, ...]

_MANY = 16
"""Completions. A scorer may be silent on fewer, or on all of one prompt, and still have something to say."""
_UNANSWERED = Completion(
    token_ids=(),
    text="",
    logprobs=(),
    finish_reason=FinishReason.ABORTED,
    policy=PolicyVersion(number=0, digest="nobody"),
)
"""The reply to a question that kills whoever answers it."""


class PooledJudge:
    """A judge whose groups are scored by a pool of scorer actors.

    Args:
        name: what it is, for messages; each `ScoredGroup` carries the scorer's own name and version.
        pool: of `actors.scorer.ScorerActor`.
        deadline_s: seconds for one wave.
        call_s: more for each completion of the longest share, where code of others may take so long, the start of
            another process for it included; else 0.
        reliability: collects what it says; None for a rule, of whose word there is nothing to doubt.
        quarantined: prompts that were set aside, and why; those whose completions kill their scorers are added.
    """

    def __init__(
        self,
        name: str,
        pool: ActorPool[RolloutGroup, ScoredGroup],
        *,
        deadline_s: float,
        call_s: float = 0.0,
        reliability: Reliability | None,
        quarantined: dict[str, str],
    ) -> None:
        self.name = name
        self._pool = pool
        self._deadline_s = deadline_s
        self._call_s = call_s
        self._reliability = reliability
        self._quarantined = quarantined

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. Groups of a prompt whose completions kill their scorers are abstained on.

        Raises:
            JudgeError: none of many completions got a score.
        """
        answers = self._pool.map(
            lambda actor, share: actor.score.remote(share),
            groups,
            what=f"scoring {len(groups)} groups ({self.name})",
            deadline_s=self._deadline(groups),
            knob="scorer.deadline_s",
            keys=[group.prompt.id for group in groups],
        )
        scored = [
            self._set_aside(group, answer) if isinstance(answer, Poisoned) else answer
            for group, answer in zip(groups, answers, strict=True)
        ]
        self._check_answering(scored)
        if self._reliability is not None:
            self._reliability.groups(scored)
        return scored

    def metrics(self) -> Tally:
        """See `Judge.metrics`."""
        return Tally() if self._reliability is None else self._reliability.report()

    def _check_answering(self, scored: Sequence[ScoredGroup]) -> None:
        """Stops a run whose scorer has nothing to say: no pair would ever come of it."""
        asked = [group for group in scored if group.group.prompt.id not in self._quarantined]
        reasons = Counter(
            score.reason if score.value is None else None
            for group in asked
            for completion, score in zip(group.group.completions, group.scores, strict=True)
            if completion.finish_reason is not FinishReason.ABORTED
        )
        total = reasons.total()
        if len(asked) == 1 or total < _MANY or None in reasons:
            return
        ((reason, count),) = reasons.most_common(1)
        raise JudgeError(
            f"{self.name} gave no score to any of {total} completions of {len(asked)} prompts. {count} times: {reason}."
            " Mend that, and start a new run"
        )

    def _deadline(self, groups: Sequence[RolloutGroup]) -> float:
        """So late that calls which all hang cost their scores, and not the run."""
        if not self._call_s:
            return self._deadline_s
        longest_share = -(-sum(len(group.completions) for group in groups) // max(1, len(self._pool.living)))
        return self._deadline_s + self._call_s * longest_share

    def _set_aside(self, group: RolloutGroup, poisoned: Poisoned) -> ScoredGroup:
        reason = f"it killed {poisoned.deaths} scorers: {poisoned.last_words}"
        self._quarantined[group.prompt.id] = reason
        silent = Score(value=None, reason=reason)
        return ScoredGroup(group=group, scores=(silent,) * len(group.completions), scorer=self.name)


class PreviousPolicy:
    """The policy that the latest iteration began with, as the learner keeps it with `reference=previous`.

    Args:
        learner: of the run.
    """

    def __init__(self, learner: Learning) -> None:
        self._learner = learner

    def logprobs(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[NDArray[np.float32]] | None:
        """See `EarlierPolicy.logprobs`."""
        found: list[NDArray[np.float32]] | None = self._learner.call(
            "reference_logprobs", sequences, what=f"scoring {len(sequences)} sequences with the policy before"
        )
        return found


class PooledTextModel:
    """A `TextModel` over a pool of generators: the policy's own, or a judge's.

    Args:
        pool: of `actors.generator.Generator`.
        tokenizer: of the model it serves.
        version: of the weights it serves now.
        template: whether chats are rendered by the tokenizer's template; `TaskConfig.template` is read.
        max_length: context of its engines, tokens.
        deadline_s: seconds for one wave.
    """

    def __init__(
        self,
        pool: ActorPool[Any, Any],
        tokenizer: PromptTokenizer,
        *,
        version: Callable[[], PolicyVersion | str],
        template: TaskConfig,
        max_length: int,
        deadline_s: float,
    ) -> None:
        self.max_length = max_length
        self.special_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        self._pool = pool
        self._version = version
        self._tokenizer = tokenizer
        self._render = Renderer(tokenizer, replace(template, system_prompt=None))  # which speaks to the policy
        self._deadline_s = deadline_s

    @property
    def version(self) -> str:
        """See `TextModel.version`."""
        return str(self._version())

    def encode(self, text: str) -> Tokens:
        """See `TextModel.encode`."""
        return self._render.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> Tokens:
        """See `TextModel.encode_chat`."""
        if self._render.as_chat:
            return self._render(Problem(id="judge", content=tuple(messages), source="the judge's prompt")).token_ids
        return self._render.encode("\n\n".join(message.content for message in messages) + "\n")

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """See `TextModel.generate`."""
        questions = [request.prompt_token_ids for request in requests]
        scope = requests[0].id if requests else ""
        requests = [replace(request, cache_scope=scope) for request in requests]
        replies = self._map("generate", requests, f"completing {len(requests)} judgements", questions)
        return [_UNANSWERED if isinstance(reply, Poisoned) else reply for reply in replies]

    def logprobs(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[NDArray[np.float32]]:
        """See `TextModel.logprobs`."""
        whole = [prompt + completion for prompt, completion in sequences]
        questions = [prompt for prompt, _ in sequences]
        scored = self._map("score", whole, f"scoring {len(whole)} sequences", questions)
        return [
            np.full(len(completion), np.nan, np.float32) if isinstance(values, Poisoned) else values[len(prompt) - 1 :]
            for values, (prompt, completion) in zip(scored, sequences, strict=True)
        ]

    def _map(self, method: str, work: Sequence[Any], what: str, questions: Sequence[Tokens]) -> list[Any]:
        return self._pool.map(
            lambda actor, share: getattr(actor, method).remote(share),
            work,
            what=f"judge: {what}",
            deadline_s=self._deadline_s,
            knob="judge.deadline_s",
            keys=[f"question/{hash(question) % 2**64:016x}" for question in questions],
        )
