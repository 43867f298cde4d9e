"""Stepwise self-evaluation of a search: how probably the last step of a solution is right, in the judge's own words.

The judge is asked whether the last step is (A) wrong or (B) right, and P(B) / (P(A) + P(B)) is read from its next words
(Xie et al. 2024, arXiv:2405.00451, section 3.1). The authors' prompt shows the reference answer as well; here it does
only with `search.show_answer`, and what is trained then is not free of labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.judges.llm_judge import Questions
from actors.judges.reading import Probabilities
from actors.judges.reliability import Reliability
from actors.judges.rubric import load_step_rubric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conf.schema import JudgeConfig, SearchConfig
    from orchestrator.judging import TextModel
    from orchestrator.tally import Tally
    from orchestrator.types import Prompt

CLOSING = "Reply with one line and nothing else, one of:\nVerdict: A\nVerdict: B"
HEAD, VALUES = "Verdict: ", {"A": 0.0, "B": 1.0}


class LastStep:
    """Evaluates unfinished and finished solutions.

    Args:
        model: the judge.
        search: `show_answer` and `rubric` are read.
        judge: `max_failed_fraction` is read.
        seed: of the run.

    Raises:
        ConfigError: the rubric cannot be used, or the judge's tokenizer writes both verdicts alike.
    """

    def __init__(self, model: TextModel, search: SearchConfig, judge: JudgeConfig, seed: int) -> None:
        rubric = load_step_rubric(search)
        self._questions = Questions(rubric, CLOSING, model, seed)
        self._reader = Probabilities(model, HEAD, VALUES)
        self._show_answer = search.show_answer
        self._reliability = Reliability(judge.max_failed_fraction)
        self._name = f"last_step:{rubric.digest}"
        self._model = model

    @property
    def name(self) -> str:
        """With the version of the model."""
        return f"{self._name}:{self._model.version}@1"

    def evaluate(self, states: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """P(the last step is right) of (prompt, solution so far) each; None where the judge gave no verdict.

        Raises:
            JudgeError: it gave next to none at all since the last report.
        """
        readings = self._reader.read([self._question(prompt, text) for prompt, text in states])
        self._reliability.votes(self.name, readings)
        return [verdict.value for (verdict,) in readings]

    def metrics(self) -> Tally:
        """Of the evaluations since the last call, for `search/`."""
        hits = self._reader.cache.start_anew()
        return self._reliability.report(cache_hits=hits).renamed("judge/", "search/evaluation_")

    def _question(self, prompt: Prompt, text: str) -> str:
        shown = {"reference": prompt.answer or ""} if self._show_answer else {}
        return self._questions(prompt, answer=text, **shown)
