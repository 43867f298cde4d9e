"""Language models as judges: a score for each completion, or comparisons in both orders.

    completion(s) -> fences -> rubric -> question -> Reader (words or probabilities) -> votes -> scored group

Pointwise judging is the additive rubric of Self-Rewarding Language Models (Yuan et al. 2024, arXiv:2401.10020): the
mean of `judge.votes` sampled judgements. Comparisons are asked in both orders, so that what a judge gives to the place
where an answer stands cancels (Zheng et al. 2023, arXiv:2306.05685, section 3.4).
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from actors.judges.comparisons import fill_table, mean_wins, sign_of
from actors.judges.fence import choose_mark, explain, fenced
from actors.judges.reading import Probabilities, Words
from actors.judges.reliability import Reliability
from actors.judges.rubric import load_rubric
from actors.judges.verdicts import MAX_POINTS, parse_choice, parse_score
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason, SamplingParams, Score, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from actors.judges.reading import Reader
    from actors.judges.rubric import Rubric
    from actors.judges.verdicts import Verdict
    from conf.schema import JudgeConfig
    from orchestrator.judging import TextModel
    from orchestrator.tally import Tally
    from orchestrator.types import Prompt, RolloutGroup

CLOSINGS = {
    ("pointwise", "words"): "Give your reasons in at most 100 words. Then end with a line of its own and nothing behind"
    " it:\nScore: <points, 0 to 5>",
    ("pointwise", "probability"): "Reply with one line and nothing else:\nScore: <points, 0 to 5>",
    ("pairwise", "words"): "Give your reasons in at most 100 words. Then end with a line of its own and nothing behind"
    " it, one of:\nVerdict: A\nVerdict: B\nVerdict: tie",
    ("pairwise", "probability"): "Reply with one line and nothing else, one of:\nVerdict: A\nVerdict: B",
}
"""What the judge is asked to write, by style and verdict; put behind the rubric, so that a rubric cannot forget it."""
_ABORTED = Score(value=None, reason="the completion was aborted")


class Questions:
    """Writes what a judge is asked."""

    def __init__(self, rubric: Rubric, closing: str, model: TextModel, seed: int) -> None:
        self._rubric, self._closing, self._model, self._seed = rubric, closing, model, seed

    def __call__(self, prompt: Prompt, **answers: str) -> str:
        """The question about these answers, each named by its placeholder."""
        mark = choose_mark(self._seed, prompt.text, [prompt.text, *answers.values()])
        blocks = {
            place: fenced(text, mark, self._model.special_tokens)
            for place, text in {"question": prompt.text, **answers}.items()
        }
        return "\n\n".join([explain(mark), self._rubric.fill(blocks).strip(), self._closing])


class LlmJudge:
    """What both styles of judging share.

    Args:
        name: without the version of the model.
        model: the judge.
        questions: writes what it is asked.
        reader: asks it.
        max_failed_fraction: of the votes between two reports that may be unreadable; more stop the run.
    """

    def __init__(
        self, name: str, model: TextModel, questions: Questions, reader: Reader, *, max_failed_fraction: float
    ) -> None:
        self._name, self._model, self._questions, self._reader = name, model, questions, reader
        self._reliability = Reliability(max_failed_fraction)

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"{self._name}:{self._model.version}@1"

    def metrics(self) -> Tally:
        """See `Judge.metrics`; the figures are those of `actors.judges.reliability`."""
        hits = self._reader.cache.start_anew()
        return self._reliability.report(cache_hits=hits)

    def _read(self, questions: Sequence[str]) -> list[tuple[Verdict, ...]]:
        readings = self._reader.read(questions)
        self._reliability.votes(self.name, readings)
        return readings


class PointwiseJudge(LlmJudge):
    """Scores each completion alone: the mean of the votes that could be read, in [0, 5]."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. Without a single readable vote it abstains."""
        judged = [(g, c) for g, group in enumerate(groups) for c in _judged(group)]
        readings = self._read(
            [self._questions(groups[g].prompt, answer=groups[g].completions[c].text) for g, c in judged]
        )
        scores = dict(zip(judged, map(_mean_score, readings), strict=True))
        scored = [
            ScoredGroup(
                group=group,
                scores=tuple(scores.get((g, c), _ABORTED) for c in range(len(group.completions))),
                scorer=self.name,
            )
            for g, group in enumerate(groups)
        ]
        self._reliability.groups(scored)
        return scored


class PairwiseJudge(LlmJudge):
    """Compares every two completions of a group, each two in both orders.

    Args:
        combine: of one vote in both orders, the probability that the answer shown first wins, to the debiased
            probability that the first completion is better.
    """

    def __init__(
        self,
        name: str,
        model: TextModel,
        questions: Questions,
        reader: Reader,
        *,
        combine: Callable[[float, float], float],
        max_failed_fraction: float,
    ) -> None:
        super().__init__(name, model, questions, reader, max_failed_fraction=max_failed_fraction)
        self._combine = combine

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. A comparison without a vote that could be read in both orders is undecided."""
        judged = [(g, i, j) for g, group in enumerate(groups) for i, j in combinations(_judged(group), 2)]
        readings = iter(self._read([question for g, i, j in judged for question in self._both_orders(groups[g], i, j)]))
        tables: list[dict[tuple[int, int], float | None]] = [{} for _ in groups]
        for (g, i, j), shown, swapped in zip(judged, readings, readings, strict=True):
            tables[g][i, j] = self._decide(shown, swapped)
        scored = []
        for group, firsts in zip(groups, tables, strict=True):
            table = fill_table(len(group.completions), firsts)
            scores = mean_wins(table, "none of its comparisons was decided")
            scored.append(ScoredGroup(group=group, scores=scores, scorer=self.name, preferences=table))
        self._reliability.groups(scored)
        return scored

    def _both_orders(self, group: RolloutGroup, i: int, j: int) -> tuple[str, str]:
        first, second = group.completions[i].text, group.completions[j].text
        return (
            self._questions(group.prompt, answer_a=first, answer_b=second),
            self._questions(group.prompt, answer_a=second, answer_b=first),
        )

    def _decide(self, shown: Sequence[Verdict], swapped: Sequence[Verdict]) -> float | None:
        """The mean over the votes that could be read in both orders; None where there is none."""
        orders = [
            (one.value, other.value)
            for one, other in zip(shown, swapped, strict=True)
            if one.value is not None and other.value is not None
        ]
        for one, other in orders:
            self._reliability.orders(one, other)
        return fmean(self._combine(one, other) for one, other in orders) if orders else None


def check_llm_judge(config: JudgeConfig, max_length: int) -> Rubric:
    """What can be refused before any actor starts; the rubric where nothing is.

    Raises:
        ConfigError: the rubric or the principles cannot be used, or replies leave no room for a question.
    """
    if config.verdict == "words" and config.max_tokens >= max_length:
        raise ConfigError(
            f"judge.max_tokens={config.max_tokens}: leaves no room for a question in the judge's context of"
            f" {max_length}: lower it, or raise model.max_length"
        )
    return load_rubric(config)


def build_llm_judge(config: JudgeConfig, model: TextModel, seed: int) -> PointwiseJudge | PairwiseJudge:
    """The judge of `judge.style` and `judge.verdict`.

    Args:
        config: of the judge.
        model: that judges.
        seed: of the run.

    Raises:
        ConfigError: the rubric or the principles are refused, or the model cannot be asked this way.
    """
    rubric = check_llm_judge(config, model.max_length)
    questions = Questions(rubric, CLOSINGS[config.style, config.verdict], model, seed)
    name = f"llm_judge:{config.style}:{config.verdict}:{rubric.digest}"
    if config.style == "pointwise":
        points = {str(n): float(n) for n in range(MAX_POINTS + 1)}
        reader = _reader(config, model, seed, parse_score, "Score: ", points)
        return PointwiseJudge(name, model, questions, reader, max_failed_fraction=config.max_failed_fraction)
    reader = _reader(config, model, seed, parse_choice, "Verdict: ", {"A": 1.0, "B": 0.0})
    return PairwiseJudge(
        name,
        model,
        questions,
        reader,
        combine=both_agree if config.verdict == "words" else both_averaged,
        max_failed_fraction=config.max_failed_fraction,
    )


def both_agree(shown: float, swapped: float) -> float:
    """1 or 0 where the same answer wins in both orders, else a tie (Zheng et al. 2023, section 3.4)."""
    first, second = sign_of(shown, 0.5), sign_of(0.5, swapped)
    return first if first == second else 0.5


def both_averaged(shown: float, swapped: float) -> float:
    """(P(A|AB) + P(B|BA)) / 2: what the judge gives to the first place is added once and taken away once."""
    return (shown + 1 - swapped) / 2


def _reader(
    config: JudgeConfig,
    model: TextModel,
    seed: int,
    parse: Callable[[str], float | None],
    head: str,
    values: Mapping[str, float],
) -> Reader:
    if config.verdict == "probability":
        return Probabilities(model, head, values)
    sampling = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    votes = config.votes if config.temperature else 1  # greedy replies are all the same
    return Words(model, parse, sampling, votes=votes, seed=seed)


def _judged(group: RolloutGroup) -> list[int]:
    """The completions that can be judged: those that nobody gave up."""
    return [k for k, each in enumerate(group.completions) if each.finish_reason is not FinishReason.ABORTED]


def _mean_score(votes: Sequence[Verdict]) -> Score:
    values = [vote.value for vote in votes if vote.value is not None]
    return Score(value=fmean(values)) if values else Score(value=None, reason=votes[-1].failure)
