"""How good the policy is on held-out problems that tune nothing: greedy and sampled, with intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, pstdev
from typing import TYPE_CHECKING

from actors.judges.reliability import truth_figures
from orchestrator.metrics import Accuracy, wilson_interval
from orchestrator.rollouts import Draw, sampling_of
from orchestrator.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conf.schema import Config
    from orchestrator.judging import Judge
    from orchestrator.rollouts import Rollouts
    from orchestrator.types import Completion, Prompt, ScoredGroup

_Z95 = NormalDist().inv_cdf(0.975)
ANSWERS = 4
"""Completions of each anchor, so that most have right and wrong ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation of one policy."""

    greedy: Accuracy
    sampled: Accuracy
    abstained: int
    """Completions on which the scorer abstained; they count as not solved."""
    greedy_answers: Sequence[ScoredGroup]
    """One completion a prompt, each scored."""
    sampled_answers: Sequence[ScoredGroup]
    """The same, sampled."""

    def metrics(self) -> dict[str, float]:
        """Scalars for tracking, under `eval/`."""
        found = {
            f"eval/{kind}_{part}": float(value)
            for kind, accuracy in (("greedy", self.greedy), ("sampled", self.sampled))
            for part, value in asdict(accuracy).items()
        }
        return found | {"eval/abstained": float(self.abstained), "eval/tokens": float(self.tokens)}

    @property
    def tokens(self) -> int:
        """Generated for it."""
        return sum(len(one.group.completions[0].token_ids) for one in (*self.greedy_answers, *self.sampled_answers))

    @property
    def sampled_completions(self) -> list[tuple[Prompt, Completion]]:
        """What was sampled, for estimates of KL; none of the prompts that were set aside."""
        found = [(one.group.prompt, one.group.completions[0]) for one in self.sampled_answers]
        return [(prompt, completion) for prompt, completion in found if completion.token_ids]


def evaluate(
    rollouts: Rollouts, examiner: Judge, prompts: Sequence[Prompt], config: Config, iteration: int
) -> Evaluation:
    """Answers every prompt once greedily and once by sampling, in one wave, and has `examiner` score the answers."""

    def draw(purpose: str, temperature: float) -> Draw:
        sampling = SamplingParams(
            temperature=temperature, max_tokens=config.generator.max_tokens, stop=tuple(config.generator.stop)
        )
        return Draw(purpose=purpose, iteration=iteration, num_samples=1, sampling=sampling)

    greedy, sampled = rollouts.sample(prompts, [draw("greedy", 0.0), draw("sampled", config.evaluation.temperature)])
    scored = examiner.score(greedy + sampled)
    examiner.metrics()  # which are of the training data, where the judge that trains is asked: these are dropped
    greedy_answers, sampled_answers = scored[: len(greedy)], scored[len(greedy) :]
    return Evaluation(
        greedy=accuracy(greedy_answers),
        sampled=accuracy(sampled_answers),
        abstained=sum(score.value is None for group in scored for score in group.scores),
        greedy_answers=greedy_answers,
        sampled_answers=sampled_answers,
    )


def anchor_figures(
    rollouts: Rollouts, judge: Judge, examiner: Judge, prompts: Sequence[Prompt], config: Config, iteration: int
) -> dict[str, float]:
    """How good the judge is where the truth is known: both judges score the same answers to held-out problems.

    What comes of it is reported and trains nothing.

    Returns:
        `judge/accuracy` and `judge/calibration_error`; empty where no answers differ in truth.
    """
    sampling = sampling_of(config.generator)
    draw = Draw(purpose="anchor", iteration=iteration, num_samples=ANSWERS, sampling=sampling)
    (groups,) = rollouts.sample(prompts[: config.evaluation.anchors], [draw])
    found = truth_figures(judge.score(groups), examiner.score(groups))
    judge.metrics()  # which are of the training data: those of the anchors are dropped
    return found


def accuracy(scored: Sequence[ScoredGroup]) -> Accuracy:
    """The mean score, an abstention counting 0, with a 95 % interval.

    The interval is Wilson's for scores in [0, 1], which are shares of solved problems, and the normal one of a mean for
    a function that scores on another scale.
    """
    values = [score.value or 0.0 for group in scored for score in group.scores]
    mean, n = fmean(values), len(values)
    if all(0 <= value <= 1 for value in values):
        low, high = wilson_interval(min(sum(values), n), n)
    else:
        reach = _Z95 * pstdev(values) / math.sqrt(n)
        low, high = mean - reach, mean + reach
    return Accuracy(value=mean, low=low, high=high, n=n)
