"""What a run leaves behind as Parquet: every rollout before any filter, and every pair that was trained on.

    <run>/samples/iteration-0001-wave-0000.parquet     one row a completion that waits for its score, and only so long
    <run>/rollouts/iteration-0001-wave-0000.parquet    one row a completion, groups in order, with its score
    <run>/pairs/iteration-0001-wave-0000.parquet       one row a pair, in the order in which they were made
    <run>/trees/iteration-0001-wave-0000.parquet       one row a node of each searched tree, parents before children
    <run>/evaluations/iteration-0001-greedy.parquet    one row an answer to a held-out prompt; -sampled too
    <run>/skipped/iteration-0001-batch-0007.parquet    one row a pair of a batch that left the weights as they were

Files are added and never changed. One is whole or absent, and the same records give the same bytes. Every column says
what it holds and in which unit in its field metadata (`pyarrow.parquet.read_schema(path).field(name).metadata`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import DataError
from orchestrator.files import atomic_file
from orchestrator.types import (
    Completion,
    FinishReason,
    PolicyVersion,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Score,
    ScoredGroup,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from actors.search.tree import Node, Tree

_TOKENS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float64())
_SWITCHES = pa.list_(pa.struct([("token", pa.int32()), ("number", pa.int32()), ("digest", pa.string())]))
_REFERENCE = "loss reference (null: that of its iteration, which was not known when the pair was made)"
_VERSION = "3"


def _column(name: str, kind: Any, doc: str, unit: str = "", *, nullable: bool = False) -> Any:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc, "unit": unit})


def _schema(record: str, columns: list[Any]) -> Any:
    return pa.schema(columns, metadata={"agon.record": record, "agon.version": _VERSION})


_PROMPT = [
    _column("prompt_id", pa.string(), "unique within the task"),
    _column("prompt_text", pa.string(), "the prompt as the model reads it"),
    _column("prompt_token_ids", _TOKENS, "what is fed to the model", "token ids"),
    _column("answer", pa.string(), "reference answer; null where the task has none", nullable=True),
]


def _completion(prefix: str, whose: str) -> list[Any]:
    return [
        _column(f"{prefix}text", pa.string(), f"{whose}, decoded without special tokens"),
        _column(f"{prefix}token_ids", _TOKENS, f"{whose}, the terminating EOS included", "token ids"),
        _column(f"{prefix}logprobs", _LOGPROBS, f"of each token of {whose} under its data policy, T=1", "nats"),
        _column(f"{prefix}finish_reason", pa.string(), f"why {whose} ended: eos, stop, length or aborted"),
        _column(f"{prefix}policy_number", pa.int32(), f"data policy of {whose}: publications before it", "count"),
        _column(f"{prefix}policy_digest", pa.string(), f"data policy of {whose}: xxh3-64 of its weights", "hex"),
        _column(f"{prefix}switches", _SWITCHES, "newer weights that took over, each from a token on"),
    ]


_SAMPLE = [
    _column("group", pa.int32(), "rows of one prompt's group share it; counts from 0 in this file", "index"),
    _column("iteration", pa.int32(), "1 for the first; 0 is evaluation before any update", "index"),
    _column("seed", pa.int64(), "seed of the group"),
    *_PROMPT,
    *_completion("", "the completion"),
]
SAMPLES = _schema("sample", _SAMPLE)
ROLLOUTS = _schema(
    "rollout",
    [
        *_SAMPLE,
        _column("score", pa.float64(), "higher is better; null is an abstention", "scorer's own", nullable=True),
        _column("score_reason", pa.string(), "why the scorer abstained or the tests failed; may be empty"),
        _column("scorer", pa.string(), "name and version of the scorer"),
        _column(
            "preferences",
            pa.list_(pa.field("item", pa.float64(), nullable=True)),
            "probability that this completion is better than each of its group; null where the scorer does not compare",
            nullable=True,
        ),
    ],
)
PAIRS = _schema(
    "pair",
    [
        _column("id", pa.string(), "<iteration>/<prompt id>/<chosen index>><rejected index>"),
        _column("iteration", pa.int32(), "1 for the first", "index"),
        *_PROMPT,
        *_completion("chosen_", "the chosen completion"),
        *_completion("rejected_", "the rejected completion"),
        _column("chosen_score", pa.float64(), "score of the chosen completion", "scorer's own"),
        _column("rejected_score", pa.float64(), "score of the rejected completion", "scorer's own"),
        _column("reference_number", pa.int32(), f"{_REFERENCE}: publications before it", "count", nullable=True),
        _column("reference_digest", pa.string(), f"{_REFERENCE}: xxh3-64 of its weights", "hex", nullable=True),
        _column("scorer", pa.string(), "name and version of the scorer"),
        _column("label", pa.float64(), "probability that the chosen completion is the better one"),
        _column("weight", pa.float64(), "multiplies the pair's loss"),
        _column("chosen_token_weights", _LOGPROBS, "multiply the chosen's log-probs; null: all 1", nullable=True),
        _column("rejected_token_weights", _LOGPROBS, "multiply the rejected's log-probs; null: all 1", nullable=True),
    ],
)
TREES = _schema(
    "tree",
    [
        _column("prompt_id", pa.string(), "unique within the task"),
        _column("prompt_text", pa.string(), "the prompt as the model reads it"),
        _column("node", pa.int32(), "counts from 0, the prompt itself, in each tree", "index"),
        _column("parent", pa.int32(), "node of the state before the step; null for the prompt", "index", nullable=True),
        _column("depth", pa.int32(), "steps from the prompt", "count"),
        _column("text", pa.string(), "the step that leads here, decoded without special tokens"),
        _column("token_ids", _TOKENS, "of the step", "token ids"),
        _column("logprobs", _LOGPROBS, "of each token of the step under its data policy, T=1", "nats"),
        _column("visits", pa.int32(), "N: simulations that went through", "count"),
        _column("attempts", pa.int32(), "rollouts started here", "count"),
        _column("value", pa.float64(), "v: of a finished solution its score, else 0", "scorer's own"),
        _column("action_value", pa.float64(), "Q of the step that leads here", "scorer's own"),
        _column("terminal", pa.bool_(), "whether a solution ends here"),
    ],
)


@dataclass(frozen=True, slots=True)
class Store:
    """The Parquet files of one run folder."""

    run_dir: Path

    def path(self, kind: str, iteration: int, wave: int) -> Path:
        """Where the records of a wave are; `kind` is samples, rollouts, pairs or trees."""
        return self.run_dir / kind / f"iteration-{iteration:04d}-wave-{wave:04d}.parquet"

    def write_samples(self, iteration: int, wave: int, groups: Sequence[RolloutGroup]) -> Path:
        """Writes groups that nobody scored yet; a file of an earlier attempt at the wave is replaced.

        Raises:
            ValueError: a group has no completion.
        """
        rows = [row for index, group in enumerate(groups) for row in _sample_rows(index, group)]
        return _write(self.path("samples", iteration, wave), rows, SAMPLES)

    def write_rollouts(self, iteration: int, wave: int, groups: Sequence[ScoredGroup]) -> Path:
        """Writes scored groups as they came; a file of an earlier attempt at the wave is replaced.

        Raises:
            ValueError: a group has no completion, or not one score for each.
        """
        rows = [row for index, group in enumerate(groups) for row in _rollout_rows(index, group)]
        return _write(self.path("rollouts", iteration, wave), rows, ROLLOUTS)

    def write_pairs(self, iteration: int, wave: int, pairs: Sequence[PreferencePair]) -> Path:
        """Writes the pairs that are trained on; a file of an earlier attempt at the wave is replaced."""
        return _write(self.path("pairs", iteration, wave), [_pair_row(pair) for pair in pairs], PAIRS)

    def evaluation_path(self, iteration: int, kind: str) -> Path:
        """Where the answers to held-out prompts are; `kind` is greedy or sampled."""
        return self.run_dir / "evaluations" / f"iteration-{iteration:04d}-{kind}.parquet"

    def write_evaluation(self, iteration: int, kind: str, answers: Sequence[ScoredGroup]) -> Path:
        """Writes scored answers to held-out prompts; a file of an earlier attempt at them is replaced."""
        rows = [row for index, group in enumerate(answers) for row in _rollout_rows(index, group)]
        return _write(self.evaluation_path(iteration, kind), rows, ROLLOUTS)

    def write_skipped(self, iteration: int, batch: int, pairs: Sequence[PreferencePair]) -> Path:
        """Writes the pairs of a batch that left the weights as they were, to be looked at."""
        path = self.run_dir / "skipped" / f"iteration-{iteration:04d}-batch-{batch:04d}.parquet"
        return _write(path, [_pair_row(pair) for pair in pairs], PAIRS)

    def write_trees(
        self, iteration: int, wave: int, trees: Sequence[tuple[Prompt, Tree]], decode: Callable[[Sequence[int]], str]
    ) -> Path:
        """Writes searched trees, to be looked at later; `decode` gives the text of token ids."""
        rows = [_node_row(prompt, node, decode) for prompt, tree in trees for node in tree.nodes]
        return _write(self.path("trees", iteration, wave), rows, TREES)


def read_samples(path: Path) -> list[RolloutGroup]:
    """Groups in the order in which they were written.

    Raises:
        DataError: the file is no sample file of this version, or it is damaged.
    """
    rows = _read(path, SAMPLES)
    return [_group(list(group)) for _, group in groupby(rows, key=lambda row: row["group"])]


def read_rollouts(path: Path) -> list[ScoredGroup]:
    """Scored groups in the order in which they were written.

    Raises:
        DataError: the file is no rollout file of this version, or it is damaged.
    """
    rows = _read(path, ROLLOUTS)
    return [_scored_group(list(group)) for _, group in groupby(rows, key=lambda row: row["group"])]


def read_pairs(path: Path) -> list[PreferencePair]:
    """Pairs in the order in which they were written.

    Raises:
        DataError: the file is no pair file of this version, or it is damaged.
    """
    return [_pair(row) for row in _read(path, PAIRS)]


def _write(path: Path, rows: list[dict[str, Any]], schema: Any) -> Path:
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    return path


def _read(path: Path, schema: Any) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if not table.schema.equals(schema, check_metadata=False) or table.schema.metadata != schema.metadata:
        raise DataError(
            f"{path}: holds {table.schema.metadata or 'no agon records'}, expected {schema.metadata}:"
            " read it with the version of agon that wrote it"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _sample_rows(index: int, group: RolloutGroup) -> list[dict[str, Any]]:
    if not group.completions:
        raise ValueError(f"the group of prompt {group.prompt.id!r} has no completion")
    shared = {"group": index, "iteration": group.iteration, "seed": group.seed, **_prompt_row(group.prompt)}
    return [{**shared, **_completion_row("", completion)} for completion in group.completions]


def _rollout_rows(index: int, scored: ScoredGroup) -> list[dict[str, Any]]:
    samples = _sample_rows(index, scored.group)
    preferences = scored.preferences or (None,) * len(samples)
    return [
        {
            **sample,
            "scorer": scored.scorer,
            "score": score.value,
            "score_reason": score.reason,
            "preferences": row,
        }
        for sample, score, row in zip(samples, scored.scores, preferences, strict=True)
    ]


def _pair_row(pair: PreferencePair) -> dict[str, Any]:
    plain = (
        *("id", "iteration", "chosen_score", "rejected_score", "scorer", "label", "weight"),
        *("chosen_token_weights", "rejected_token_weights"),
    )
    return {
        **{name: getattr(pair, name) for name in plain},
        **_prompt_row(pair.prompt),
        **_completion_row("chosen_", pair.chosen),
        **_completion_row("rejected_", pair.rejected),
        "reference_number": pair.reference and pair.reference.number,
        "reference_digest": pair.reference and pair.reference.digest,
    }


def _node_row(prompt: Prompt, node: Node, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    tokens, logprobs = (node.step.tokens, node.step.logprobs) if node.step else ((), ())
    plain = ("parent", "depth", "visits", "attempts", "value", "action_value", "terminal")
    return {
        **{name: getattr(node, name) for name in plain},
        "prompt_id": prompt.id,
        "prompt_text": prompt.text,
        "node": node.index,
        "text": decode(list(tokens)),
        "token_ids": tokens,
        "logprobs": logprobs,
    }


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "prompt_text": prompt.text,
        "prompt_token_ids": prompt.token_ids,
        "answer": prompt.answer,
    }


def _completion_row(prefix: str, completion: Completion) -> dict[str, Any]:
    row = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason.value,
        "policy_number": completion.policy.number,
        "policy_digest": completion.policy.digest,
        "switches": [
            {"token": token, "number": policy.number, "digest": policy.digest} for token, policy in completion.switches
        ],
    }
    return {prefix + name: value for name, value in row.items()}


def _group(rows: list[dict[str, Any]]) -> RolloutGroup:
    first = rows[0]
    return RolloutGroup(
        prompt=_prompt(first),
        completions=tuple(_read_completion("", row) for row in rows),
        iteration=first["iteration"],
        seed=first["seed"],
    )


def _scored_group(rows: list[dict[str, Any]]) -> ScoredGroup:
    first = rows[0]
    scores = tuple(Score(value=row["score"], reason=row["score_reason"]) for row in rows)
    preferences = None if first["preferences"] is None else tuple(tuple(row["preferences"]) for row in rows)
    return ScoredGroup(group=_group(rows), scores=scores, scorer=first["scorer"], preferences=preferences)


def _pair(row: dict[str, Any]) -> PreferencePair:
    return PreferencePair(
        id=row["id"],
        prompt=_prompt(row),
        chosen=_read_completion("chosen_", row),
        rejected=_read_completion("rejected_", row),
        chosen_score=row["chosen_score"],
        rejected_score=row["rejected_score"],
        iteration=row["iteration"],
        reference=_policy_or_none(row["reference_number"], row["reference_digest"]),
        scorer=row["scorer"],
        label=row["label"],
        weight=row["weight"],
        chosen_token_weights=_optional(row["chosen_token_weights"]),
        rejected_token_weights=_optional(row["rejected_token_weights"]),
    )


def _policy_or_none(number: int | None, digest: str | None) -> PolicyVersion | None:
    return None if number is None or digest is None else PolicyVersion(number=number, digest=digest)


def _optional(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(
        id=row["prompt_id"],
        text=row["prompt_text"],
        token_ids=tuple(row["prompt_token_ids"]),
        answer=row["answer"],
    )


def _read_completion(prefix: str, row: dict[str, Any]) -> Completion:
    return Completion(
        token_ids=tuple(row[f"{prefix}token_ids"]),
        text=row[f"{prefix}text"],
        logprobs=tuple(row[f"{prefix}logprobs"]),
        finish_reason=FinishReason(row[f"{prefix}finish_reason"]),
        policy=PolicyVersion(number=row[f"{prefix}policy_number"], digest=row[f"{prefix}policy_digest"]),
        switches=tuple(
            (switch["token"], PolicyVersion(number=switch["number"], digest=switch["digest"]))
            for switch in row[f"{prefix}switches"]
        ),
    )
