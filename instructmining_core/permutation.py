"""A permutation test of the whole procedure, choice of variables included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .ols import residualise
from .runs import DESIGNED, Standardisation, pick_arms, share_matrix, standardised
from .shared_rows import overlap_of, row_share, whitener
from .subset_search import SubsetSearch

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

    y : (n,). Freedman & Lane 1983, as in Winkler et al. 2014, section "Freedman–Lane": the part
    of y that the controls explain drops out of R² beyond the controls, so that only the
    residuals are permuted and taken clear of the controls again.
    """
    e = residualise(y[:, None], search.controls)[:, 0]
    order = np.argsort(rng.random((n_permutations, len(e))), axis=1)
    values = search.max_r2(np.column_stack([e, e[order].T]))
    return float(values[0]), values[1:]


def permutation(runs: pd.DataFrame, columns: Sequence[str],
                standardisation: Standardisation | None = None, *, null: str = "H0b",
                size: int = 4, n_permutations: int = 999, seed: int = 0,
                rows: Mapping[str, Sequence[str]] | None = None,
                arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> Permutation:
    """Is the best R² over all subsets of `size` indicators more than chance gives?

    null="H0b" (the verdict): R² beyond the source shares. "H0a": R² beyond a constant, losses
    permuted freely. One run a set; runs as in `fit_within`.
    rows : set_id -> row hashes. Sets that share rows have like errors, and permuting those rejects
        too often. With `rows` the runs are whitened first (see `shared_rows`) at the estimated
        share of the rows and at both its bounds; the answer is that of the largest p (Berger &
        Boos 1994). Without them the errors are taken as unrelated.
    """
    if null not in MEANING:
        raise ValueError(f"null {null!r} is none of {list(MEANING)}")
    runs = pick_arms(runs, arms)
    X = standardised(runs, columns, standardisation)
    y = runs[outcome].to_numpy(float)
    controls = share_matrix(runs)[0] if null == "H0b" else np.ones((len(X), 1))
    rng = np.random.default_rng(seed)
    shares, K = (None,), None
    if rows is not None:
        K = overlap_of(runs, rows)
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
