"""Does the rule hold for a source it has not seen? Fit without a source, test inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from .ols import RankError, slope_map
from .runs import DESIGNED, RunsError, Standardisation, pick_arms, share_matrix, standardised
from .within import NEW_SOURCES, interval_table


@dataclass(frozen=True)
class Jackknife:
    """Delete-one-source jackknife of the within-source slopes.

    table : columns of interval_table and `interval` (what the bounds speak of)
    covariance : (p, p), by column; replicates : index the deleted source, one slope a column
    """

    table: pd.DataFrame
    covariance: pd.DataFrame
    replicates: pd.DataFrame


def deletion_maps(shares: np.ndarray, X: np.ndarray) -> np.ndarray:
    """A, (S, p, n): A[s] @ y are the slopes without every run that holds source s."""
    maps = np.zeros((shares.shape[1], X.shape[1], len(X)))
    for s in range(shares.shape[1]):
        kept = np.flatnonzero(shares[:, s] == 0)
        if len(kept) <= X.shape[1]:
            raise RunsError(f"without the source in column {s} only {len(kept)} runs are left: "
                            "sets that hold every source (fusion) can't be jackknifed")
        maps[s][:, kept] = slope_map(X[kept], shares[kept])
    return maps


def jackknife_sources(runs: pd.DataFrame, columns: Sequence[str],
                      standardisation: Standardisation | None = None, *, level: float = 0.95,
                      arms: Sequence[str] | None = DESIGNED,
                      outcome: str = "log_loss") -> Jackknife:
    """Intervals for new sources: (S−1)/S · Σ_s (β₋ₛ − β)², t on S − 1 degrees of freedom.

    A mixed set is deleted with each of its sources, which widens the interval a little.
    Errors: RunsError where a deletion leaves too little to fit.
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    if len(sources) < 3:
        raise RunsError(f"{len(sources)} sources say nothing about new ones: at least 3, "
                        "better 8 or more")
    X = standardised(runs, columns, standardisation)
    y = runs[outcome].to_numpy(float)
    beta = slope_map(X, shares) @ y
    replicates = deletion_maps(shares, X) @ y
    gaps = replicates - beta
    covariance = (len(sources) - 1) / len(sources) * gaps.T @ gaps
    table = interval_table(pd.Series(beta, list(columns)), np.sqrt(np.diag(covariance)),
                           len(sources) - 1, level)
    table["interval"] = NEW_SOURCES
    names = list(columns)
    return Jackknife(table, pd.DataFrame(covariance, names, names),
                     pd.DataFrame(replicates, list(sources), names))


def held_out(runs: pd.DataFrame, columns: Sequence[str],
             standardisation: Standardisation | None = None, *, min_sets: int = 6,
             arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> pd.DataFrame:
    """R² and calibration slope inside each source, by a rule that was fitted without it.

    One row a source with at least `min_sets` within-source sets: n_sets, r2, slope, slope_low,
    slope_high. r2 and slope are about the source's own mean, since its constant is unknown: r2 =
    1 − Σ(dy − dŷ)²/Σdy², which is negative where the rule does harm; slope of dy on dŷ, 1 where
    effects are of the right size, with t(n_sets − 2) bounds for this source's sets. r2 has bounds
    only over sources: `summary(frame)`. Sources with too few sets are in `.attrs["too_few"]`.
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    X = standardised(runs, columns, standardisation)
    y = runs[outcome].to_numpy(float)
    rows, too_few = [], {}
    for s, name in enumerate(sources):
        inside = np.flatnonzero(shares[:, s] == 1)
        kept = np.flatnonzero(shares[:, s] == 0)
        if len(inside) < min_sets:
            too_few[name] = len(inside)
            continue
        try:
            beta = slope_map(X[kept], shares[kept]) @ y[kept]
        except RankError as error:
            raise RunsError(f"without source {name!r}: {error}") from error
        guess = X[inside] @ beta
        guess, true = guess - guess.mean(), y[inside] - y[inside].mean()
        slope = (true @ guess) / (guess @ guess)
        df = max(len(inside) - 2, 0)
        error = (np.sqrt(((true - slope * guess) ** 2).sum() / df / (guess @ guess))
                 if df else np.nan)
        half = student.ppf(0.975, df) * error if df else np.nan
        rows.append({"source": name, "n_sets": len(inside),
                     "r2": 1 - ((true - guess) ** 2).sum() / (true**2).sum(),
                     "slope": slope, "slope_low": slope - half, "slope_high": slope + half})
    frame = pd.DataFrame(rows, columns=["source", "n_sets", "r2", "slope", "slope_low",
                                        "slope_high"])
    frame.attrs["too_few"] = too_few
    return frame


def summary(held: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean over sources of r2 and slope, with t(S−1) bounds: mean, low, high, lowest, sources."""
    rows = {}
    for column in ("r2", "slope"):
        values = held[column].dropna().to_numpy(float)
        n = len(values)
        half = (student.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
                if n > 1 else np.nan)
        mean = values.mean() if n else np.nan
        rows[column] = {"mean": mean, "low": mean - half, "high": mean + half,
                        "lowest": values.min() if n else np.nan, "sources": n}
    return pd.DataFrame(rows).T
