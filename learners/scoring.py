"""Log-probs of sequences, outside training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from orchestrator.batching import pack_sequences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from learners.policy import Policy
    from orchestrator.batching import Tokens


def token_logprobs(
    policy: Policy,
    parameters: Mapping[str, Tensor] | None,
    sequences: Sequence[tuple[Tokens, Tokens]],
    max_tokens: int,
) -> list[NDArray[np.float32]]:
    """Log-probs of the completions of (prompt, completion) sequences, each [tokens of the completion].

    Args:
        policy: the architecture.
        parameters: under which; None: the live ones.
        sequences: prompts and completions.
        max_tokens: of one forward pass, a longer sequence alone excepted.
    """
    results = []
    for part in _portions(sequences, max_tokens):
        columns, index = pack_sequences(part)
        logprobs = policy.logprobs_with(parameters, columns).cpu().numpy()
        completions = np.split(logprobs, np.cumsum(columns.completion_lengths)[:-1])
        results += [completions[number] for number in index]
    return results


def _portions(sequences: Sequence[tuple[Tokens, Tokens]], max_tokens: int) -> list[list[tuple[Tokens, Tokens]]]:
    """Neighbours of at most `max_tokens` together, at least one each; shared prompts are counted each time."""
    portions: list[list[tuple[Tokens, Tokens]]] = []
    room = 0
    for sequence in sequences:
        size = len(sequence[0]) + len(sequence[1])
        if not portions or size > room:
            portions.append([])
            room = max_tokens
        portions[-1].append(sequence)
        room -= size
    return portions
