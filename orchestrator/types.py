"""The records that flow through the system, in the order of the flow.

    Prompt -> RolloutGroup -> ScoredGroup -> PreferencePair -> PreferenceBatch -> UpdateResult -> PolicyVersion
    (prompts)   (generate)      (score)        (pair, filter)    (pack, queue)      (learn)       (publish)

Each stage consumes one record and produces the next; nothing reaches back. Every record is frozen and says where it
came from. Three checkpoints are easy to mix up and are therefore named apart everywhere:

* the **data policy** sampled a completion (`Completion.policy`),
* the **reference** anchors the loss (`PreferencePair.reference`),
* the **scorer** judged it (`ScoredGroup.scorer`, a name with a version).

This module loads neither ray, torch nor vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class PolicyVersion:
    """The identity of one set of weights.

    Example: ``PolicyVersion(number=3, digest="9f1c2ab07d35e814")``
    """

    number: int
    """Counts publications of a run; 0 is the initial model."""
    digest: str
    """xxh3-64 over the names and bytes of all tensors, 16 hex digits."""

    def __str__(self) -> str:
        return f"v{self.number}-{self.digest[:8]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    r"""One question, already rendered with the model's template and tokenized.

    Example: ``Prompt(id="addition/train/17", text="5305+2471\n", token_ids=(1, 8, 6, ...), answer="07776")``
    """

    id: str
    """Unique within the task and stable across runs."""
    text: str
    """What the model reads, for people and judges; `token_ids` is what is really fed."""
    token_ids: tuple[int, ...]
    answer: str | None = None
    """Reference answer for verifiers; None when the task has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How completions are drawn. `temperature == 0` is greedy decoding.

    Example: ``SamplingParams(temperature=1.0, top_p=1.0, max_tokens=64)``
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int
    """Upper bound on new tokens of one completion, the terminating EOS included."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the matched string stays in its text and tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One completion that is asked for.

    Example: ``GenerationRequest(id="1/addition/train/17/0", prompt_token_ids=(1, 8, ...), sampling=..., seed=91)``
    """

    id: str
    """Unique among the requests in flight."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    """Makes the completion independent of the batch it rides in, in [0, 2**31)."""
    cache_scope: str = ""
    """Keys and values are used again among requests of one scope only.

    What was computed for others is equal but for its last bits, and is gone where a run was resumed in between.
    """


class FinishReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """The model emitted its end-of-sequence token (the last of `token_ids`)."""
    STOP = "stop"
    """A stop string matched."""
    LENGTH = "length"
    """`max_tokens` or the context window ran out."""
    ABORTED = "aborted"
    """The caller gave it up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    r"""One answer of a policy.

    Example: ``Completion(token_ids=(8, 13, ..., 2), text="5+1+0=06\n...#07776", logprobs=(-0.01, ...),
    finish_reason=FinishReason.EOS, policy=PolicyVersion(number=3, digest="9f1c2ab07d35e814"))``
    """

    token_ids: tuple[int, ...]
    """New tokens only, the terminating EOS included when there is one."""
    text: str
    """Decoded without special tokens."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the model's own distribution (temperature 1, no truncation)."""
    finish_reason: FinishReason
    policy: PolicyVersion
    """Data policy: the weights that sampled it, or that began to."""
    switches: tuple[tuple[int, PolicyVersion], ...] = ()
    """Where newer weights took over while it was sampled: the index of the first token of each. None may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """K completions of one prompt.

    Example: ``RolloutGroup(prompt=..., completions=(...,) * 8, iteration=1, seed=12345)``
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    iteration: int
    """1 for the first; 0 means evaluation before any update."""
    seed: int
    """Seed of the group; the seed of completion k is derived from it."""


def sampled_by(group: RolloutGroup) -> set[PolicyVersion]:
    """All weights that sampled any token of a group."""
    completions = group.completions
    return {one.policy for one in completions} | {policy for one in completions for _, policy in one.switches}


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A scorer's word on one completion, or its silence.

    Example: ``Score(value=1.0)`` or ``Score(value=None, reason="no answer found")``
    """

    value: float | None
    """Higher is better. None is an abstention: no label may be made from it."""
    reason: str = ""
    """Why the scorer abstained, or why code under test failed; empty where there is nothing to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A rollout group and the scorer's word on each of its completions.

    Example: ``ScoredGroup(group=..., scores=(Score(value=1.0), ...), scorer="verifier:suffix@1")``
    """

    group: RolloutGroup
    scores: tuple[Score, ...]
    """One for each completion, in their order."""
    scorer: str
    """Name and version of the scorer."""
    preferences: tuple[tuple[float | None, ...], ...] | None = None
    """[K][K] of a scorer that compares: entry [i][j] is the probability that completion i is better than j, so that
    [i][j] + [j][i] = 1; None is an abstention. None as a whole for scorers that judge each completion alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, one preferred. One object until it is packed.

    Example: ``PreferencePair(id="1/addition/train/17/3>5", prompt=..., chosen=..., rejected=..., chosen_score=1.0,
    rejected_score=0.0, iteration=1, reference=PolicyVersion(number=0, digest="..."), scorer="verifier:suffix@1")``
    """

    id: str
    """`<iteration>/<prompt id>/<chosen index>><rejected index>`, unique within a run."""
    prompt: Prompt
    chosen: Completion
    rejected: Completion
    chosen_score: float
    rejected_score: float
    iteration: int
    reference: PolicyVersion | None
    """The loss reference this pair will be trained against; None while it is not known (`pipeline.mode=async`)."""
    scorer: str
    label: float = 1.0
    """Probability that the chosen completion is the better one, for losses with soft labels."""
    weight: float = 1.0
    """Multiplies the pair's loss."""
    chosen_token_weights: tuple[float, ...] | None = None
    """Multiplies each token's log-prob in the pair's sums, one for each token of chosen; None: all 1."""
    rejected_token_weights: tuple[float, ...] | None = None
    """The same of rejected."""

    @property
    def margin(self) -> float:
        """Score of the chosen minus score of the rejected completion; positive."""
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreferenceBatch:
    """The pairs of one optimizer step as packed ragged columns: plain numpy, read zero-copy from the object store.

    Prompts and completions are stored once each, however many pairs use them. Group g is one prompt with its
    completions; the tokens of everything lie end to end without padding, each group as ``prompt, completion, ...``.

    Shapes: N tokens, G groups, S completions, C completion tokens, P pairs.
    """

    tokens: NDArray[np.int32]
    """[N] token ids."""
    prompt_starts: NDArray[np.int64]
    """[G] offset in `tokens` where the prompt of group g starts."""
    prompt_lengths: NDArray[np.int32]
    """[G] tokens, at least 1."""
    completion_groups: NDArray[np.int32]
    """[S] group of completion s; non-decreasing."""
    completion_starts: NDArray[np.int64]
    """[S] offset in `tokens` where completion s starts."""
    completion_lengths: NDArray[np.int32]
    """[S] tokens, at least 1."""
    chosen: NDArray[np.int32]
    """[P] index of each pair's chosen completion among the S."""
    rejected: NDArray[np.int32]
    """[P] index of each pair's rejected completion among the S."""
    weights: NDArray[np.float32]
    """[P] multiplies each pair's loss."""
    labels: NDArray[np.float32]
    """[P] probability that the chosen completion is the better one."""
    chosen_scores: NDArray[np.float32]
    """[P] score of each pair's chosen completion."""
    rejected_scores: NDArray[np.float32]
    """[P] score of each pair's rejected completion."""
    data_versions: NDArray[np.int32]
    """[P] number of the oldest data policy among the pair's two completions; staleness is the consumer's own version
    minus this, computed when the batch is consumed."""
    mismatched: NDArray[np.int32]
    """[G] index of a completion of each group that answers the next group's prompt, for objectives that measure a KL
    baseline on such; [0] for the others. It belongs to no pair."""
    chosen_token_weights: NDArray[np.float32] | None
    """[tokens of all pairs' chosen completions, pair after pair]; None: all 1."""
    rejected_token_weights: NDArray[np.float32] | None
    """The same of rejected."""
    reference_logprobs: NDArray[np.float32] | None
    """[C] log-prob of each completion token under the reference, completions in order: as sampled, where the
    reference is what sampled them, else from the learner's forward pass; None until then."""
    sampled_logprobs: NDArray[np.float64] | None
    """[P, 2] log-prob of each pair's chosen and rejected completion under the weights that sampled its tokens. None
    where the pairs' weights need no correction for stale data."""
    pair_ids: tuple[str, ...]
    """[P]"""
    reference: PolicyVersion
    """The loss reference of every pair in the batch."""
    iteration: int
    number: int
    """Counts the batches of the iteration, over all its epochs, from 0."""

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pair_ids)

    @property
    def num_tokens(self) -> int:
        """N: tokens a forward pass computes, shared prompts counted once."""
        return len(self.tokens)

    @property
    def num_completion_tokens(self) -> int:
        """C: tokens that are scored."""
        return int(self.completion_lengths.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedSequence:
    """A worked example that is replayed beside the pairs, such as a judgement that the policy is to remember to make.

    Example: ``SeedSequence(prompt=(1, 19, 8, ...), completion=(8, 13, ..., 20), learned=(False, False, ..., True))``
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    learned: tuple[bool, ...]
    """Which tokens of the completion are learned; at least one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one optimizer step did.

    Example: ``UpdateResult(step=12, batch=3, pair_ids=(...), tokens=840, metrics={"loss": 0.61, "grad_norm": 0.4})``
    """

    step: int
    """Batches consumed in the run, this one included: optimizer steps taken and batches skipped."""
    batch: int
    """`PreferenceBatch.number`."""
    pair_ids: tuple[str, ...]
    """The pairs whose gradient it contains."""
    tokens: int
    """Tokens computed in the forward pass, shared prompts counted once."""
    metrics: Mapping[str, float]
    """Scalars, names and units in docs/metrics.md."""
    skipped: str = ""
    """Why the weights were left as they were (loss not finite, gradient exploding); empty: they moved."""
    notes: tuple[str, ...] = ()
    """What people should know of it, such as a micro-batch that was halved for want of memory."""
