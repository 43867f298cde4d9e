"""Seed data from a file to token sequences: `{"prompt": ..., "completion": ..., "spans": [[start, end], ...]}` a line.

`prompt` is a text or a list of chat messages, as in a file of prompts. Without `spans` all of the completion is
learned, and that it ends; with them, the characters from `start` to before `end` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.prompts import Renderer
from orchestrator.tasks.base import Problem
from orchestrator.tasks.files import parse_content
from orchestrator.tasks.records import describe, read_records
from orchestrator.types import SeedSequence

TINY_SEEDS = "judge_seeds.jsonl"

if TYPE_CHECKING:
    from conf.schema import Config
    from orchestrator.tasks.records import Record


def load_seeds(config: Config, model_dir: Path, tokenizer: Any) -> list[SeedSequence]:
    """The seed data of a run: of `learner.replay_path`, or what the tiny model was taught to judge with.

    Raises:
        DataError: see `read_seeds`.
    """
    if not config.learner.replay_sequences:
        return []
    path = Path(config.learner.replay_path or model_dir / TINY_SEEDS)
    return read_seeds(path, Renderer(tokenizer, config.task), tokenizer, max_length=config.model.max_length)


def read_seeds(path: Path, render: Renderer, tokenizer: Any, *, max_length: int) -> list[SeedSequence]:
    """The sequences of a file, in its order.

    Args:
        path: .jsonl or .parquet.
        render: of the prompts.
        tokenizer: a fast one, which knows the characters of its tokens.
        max_length: context, tokens.

    Raises:
        DataError: naming the line, what was found and what would be right.
    """
    return [_sequence(record, render, tokenizer, max_length) for record in read_records(path)]


def _sequence(record: Record, render: Renderer, tokenizer: Any, max_length: int) -> SeedSequence:
    content = parse_content(record, "prompt")
    prompt = render(Problem(id=str(record.number), content=content, source=record.place)).token_ids
    text = record.text("completion")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(encoded.input_ids), encoded.offset_mapping
    if "spans" in record.fields:
        spans = _spans(record, len(text))
        learned = [any(start < end and first < end and start < last for first, last in spans) for start, end in offsets]
    else:
        learned = [True] * len(tokens)
    if not any(learned):
        raise record.error("no token of the completion is learned: give a longer text, or other spans")
    if len(prompt) + len(tokens) + 1 > max_length:
        raise record.error(
            f"prompt, completion and end have {len(prompt) + len(tokens) + 1} tokens, model.max_length is {max_length}"
        )
    return SeedSequence(
        prompt=prompt,
        completion=(*tokens, tokenizer.eos_token_id),
        learned=(*learned, "spans" not in record.fields),
    )


def _spans(record: Record, length: int) -> list[tuple[int, int]]:
    spans = record.value("spans")
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not whole or not 0 <= span[0] < span[1] <= length:
            raise record.error(
                f"field 'spans' holds {describe(span)}; each must be [start, end) in the {length} characters of"
                " 'completion'"
            )
    return [(start, end) for start, end in spans]
