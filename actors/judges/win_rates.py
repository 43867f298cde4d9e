"""From comparisons of every two answers to how often each of them wins.

L [K][K] holds the logits of a preference model: antisymmetric, L[i][j] > 0 where i is better than j, NaN where nothing
can be said (the diagonal is not read).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def win_matrix(logits: Matrix) -> Matrix:
    """P [K][K] = sigmoid(L), with 1/2 on the diagonal: an answer beats its equal half of the time."""
    wins: Matrix = (1 + np.tanh(np.asarray(logits, dtype=np.float64) / 2)) / 2  # sigmoid without overflow
    np.fill_diagonal(wins, 0.5)
    return wins


def win_rates(wins: Matrix) -> Matrix:
    """P(y_i beats pi) [K], estimated on the K samples of pi: mean of row i over all that are known, itself included.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment" (arXiv:2405.00675), Algorithm 1.
    The released code counts an answer's draw with itself, which draws its rate towards 1/2 by 1/K of the way.
    """
    rates: Matrix = np.nanmean(wins, axis=1)
    return rates


def mean_scores(logits: Matrix) -> Matrix:
    """s_i [K]: the mean of row i of L, 0 on the diagonal, as PairRM ranks (Jiang et al. 2023, LLM-Blender)."""
    filled = np.array(logits, dtype=np.float64)
    np.fill_diagonal(filled, 0.0)
    scores: Matrix = np.nanmean(filled, axis=1)
    return scores


def aggregated(logits: Matrix) -> Matrix:
    """[K][K] logits s_i - s_j, which the released code of SPPO compares answers by: transitive whatever L says."""
    scores = mean_scores(logits)
    result: Matrix = scores[:, None] - scores[None, :]
    result[np.isnan(logits)] = np.nan
    return result
