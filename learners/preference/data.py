"""Pairs of answers as groups to train on: from files, and split by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from learners.preference.records import Comparison, Group
from orchestrator.errors import DataError
from orchestrator.tasks.records import read_records
from orchestrator.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from learners.preference.encoding import Encoder
    from learners.preference.records import Tokens
    from orchestrator.tasks.records import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A text and whether it ended itself. Example: ``Answer(text="5+1+0=06", ended=False)``."""

    text: str
    ended: bool = True
    """False where it was cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPair:
    """Two answers to one prompt. Example: ``LabelledPair(prompt="2+2?", chosen=Answer(...), rejected=Answer(...))``."""

    prompt: str
    """As the policy read it, template included."""
    chosen: Answer
    rejected: Answer
    label: float = 1.0
    """Probability that the chosen answer is the better one."""


def read_labelled_pairs(path: Path) -> list[LabelledPair]:
    """Pairs of a run (`pairs/*.parquet`), or of a JSONL or Parquet file with prompt, chosen, rejected and maybe label.

    Raises:
        DataError: the file or a record in it is refused, with its line.
    """
    return [_parse(record) for record in read_records(path)]


def _parse(record: Record) -> LabelledPair:
    of_a_run = "prompt_text" in record.fields
    suffix = "_text" if of_a_run else ""
    label = record.fields.get("label", 1.0)
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise record.error(f"field 'label' is {label!r}, but must be a probability from 0 to 1.")

    def answer(name: str) -> Answer:
        cut = record.fields.get(f"{name}_finish_reason") == FinishReason.LENGTH
        return Answer(text=record.text(f"{name}{suffix}"), ended=not cut)

    return LabelledPair(
        prompt=record.text(f"prompt{suffix}"), chosen=answer("chosen"), rejected=answer("rejected"), label=float(label)
    )


def hold_out(pairs: Sequence[LabelledPair], fraction: float) -> tuple[list[LabelledPair], list[LabelledPair]]:
    """(Training, held-out) pairs, by a hash of the prompt: no prompt stands on both sides, whatever the order."""
    bound = fraction * 2**64
    held = [xxhash.xxh3_64_intdigest(pair.prompt.encode()) < bound for pair in pairs]
    training = [pair for pair, out in zip(pairs, held, strict=True) if not out]
    return training, [pair for pair, out in zip(pairs, held, strict=True) if out]


def make_groups(pairs: Iterable[LabelledPair], encoder: Encoder, *, side_by_side: bool) -> tuple[list[Group], int]:
    """Groups of all pairs of a prompt, each of its answers once, and how many pairs were too long to be read.

    Args:
        pairs: in any order.
        encoder: of the model that will read them.
        side_by_side: whether the model reads both answers of a pair at once.

    Raises:
        DataError: none is left.
    """
    by_prompt: dict[str, list[LabelledPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups, dropped = [], 0
    for text, members in by_prompt.items():
        prompt = encoder.prompt(text)
        answers: dict[Tokens, int] = {}
        comparisons = []
        for pair in members:
            first, second = (encoder.answer(a.text, ended=a.ended) for a in (pair.chosen, pair.rejected))
            length = len(first) + len(second) if side_by_side else max(len(first), len(second))
            if len(prompt) + length > encoder.max_length:
                dropped += 1
                continue
            indices = [answers.setdefault(tokens, len(answers)) for tokens in (first, second)]
            comparisons.append(Comparison(first=indices[0], second=indices[1], label=pair.label))
        if comparisons:
            groups.append(Group(prompt=prompt, answers=tuple(answers), comparisons=tuple(comparisons)))
    if not groups:
        raise DataError(
            f"none of the {dropped} pairs fits the model's {encoder.max_length} tokens: raise max_length, or take"
            " shorter answers"
            if dropped
            else "there are no pairs: give a file with some"
        )
    return groups, dropped
