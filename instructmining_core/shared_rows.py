"""Sets that share rows have like losses: how alike, and inference that takes it into account.

What a row does to the loss beyond its source and its indicators goes into every set that holds the
row. So the errors of two sets that share rows are correlated, and tilted sets of one source share
many. Least squares stays unbiased; its intervals become too narrow, and a permutation of its
residuals rejects too often. The model, over runs i and j of n:

    cov(ε_i, ε_j) = s² · (share · K_ij + (1 − share) · [i = j])
    K_ij = |A_i ∩ A_j| / √(|A_i| |A_j|), A_i the rows of run i's set

K is known before any training; `share`, the part of the error variance that belongs to rows, is
estimated by restricted maximum likelihood (Patterson & Thompson 1971), as relatedness is in
genetics (Kang et al. 2008, EMMA). Found here: neither the paper nor our statistical plan has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import chi2

MOST = 0.999  # of the error variance: at 1 two sets of the same rows could not be told apart
GRID = np.linspace(0.0, MOST, 112)


def overlap(sets: Sequence[Sequence[str]]) -> np.ndarray:
    """K, (n, n): rows that two sets share over the geometric mean of their sizes.

    >>> overlap([["a", "b"], ["b", "c"], ["d", "e"]])[0]
    array([1. , 0.5, 0. ])
    """
    codes, _ = pd.factorize(np.array([row for rows in sets for row in rows], dtype=object))
    owner = np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
    held = np.zeros((len(sets), codes.max() + 1 if len(codes) else 0))
    held[owner, codes] = 1.0
    held /= np.linalg.norm(held, axis=1, keepdims=True)
    return held @ held.T


def overlap_of(runs: pd.DataFrame, rows: Mapping[str, Sequence[str]]) -> np.ndarray:
    """K of a table of runs; rows : set_id -> the set's row hashes."""
    return overlap([rows[set_id] for set_id in runs["set_id"]])


def row_share(y: np.ndarray, X: np.ndarray, K: np.ndarray,
              level: float = 0.95) -> tuple[float, float, float]:
    """The part of the error variance that belongs to rows: estimate, low, high, each 0 to MOST.

    By restricted maximum likelihood, bounds where the profile falls by a χ² quantile.
    y : (n,); X : (n, k), the regressors; K : (n, n) from `overlap`. All 0 where too few runs are
    left to tell, or no two sets share a row.
    """
    u, s, _ = np.linalg.svd(X, full_matrices=True)
    rest = u[:, int((s > 1e-10 * s.max()).sum()):]
    values, vectors = np.linalg.eigh(rest.T @ K @ rest)
    values = np.maximum(values, 0.0)
    if len(values) < 2 or np.ptp(values) < 1e-9:
        return 0.0, 0.0, 0.0
    squares = (vectors.T @ (rest.T @ y)) ** 2
    variance = GRID[:, None] * values + 1 - GRID[:, None]
    deviance = len(values) * np.log((squares / variance).sum(axis=1))
    deviance += np.log(variance).sum(axis=1)
    inside = GRID[deviance <= deviance.min() + chi2.ppf(level, 1)]
    return float(GRID[deviance.argmin()]), float(inside.min()), float(inside.max())


def whitener(share: float, K: np.ndarray) -> np.ndarray:
    """The symmetric matrix P, (n, n), with P V P = 1 for V = share · K + (1 − share) · 1.

    P y has unrelated errors where y's have covariance V.
    """
    values, vectors = np.linalg.eigh(share * K + (1 - share) * np.eye(len(K)))
    return (vectors / np.sqrt(np.maximum(values, 1e-9))) @ vectors.T
