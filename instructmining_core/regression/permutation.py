"""A permutation test of the whole procedure, choice of variables included; shared rows counted.

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
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from ..config import InstructMiningError
from .paper_rule import SubsetSearch
from .rule import LEVEL, residualise
from .run_table import DESIGNED, Standardizer, pick_arms, share_matrix, standardised

MOST = 0.999  # of the error variance: at 1 two sets of the same rows could not be told apart
GRID = np.linspace(0.0, MOST, 112)


def row_overlap(sets: Sequence[Sequence[str]]) -> np.ndarray:
    """K, (n, n): rows that two sets share over the geometric mean of their sizes.

    >>> row_overlap([["a", "b"], ["b", "c"], ["d", "e"]])[0]
    array([1. , 0.5, 0. ])
    """
    codes, _ = pd.factorize(np.array([row for rows in sets for row in rows], dtype=object))
    owner = np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
    held = np.zeros((len(sets), codes.max() + 1 if len(codes) else 0))
    held[owner, codes] = 1.0
    held /= np.linalg.norm(held, axis=1, keepdims=True)
    return held @ held.T


def row_share(y: np.ndarray, X: np.ndarray, K: np.ndarray) -> tuple[float, float, float]:
    """The part of the error variance that belongs to rows: estimate, low, high, each 0 to MOST.

    By restricted maximum likelihood, bounds where the profile falls by a χ² quantile.
    y : (n,); X : (n, k), the regressors; K : (n, n) from `row_overlap`. All 0 where too few runs
    are left to tell, or no two sets share a row.
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
    inside = GRID[deviance <= deviance.min() + chi2.ppf(LEVEL, 1)]
    return float(GRID[deviance.argmin()]), float(inside.min()), float(inside.max())


def whitener(share: float, K: np.ndarray) -> np.ndarray:
    """The symmetric matrix P, (n, n), with P V P = 1 for V = share · K + (1 − share) · 1."""
    values, vectors = np.linalg.eigh(share * K + (1 - share) * np.eye(len(K)))
    return (vectors / np.sqrt(np.maximum(values, 1e-9))) @ vectors.T


MEANING = {
    "H0b": "indicators add nothing to source shares",
    "H0a": "composition does not matter at all (shown only: it also rejects where nothing but "
           "the sources differ)",
}


@dataclass(frozen=True)
class Permutation:
    """statistic : observed max R²; null : (n_permutations,) the same under permutation;
    p : (1 + #{null ≥ statistic}) / (1 + n_permutations); hypothesis : "H0b" or "H0a";
    row_share : part of the error variance that belongs to shared rows, None where not counted
    """

    statistic: float
    null: np.ndarray
    p: float
    hypothesis: str
    row_share: float | None = None

    @property
    def meaning(self) -> str:
        """The hypothesis in words."""
        return MEANING[self.hypothesis]


def freedman_lane(search: SubsetSearch, y: np.ndarray, n_permutations: int,
                  rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Observed max R² of `search` and its values with the residuals of the controls permuted.

    y : (n,). Freedman & Lane 1983, as in Winkler et al. 2014: the part of y that the controls
    explain drops out of R² beyond the controls.
    """
    e = residualise(y[:, None], search.controls)[:, 0]
    order = np.argsort(rng.random((n_permutations, len(e))), axis=1)
    values = search.max_r2(np.column_stack([e, e[order].T]))
    return float(values[0]), values[1:]


def permutation(runs: pd.DataFrame, columns: Sequence[str],
                standardizer: Standardizer | None = None, *, null: str = "H0b",
                size: int = 4, n_permutations: int = 999, seed: int = 0,
                rows: Mapping[str, Sequence[str]] | None = None,
                arms: Sequence[str] | None = DESIGNED) -> Permutation:
    """Is the best R² over all subsets of `size` indicators more than chance gives?

    null="H0b" (the verdict): R² beyond the source shares. "H0a": R² beyond a constant, losses
    permuted freely. One run a set; runs as in `fit_rule`.
    rows : set_id -> row hashes. Sets that share rows have like errors, and permuting those rejects
        too often. With `rows` the runs are whitened first (`whitener`) at the estimated share of
        the rows and at both its bounds; the answer is that of the largest p (Berger & Boos 1994).
        Without them the errors are taken as unrelated.
    """
    if null not in MEANING:
        raise InstructMiningError(f"null {null!r} is none of {list(MEANING)}")
    runs = pick_arms(runs, arms)
    X = standardised(runs, columns, standardizer)
    y = runs["log_loss"].to_numpy(float)
    controls = share_matrix(runs)[0] if null == "H0b" else np.ones((len(X), 1))
    rng = np.random.default_rng(seed)
    shares, K = (None,), None
    if rows is not None:
        K = row_overlap([rows[set_id] for set_id in runs["set_id"]])
        shares = sorted(set(row_share(y, controls, K)))
    tests = [_test(X, y, controls, size, n_permutations, rng, null, K, share) for share in shares]
    return max(tests, key=lambda test: test.p)


def _test(X, y, controls, size, n_permutations, rng, null, K, share) -> Permutation:
    if share is not None:
        X, y, controls = (whitener(share, K) @ values for values in (X, y, controls))
    found, drawn = freedman_lane(SubsetSearch(X, controls, size), y, n_permutations, rng)
    # ties count against the rule; the tolerance keeps rounding from breaking a tie
    p = (1 + int((drawn >= found - 1e-12).sum())) / (1 + n_permutations)
    return Permutation(found, drawn, p, null, share)
