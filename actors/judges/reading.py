"""From questions to verdicts: by the words of a language model, or by the probability of the verdicts it could give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.judges.cache import VerdictCache, question_key
from actors.judges.verdicts import Verdict
from orchestrator.errors import ConfigError
from orchestrator.seeds import derive_seed
from orchestrator.tasks.base import Message
from orchestrator.types import FinishReason, GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from orchestrator.judging import TextModel
    from orchestrator.types import Completion, SamplingParams

    Tokens = tuple[int, ...]

MIN_MASS = 0.01
"""Where all verdicts together are less probable than this, the judge was about to say something else."""
_SHOWN = 160
"""Characters of a reply that are shown to people."""


class Reader(Protocol):
    """Puts questions to a judge and reads its verdicts."""

    cache: VerdictCache

    def read(self, questions: Sequence[str]) -> list[tuple[Verdict, ...]]:
        """The votes on each question, in order."""


class Words:
    """Samples replies and reads each one's last line.

    The seed of a vote follows from its question alone, whatever wave it is asked in.

    Args:
        model: the judge.
        parse: reads a reply; None where it holds no verdict.
        sampling: how replies are drawn.
        votes: replies to each question.
        seed: of the run.
    """

    def __init__(
        self,
        model: TextModel,
        parse: Callable[[str], float | None],
        sampling: SamplingParams,
        *,
        votes: int,
        seed: int,
    ) -> None:
        self._model, self._parse, self._sampling = model, parse, sampling
        self._votes, self._seed = votes, seed
        self.cache = VerdictCache()

    def read(self, questions: Sequence[str]) -> list[tuple[Verdict, ...]]:
        """See `Reader.read`: `votes` verdicts a question."""
        fixed = (self._model.version, repr(self._sampling), self._seed)
        asked = [
            (question_key(*fixed, vote, question), question) for question in questions for vote in range(self._votes)
        ]
        verdicts = self.cache.resolve(asked, self._ask)
        return [tuple(verdicts[start : start + self._votes]) for start in range(0, len(asked), self._votes)]

    def _ask(self, new: Mapping[str, str]) -> dict[str, Verdict]:
        room = self._sampling.max_tokens
        tokens = {question: _encode(self._model, question) for question in dict.fromkeys(new.values())}
        found = {key: _too_long(tokens[question], room, self._model) for key, question in new.items()}
        keys = [key for key, verdict in found.items() if verdict is None]
        replies = self._model.generate([self._request(key, tokens[new[key]]) for key in keys]) if keys else []
        read = dict(zip(keys, map(self._verdict, replies), strict=True))
        return {key: verdict or read[key] for key, verdict in found.items()}

    def _request(self, key: str, tokens: Tokens) -> GenerationRequest:
        seed = derive_seed(self._seed, "judge", key)
        return GenerationRequest(id=f"judge/{key}", prompt_token_ids=tokens, sampling=self._sampling, seed=seed)

    def _verdict(self, reply: Completion) -> Verdict:
        shown = repr(reply.text[-_SHOWN:])
        if reply.finish_reason is not FinishReason.EOS:
            return Verdict(value=None, failure=f"its reply did not end by itself ({reply.finish_reason}): {shown}")
        value = self._parse(reply.text)
        return Verdict(value=value, failure="" if value is not None else f"no verdict in its last line: {shown}")


class Probabilities:
    """Reads how probable each verdict is as the judge's next words; the value is the mean over the verdicts.

        value = sum_v p(v | question, head) value(v) / sum_v p(v | question, head)

    Args:
        model: the judge.
        head: what the judge would write before its verdict.
        values: the value of each verdict.

    Raises:
        ConfigError: the judge's tokenizer writes two of the verdicts alike.
    """

    def __init__(self, model: TextModel, head: str, values: Mapping[str, float]) -> None:
        begin = len(model.encode(""))
        written = [model.encode(head + verdict)[begin:] for verdict in values]
        shared = _shared_length(written)
        self._model, self._head = model, head
        self._shared = written[0][:shared]
        self._endings = [tokens[shared:] for tokens in written]
        self._values = np.array(list(values.values()))
        if len(set(self._endings)) < len(written) or () in self._endings:
            raise ConfigError(
                f"judge.verdict=probability: the judge's tokenizer does not tell {', '.join(values)} apart behind"
                f" {head!r}: choose judge.verdict=words or another judge.model"
            )
        self.cache = VerdictCache()

    def read(self, questions: Sequence[str]) -> list[tuple[Verdict, ...]]:
        """See `Reader.read`: one verdict a question, since nothing is sampled."""
        asked = [(question_key(self._model.version, self._head, question), question) for question in questions]
        return [(verdict,) for verdict in self.cache.resolve(asked, self._ask)]

    def _ask(self, new: Mapping[str, str]) -> dict[str, Verdict]:
        room = max(map(len, self._endings))
        tokens = {key: _encode(self._model, question) + self._shared for key, question in new.items()}
        found = {key: _too_long(prompt, room, self._model) for key, prompt in tokens.items()}
        keys = [key for key, verdict in found.items() if verdict is None]
        sequences = [(tokens[key], ending) for key in keys for ending in self._endings]
        logprobs = self._model.logprobs(sequences) if sequences else []
        sums = np.array([values.sum(dtype=np.float64) for values in logprobs]).reshape(len(keys), len(self._endings))
        read = dict(zip(keys, map(self._verdict, np.exp(sums)), strict=True))
        return {key: verdict or read[key] for key, verdict in found.items()}

    def _verdict(self, probabilities: NDArray[np.float64]) -> Verdict:
        mass = math.fsum(probabilities)
        if not mass >= MIN_MASS:
            failure = f"all verdicts together have probability {mass:.2g} behind {self._head!r}"
            return Verdict(value=None, failure=failure)
        return Verdict(value=math.fsum(probabilities * self._values) / mass)


def _encode(model: TextModel, question: str) -> Tokens:
    return model.encode_chat([Message(role="user", content=question)])


def _too_long(tokens: Tokens, room: int, model: TextModel) -> Verdict | None:
    """The failure of a question that does not fit into the judge's context; None where it does."""
    if len(tokens) + room <= model.max_length:
        return None
    failure = f"the question has {len(tokens)} tokens and {room} must follow; the judge's context is {model.max_length}"
    return Verdict(value=None, failure=failure)


def _shared_length(sequences: Sequence[Tokens]) -> int:
    """Tokens at the beginning that all sequences share."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
