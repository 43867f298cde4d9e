"""Inputs of objectives, made from sums or at random."""

from __future__ import annotations

import torch

from learners.losses import LossInput

DOUBLE = torch.float64


def from_sums(
    policy, reference, lengths, pairs, *, groups=None, scores=None, labels=None, weights=None, beta=0.1, **columns
):
    """A `LossInput` of completions whose tokens are all equally likely.

    Args:
        policy: of each completion log pi.
        reference: of each completion log pi_ref.
        lengths: tokens of each.
        pairs: (chosen, rejected) indices.
        groups: of each completion; None: one group a pair, whose completions are its own.
        scores: of each completion; None: 1 for chosen and 0 for rejected.
        labels, weights: of each pair; None: 1.
        beta: of all pairs.
        columns: the others.
    """
    lengths = torch.tensor(lengths)
    pairs = torch.tensor(pairs).reshape(-1, 2)

    def spread(sums):
        sums = torch.as_tensor(sums, dtype=DOUBLE)
        return torch.repeat_interleave(sums / lengths, lengths)

    if scores is None:
        scores = torch.zeros(len(lengths), dtype=DOUBLE).index_fill(0, pairs[:, 0], 1.0)
    scores = torch.as_tensor(scores, dtype=DOUBLE)
    ones = torch.ones(len(pairs), dtype=DOUBLE)
    return LossInput(
        **{
            "logprobs": spread(policy),
            "reference": spread(reference),
            "lengths": lengths,
            "groups": torch.arange(len(lengths)) // 2 if groups is None else torch.tensor(groups),
            "chosen": pairs[:, 0],
            "rejected": pairs[:, 1],
            "labels": ones if labels is None else torch.as_tensor(labels, dtype=DOUBLE),
            "weights": ones if weights is None else torch.as_tensor(weights, dtype=DOUBLE),
            "score_chosen": scores[pairs[:, 0]],
            "score_rejected": scores[pairs[:, 1]],
            "beta": ones * beta,
            "mismatched": torch.zeros(0, dtype=torch.int64),
        }
        | columns
    )


def golden(*, beta=0.1, chosen=-20.0, rejected=-25.2, scores=(0.8, 0.3), label=1.0, **columns):
    """One pair with h_w = 1, h_l = -2.7, Delta = 3.7, of 10 and 12 tokens."""
    return from_sums(
        [chosen, rejected], [-21.0, -22.5], [10, 12], [(0, 1)], scores=scores, labels=[label], beta=beta, **columns
    )


def random_input(seed, *, num_groups=3, beta=0.3, spread=1.0):
    """Groups of 2 to 4 completions with different scores, every two of them a pair, best first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    sizes = torch.randint(2, 5, (num_groups,), generator=generator).tolist()
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    lengths = torch.randint(1, 7, (len(groups),), generator=generator)
    scores = torch.rand(len(groups), generator=generator, dtype=DOUBLE)
    pairs = [
        (i, j)
        for i in range(len(groups))
        for j in range(len(groups))
        if groups[i] == groups[j] and scores[i] > scores[j]
    ]
    tokens = int(lengths.sum())
    made = from_sums(
        torch.zeros(len(groups)),
        torch.zeros(len(groups)),
        lengths.tolist(),
        pairs,
        groups=groups,
        scores=scores,
        labels=torch.rand(len(pairs), generator=generator, dtype=DOUBLE) * 0.45 + 0.5,
        beta=beta,
    )
    first = [groups.index(group) for group in range(num_groups)]
    columns = {name: getattr(made, name) for name in made.__slots__}
    reference = -(normal(tokens).abs() + 0.2)
    return LossInput(
        **columns
        | {
            "logprobs": -(normal(tokens) * spread - reference).abs() - 0.05,
            "reference": reference,
            "mismatched": torch.tensor(first),
            "log_collision": -(normal(tokens).abs()),
        }
    )
