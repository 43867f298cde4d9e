r"""Stepwise self-evaluation: the model's own probability that each step is right, all steps in two forward passes.

    what is scored     J5305+2471\n5+1+0=06:06Y\n0+7+0=07:07Y\n...#07776:07776Y      and the same with N for each Y
    what is read                               ^^^           ^^^             ^^^^^^

Behind each step the judge writes the step's result itself, and then its verdict. The scored texts hold the step's own
result and a verdict there, so that one pass for each verdict reads, at every step, how probably the judge comes to the
same result and what it then says of it, had it said the same of those before:

    P(right) = P(result) P(yes | result) / (P(yes | result) + P(no | result))

Where both verdicts together are less probable than `MIN_MASS`, the judge was about to say something else and abstains.
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from actors.judges.fence import neutralise, plain
from actors.judges.reading import MIN_MASS
from actors.judges.reliability import Reliability
from actors.judges.verdicts import Verdict
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from conf.schema import JudgeConfig
    from orchestrator.judging import TextModel
    from orchestrator.tally import Tally
    from orchestrator.types import Completion, RolloutGroup

    Tokens = tuple[int, ...]
    Places = list[tuple[slice, slice]]
    """Where in a completion's tokens the results and the verdicts stand that were put behind its steps."""


class StepJudge:
    """Scores completions by the mean, over their steps, of the probability that the judge approves of the step.

    Args:
        model: the policy itself, or a judge of its own; taught to judge this way (`launch/judge_start.py`).
        config: `head`, `derive`, `yes`, `no` and `max_failed_fraction` are read.

    Raises:
        ConfigError: the judge's tokenizer writes one verdict as the beginning of the other.
    """

    def __init__(self, model: TextModel, config: JudgeConfig) -> None:
        self._model = model
        self._begin = len(model.encode(""))
        self._head = model.encode(config.head)
        self._verdicts = yes, no = self._encode(config.yes), self._encode(config.no)
        if yes[: len(no)] == no[: len(yes)]:
            raise ConfigError(
                f"judge.yes={config.yes!r}, judge.no={config.no!r}: the judge's tokenizer writes one as the beginning"
                " of the other; choose verdicts that begin differently"
            )
        self._result = (
            re.compile(f"[{re.escape(config.derive)}]([^{re.escape(config.derive)}]*)$") if config.derive else None
        )
        said = f"(?:{re.escape(config.yes)}|{re.escape(config.no)})"
        self._forged = re.compile(rf":(?:[ \t]*\S*{said}(?!\w)|.*{said}\W*$)", re.MULTILINE)
        self._reliability = Reliability(config.max_failed_fraction)

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"step_judge:{self._model.version}@2"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. What has no last step, or speaks verdicts itself, is abstained on."""
        name = self.name
        scores: dict[tuple[int, int], Score] = {}
        asked: dict[tuple[int, int], tuple[Tokens, str]] = {}
        for g, group in enumerate(groups):
            prompt = self._head + group.prompt.token_ids[self._begin :]
            for c, completion in enumerate(group.completions):
                if reason := self._unfit(completion):
                    scores[g, c] = Score(value=None, reason=reason)
                else:
                    asked[g, c] = prompt, completion.text
        verdicts = self._read(list(asked.values()))
        self._reliability.votes(name, [(verdict,) for verdict in verdicts])
        for place, verdict in zip(asked, verdicts, strict=True):
            scores[place] = Score(value=verdict.value, reason=verdict.failure)
        scored = [
            ScoredGroup(group=group, scores=tuple(scores[g, c] for c in range(len(group.completions))), scorer=name)
            for g, group in enumerate(groups)
        ]
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> Tally:
        """See `Judge.metrics`."""
        return self._reliability.report()

    def _unfit(self, completion: Completion) -> str:
        """Why a completion is not judged; empty where it is."""
        if completion.finish_reason is not FinishReason.EOS:
            return "it did not end by itself"
        if not completion.text.strip():
            return "it has no step"
        return "it writes verdicts itself" if self._forged.search(plain(completion.text)) else ""

    def _read(self, asked: Sequence[tuple[Tokens, str]]) -> list[Verdict]:
        """One verdict on each completion: (prompt, text)."""
        answers = [[self._with_verdict(text, verdict) for verdict in self._verdicts] for _, text in asked]
        fits = [
            len(prompt) + max(len(tokens) for tokens, _ in both) <= self._model.max_length
            for (prompt, _), both in zip(asked, answers, strict=True)
        ]
        sequences = [
            (prompt, tokens)
            for (prompt, _), both, fit in zip(asked, answers, fits, strict=True)
            for tokens, _ in both
            if fit
        ]
        read = iter(self._model.logprobs(sequences) if sequences else [])
        too_long = Verdict(value=None, failure="with its verdicts it is longer than the context")
        return [
            _approval(next(read), next(read), *(places for _, places in both)) if fit else too_long
            for both, fit in zip(answers, fits, strict=True)
        ]

    def _with_verdict(self, text: str, verdict: Tokens) -> tuple[Tokens, Places]:
        """A completion, its tokens of control broken up, with its result and the verdict behind each step."""
        tokens: list[int] = []
        places: Places = []
        for number, step in enumerate(neutralise(text, self._model.special_tokens).split("\n")):
            tokens += self._encode("\n") if number else ()
            if not step.strip():
                continue
            tokens += self._encode(f"{step}:")
            result = self._encode(self._derived(step))
            said = len(tokens) + len(result)
            places.append((slice(len(tokens), said), slice(said, said + len(verdict))))
            tokens += result + verdict
        return tuple(tokens), places

    def _derived(self, step: str) -> str:
        found = self._result and self._result.search(step)
        return found[1] if found else ""

    def _encode(self, text: str) -> Tokens:
        return self._model.encode(text)[self._begin :]


def _approval(yes: NDArray[np.float32], no: NDArray[np.float32], approved: Places, refused: Places) -> Verdict:
    """Mean over the steps of P(right), from the log-probs of both texts."""
    found = []
    for number, ((result, said_yes), (_, said_no)) in enumerate(zip(approved, refused, strict=True), 1):
        same, right, wrong = _probability(yes[result]), _probability(yes[said_yes]), _probability(no[said_no])
        if not right + wrong >= MIN_MASS:
            failure = f"behind step {number} both verdicts together have probability {right + wrong:.2g}"
            return Verdict(value=None, failure=failure)
        found.append(same * right / (right + wrong))
    return Verdict(value=fmean(found))


def _probability(logprobs: NDArray[np.float32]) -> float:
    return float(np.exp(logprobs.astype(np.float64).sum()))
