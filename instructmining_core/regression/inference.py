"""How firm a fit stands: seed variance, choice under the bootstrap, collinearity, residuals.

Does the rule hold for a source it has not seen? RuleFit without a source, test inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2
from scipy.stats import f as fisher
from scipy.stats import t as student

from .intervals import sd_ratio_interval
from .ols import RankError, residualise, slope_map
from .paper_rule import NEAR_BEST, SubsetSearch
from .rule import NEW_SOURCES, RuleFit, interval_table
from .run_table import DESIGNED, RunsError, Standardizer, pick_arms, share_matrix, standardised


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
                      standardisation: Standardizer | None = None, *, level: float = 0.95,
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
             standardisation: Standardizer | None = None, *, min_sets: int = 6,
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


@dataclass(frozen=True)
class SeedVariance:
    """sd of the outcome between seeds of one set, with χ² bounds on df degrees of freedom."""

    sd: float
    df: int
    low: float
    high: float


def seed_variance(runs: pd.DataFrame, *, level: float = 0.95,
                  outcome: str = "log_loss") -> SeedVariance:
    """From sets that were run on several seeds: the pooled sd inside a set_id.

    8 anchors on 3 seeds give 16 degrees of freedom, a pilot of 4 sets on 3 seeds gives 8.
    """
    groups = runs.groupby("set_id")[outcome]
    repeated = groups.transform("size") > 1
    if not repeated.any():
        raise RunsError("no set was run on more than one seed: add anchors (subsets.anchors)")
    part = runs[repeated]
    gaps = part[outcome] - part.groupby("set_id")[outcome].transform("mean")
    df = int(len(part) - part["set_id"].nunique())
    total = float((gaps**2).sum())
    tail = (1 - level) / 2
    return SeedVariance(np.sqrt(total / df), df, np.sqrt(total / chi2.ppf(1 - tail, df)),
                        np.sqrt(total / chi2.ppf(tail, df)))


def lack_of_fit(fit: RuleFit, seeds: SeedVariance) -> dict[str, float]:
    """F test of the fit's residual variance over the seed variance: is a line enough?

    ratio : residual sd / seed sd, with ratio_low and ratio_high (95 %, from F); f, df1, df2,
    p : one-sided.
    """
    ratio = float(fit.ols.sigma / seeds.sd)
    low, high = sd_ratio_interval(ratio, fit.ols.df, seeds.df)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "f": ratio**2,
            "df1": fit.ols.df, "df2": seeds.df,
            "p": float(fisher.sf(ratio**2, fit.ols.df, seeds.df))}


def bootstrap_choice(runs: pd.DataFrame, columns: Sequence[str],
                     standardisation: Standardizer | None = None, *, n: int = 1000,
                     size: int = 4, seed: int = 0, shares: bool = True,
                     near: float = NEAR_BEST, arms: Sequence[str] | None = DESIGNED,
                     outcome: str = "log_loss") -> pd.DataFrame:
    """How often the procedure chooses each indicator when the runs are drawn again.

    By column: frequency (share of n draws), sign_positive (share of its choices with a slope
    above 0). `.attrs["sets"]` counts whole choices. shares=False: the paper's procedure.
    """
    runs = pick_arms(runs, arms)
    X = standardised(runs, columns, standardisation)
    y = runs[outcome].to_numpy(float)
    controls = share_matrix(runs)[0] if shares else np.ones((len(X), 1))
    rng = np.random.default_rng(seed)
    chosen, positive, sets = np.zeros(X.shape[1]), np.zeros(X.shape[1]), {}
    for _ in range(n):
        draw = rng.integers(len(X), size=len(X))
        search = SubsetSearch(X[draw], controls[draw][:, controls[draw].any(axis=0)], size,
                              smaller=True)
        choice = search.choose(y[draw][:, None], near)
        members = search.members(choice.subset[0])
        chosen[members] += 1
        positive[members] += choice.beta[0, : len(members)] > 0
        name = ", ".join(columns[i] for i in members)
        sets[name] = sets.get(name, 0) + 1
    frame = pd.DataFrame({"frequency": chosen / n,
                          "sign_positive": positive / np.maximum(chosen, 1)}, list(columns))
    frame.loc[chosen == 0, "sign_positive"] = np.nan
    frame.attrs["sets"] = dict(sorted(sets.items(), key=lambda item: -item[1]))
    return frame


def effective_dimensions(X: np.ndarray, controls: np.ndarray | None = None) -> pd.Series:
    """How many directions the set means really vary in, beside `controls` (default: a constant).

    participation : (Σλ)²/Σλ² of the covariance's eigenvalues; for_99 : components that hold
    99 % of the variance; first_three : their share; condition : sqrt(largest/smallest λ).
    """
    X = np.asarray(X, float)
    left = residualise(X, np.ones((len(X), 1)) if controls is None else controls)
    values = np.linalg.svd(left, compute_uv=False) ** 2
    shares = np.cumsum(values) / values.sum()
    return pd.Series({
        "participation": values.sum() ** 2 / (values**2).sum(),
        "for_99": int(np.searchsorted(shares, 0.99) + 1),
        "first_three": shares[min(2, len(shares) - 1)],
        "condition": np.sqrt(values[0] / values[-1]) if values[-1] > 0 else np.inf,
    })


def residual_page(fit: RuleFit) -> pd.DataFrame:
    """One row a run: fitted, residual, studentised, leverage, cook, and set_id, arm, source.

    A page to look at; no run is dropped for what it shows.
    """
    labels = fit.runs[[c for c in ("set_id", "arm", "source") if c in fit.runs]]
    return labels.assign(fitted=fit.ols.fitted, residual=fit.ols.residuals,
                         studentised=fit.ols.studentised(), leverage=fit.ols.leverage,
                         cook=fit.ols.cook())
