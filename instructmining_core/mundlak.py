"""Slopes between sources against slopes within: the Mundlak split and its test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import f as fisher

from .ols import ols
from .runs import (
    RunsError,
    Standardisation,
    pick_arms,
    share_matrix,
    standardised,
)
from .within import THESE_SOURCES, Fit, interval_table


@dataclass(frozen=True)
class Mundlak:
    """log L = β0 + W β_W + B β_B, B = Σ_s w_s μ_s, W = X̄ − B (Mundlak 1978).

    table : by column: within, within_low, within_high, between, between_low, between_high,
        difference, se, t, p, low, high (of the difference); all bounds HC3, these sources
    f, df1, df2, p : Wald test of β_B = β_W for all columns together, HC3, these sources
    """

    table: pd.DataFrame
    f: float
    df1: int
    df2: int
    p: float
    between: Fit


def mundlak(runs: pd.DataFrame, columns: Sequence[str], source_means: pd.DataFrame,
            standardisation: Standardisation | None = None, *,
            arms: Sequence[str] | None = None, level: float = 0.95,
            outcome: str = "log_loss") -> Mundlak:
    """Split the set means in what their sources' means give and what the tilt gives.

    source_means : index source, the pool's means of each column, raw units (standardised units
    where `standardisation` is None). Needs more sources than columns + 1, since B has only S − 1
    dimensions: otherwise a RunsError that says to name fewer columns or add sources.
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    if len(sources) <= len(columns) + 1:
        raise RunsError(f"{len(sources)} sources span {len(sources) - 1} dimensions, too few for "
                        f"{len(columns)} slopes between sources: name at most "
                        f"{max(len(sources) - 2, 0)} columns, or add sources (more runs "
                        "do not help)")
    missing = sorted(set(sources) - set(source_means.index))
    if missing:
        raise RunsError(f"source_means has no row for {missing}")
    X = standardised(runs, columns, standardisation)
    means = source_means.loc[list(sources)]
    B = shares @ standardised(means, columns, standardisation)
    p = len(columns)
    names = ["constant", *(f"within_{c}" for c in columns), *(f"between_{c}" for c in columns)]
    fit = ols(np.hstack([np.ones((len(X), 1)), X - B, B]), runs[outcome].to_numpy(float), names)
    contrast = np.hstack([np.zeros((p, 1)), -np.eye(p), np.eye(p)])
    cov = contrast @ fit.cov_hc3() @ contrast.T
    difference = pd.Series(contrast @ fit.beta, list(columns))
    table = interval_table(difference, np.sqrt(np.diag(cov)), fit.df, level)
    table = table.rename(columns={"estimate": "difference"})
    errors = np.sqrt(np.diag(fit.cov_hc3()))
    sides = [("within", slice(1, p + 1)), ("between", slice(p + 1, None))]
    for place, (name, part) in enumerate(sides):
        own = interval_table(pd.Series(fit.beta[part], list(columns)), errors[part], fit.df, level)
        for i, column in enumerate(("estimate", "low", "high")):
            label = name if column == "estimate" else f"{name}_{column}"
            table.insert(3 * place + i, label, own[column])
    table["interval"] = THESE_SOURCES
    f = float(difference @ np.linalg.solve(cov, difference) / p)
    between = Fit("between", tuple(columns), (), fit,
                  standardisation or Standardisation.identity(columns), runs)
    return Mundlak(table, f, p, fit.df, float(fisher.sf(f, p, fit.df)), between)
