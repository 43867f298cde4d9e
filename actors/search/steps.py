"""Completions to steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.search.tree import Step

if TYPE_CHECKING:
    from collections.abc import Collection

    from orchestrator.types import Completion


def split_steps(completion: Completion, ends: Collection[int]) -> list[Step]:
    """The steps of a completion: a step ends with a token of `ends`, the last one with the completion.

    Args:
        completion: at least one token.
        ends: token ids whose text holds the separator.
    """
    cuts = [place + 1 for place, token in enumerate(completion.token_ids[:-1]) if token in ends]
    spans = zip([0, *cuts], [*cuts, len(completion.token_ids)], strict=True)
    return [
        Step(tokens=completion.token_ids[start:end], logprobs=completion.logprobs[start:end]) for start, end in spans
    ]
