"""What the paper's design and procedure find where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from instructmining_core.regression.inference import effective_dimensions
from instructmining_core.regression.ols import vif
from instructmining_core.regression.paper_rule import SubsetSearch

from .worlds import COLUMNS, NOISE_SD, SOURCE_SD

PAPER_R2 = 0.522  # of the paper's v3 rule, quoted second-hand


def _fusion_means(n_sources: int, n_runs: int, size: int, between: float,
                  rng: np.random.Generator, means: np.ndarray | None = None):
    """Shares (n, S), set means (n, 9) and source means (S, 9) of a fusion study, normal rows."""
    p = len(COLUMNS)
    if means is None:
        loadings = rng.normal(size=(3, p)) * 0.6
        means = rng.normal(size=(n_sources, 3)) @ loadings + rng.normal(size=(n_sources, p))
        means *= between / np.sqrt((loadings**2).sum(axis=0) + 1)
    r = rng.uniform(size=(n_runs, n_sources))
    shares = r / r.sum(axis=1, keepdims=True)
    X = shares @ means + rng.normal(size=(n_runs, p)) / np.sqrt(size)
    return shares, X, means


def null_r2(n_sources: int, n_studies: int, seed: int, *, n_runs: int = 129, size: int = 1000,
            terms: int = 4, between: float = 1.0, source_sd: float = SOURCE_SD,
            noise_sd: float = NOISE_SD) -> pd.DataFrame:
    """The paper's design and procedure where no indicator has any effect, only the sources differ.

    One row a study: study, n_sources, r2 (of the chosen `terms`), all_significant (every chosen
    p < 0.05), repeat_rank_correlation (of the rankings that this study and its repeat, new draws
    from the same sources, give to 50 new sources), first_three (share of the variance of the set
    means in three components), vif (median). Losses are log losses.
    """
    rng = np.random.default_rng(seed)
    one = np.ones((n_runs, 1))
    rows = []
    for study in range(n_studies):
        effects = rng.normal(0, source_sd, n_sources)
        strangers = rng.normal(0, between, (50, len(COLUMNS)))
        means, rankings, first = None, [], None
        for _ in range(2):
            shares, X, means = _fusion_means(n_sources, n_runs, size, between, rng, means)
            y = shares @ effects + rng.normal(0, noise_sd, n_runs)
            search = SubsetSearch(X, one, terms, smaller=True)
            choice = search.choose(y[:, None])
            members = search.members(choice.subset[0])
            rankings.append(strangers[:, members] @ choice.beta[0, : len(members)])
            first = first or (choice, X)
        choice, X = first
        rows.append({
            "study": study, "n_sources": n_sources, "r2": float(choice.r2[0]),
            "all_significant": bool(np.nanmax(choice.p[0]) < 0.05),
            "repeat_rank_correlation": float(spearmanr(*rankings)[0]),
            "first_three": effective_dimensions(X)["first_three"],
            "vif": float(np.median(vif(X))),
        })
    return pd.DataFrame(rows)


def pure_noise(n_studies: int, seed: int, *, n_runs: int = 129, terms: int = 4) -> pd.DataFrame:
    """No effect of anything, nine correlated indicators: r2 and any_significant by study."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(3, len(COLUMNS)))
    X = rng.normal(size=(n_runs, 3)) @ loadings + rng.normal(size=(n_runs, len(COLUMNS)))
    choice = SubsetSearch(X, np.ones((n_runs, 1)), terms).choose(
        rng.normal(size=(n_runs, n_studies)))
    return pd.DataFrame({"r2": choice.r2, "any_significant": (choice.p < 0.05).any(axis=1)})
