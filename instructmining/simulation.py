"""Simulated studies of the paper's design, to see what its procedure finds where nothing is.

The designs and the inference of our own are simulated by `bench.acceptance`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from instructmining_core.config import COLUMNS
from instructmining_core.regression.inference import effective_dimensions
from instructmining_core.regression.paper_rule import SubsetSearch
from instructmining_core.regression.rule import vif

from .paper import RUNS, SET_SIZE

TERMS = 4  # of the paper's rule
BETWEEN = 1.0  # sd of the source means over the sd inside a source
NOISE_SD = 0.01  # between seeds, in log loss
SOURCE_SD = 0.04  # of a source's own effect on log loss


def null_r2(n_sources: int, n_studies: int, seed: int) -> pd.DataFrame:
    """The paper's design and procedure where no indicator has any effect, only the sources differ.

    One row a study: study, n_sources, r2 (of the chosen terms), all_significant (every chosen
    p < 0.05), repeat_rank_correlation (of the rankings that this study and its repeat, new draws
    from the same sources, give to 50 new sources), first_three (share of the variance of the set
    means in three components), vif (median). Losses are log losses.
    """
    rng = np.random.default_rng(seed)
    one = np.ones((RUNS, 1))
    rows = []
    for study in range(n_studies):
        effects = rng.normal(0, SOURCE_SD, n_sources)
        strangers = rng.normal(0, BETWEEN, (50, len(COLUMNS)))
        means, rankings, first = _source_means(n_sources, rng), [], None
        for _ in range(2):
            shares, X = _fusion_means(means, rng)
            y = shares @ effects + rng.normal(0, NOISE_SD, RUNS)
            search = SubsetSearch(X, one, TERMS, smaller=True)
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


def _source_means(n_sources: int, rng: np.random.Generator) -> np.ndarray:
    """Means of the sources, (S, 9), correlated by three common factors."""
    p = len(COLUMNS)
    loadings = rng.normal(size=(3, p)) * 0.6
    means = rng.normal(size=(n_sources, 3)) @ loadings + rng.normal(size=(n_sources, p))
    return means * BETWEEN / np.sqrt((loadings**2).sum(axis=0) + 1)


def _fusion_means(means: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shares (n, S) and set means (n, 9) of the paper's design, its rows normal."""
    r = rng.uniform(size=(RUNS, len(means)))
    shares = r / r.sum(axis=1, keepdims=True)
    return shares, shares @ means + rng.normal(size=(RUNS, len(COLUMNS))) / np.sqrt(SET_SIZE)
