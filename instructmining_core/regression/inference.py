"""How firm a fit stands: for sources it has not seen, against seed noise, under the bootstrap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2
from scipy.stats import f as fisher
from scipy.stats import t as student

from .intervals import sd_ratio_interval
from .paper_rule import SubsetSearch
from .rule import LEVEL, NEW_SOURCES, RuleFit, interval_table, residualise, slope_map
from .run_table import (
    DESIGNED,
    RankError,
    RunsError,
    Standardizer,
    pick_arms,
    share_matrix,
    standardised,
)

MIN_SETS = 6  # of a source, for its held-out fit to say anything


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
                      standardizer: Standardizer | None = None, *,
                      arms: Sequence[str] | None = DESIGNED) -> Jackknife:
    """Intervals for new sources: (S−1)/S · Σ_s (β₋ₛ − β)², t on S − 1 degrees of freedom.

    A mixed set is deleted with each of its sources, which widens the interval a little.
    Errors: RunsError where a deletion leaves too little to fit.
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    if len(sources) < 3:
        raise RunsError(f"{len(sources)} sources say nothing about new ones: at least 3, "
                        "better 8 or more")
    X = standardised(runs, columns, standardizer)
    y = runs["log_loss"].to_numpy(float)
    beta = slope_map(X, shares) @ y
    replicates = deletion_maps(shares, X) @ y
    gaps = replicates - beta
    covariance = (len(sources) - 1) / len(sources) * gaps.T @ gaps
    table = interval_table(pd.Series(beta, list(columns)), np.sqrt(np.diag(covariance)),
                           len(sources) - 1)
    table["interval"] = NEW_SOURCES
    names = list(columns)
    return Jackknife(table, pd.DataFrame(covariance, names, names),
                     pd.DataFrame(replicates, list(sources), names))


def held_out(runs: pd.DataFrame, columns: Sequence[str],
             standardizer: Standardizer | None = None) -> pd.DataFrame:
    """R² and calibration slope inside each source, by a rule that was fitted without it.

    One row a source with at least MIN_SETS within-source sets: n_sets, r2, slope, slope_low,
    slope_high. r2 and slope are about the source's own mean, since its constant is unknown: r2 =
    1 − Σ(dy − dŷ)²/Σdy², which is negative where the rule does harm; slope of dy on dŷ, 1 where
    effects are of the right size, with t(n_sets − 2) bounds for this source's sets. r2 has bounds
    only over sources: `over_sources(frame)`. Sources with too few sets are in `.attrs["too_few"]`.
    """
    runs = pick_arms(runs, DESIGNED)
    shares, sources = share_matrix(runs)
    X = standardised(runs, columns, standardizer)
    y = runs["log_loss"].to_numpy(float)
    rows, too_few = [], {}
    for s, name in enumerate(sources):
        inside = np.flatnonzero(shares[:, s] == 1)
        kept = np.flatnonzero(shares[:, s] == 0)
        if len(inside) < MIN_SETS:
            too_few[name] = len(inside)
            continue
        try:
            beta = slope_map(X[kept], shares[kept]) @ y[kept]
        except RankError as error:
            raise RunsError(f"without source {name!r}: {error}") from error
        guess = X[inside] @ beta
        guess, true = guess - guess.mean(), y[inside] - y[inside].mean()
        slope = (true @ guess) / (guess @ guess)
        df = len(inside) - 2
        error = np.sqrt(((true - slope * guess) ** 2).sum() / df / (guess @ guess))
        half = student.ppf(0.5 + LEVEL / 2, df) * error
        rows.append({"source": name, "n_sets": len(inside),
                     "r2": 1 - ((true - guess) ** 2).sum() / (true**2).sum(),
                     "slope": slope, "slope_low": slope - half, "slope_high": slope + half})
    frame = pd.DataFrame(rows, columns=["source", "n_sets", "r2", "slope", "slope_low",
                                        "slope_high"])
    frame.attrs["too_few"] = too_few
    return frame


def over_sources(held: pd.DataFrame) -> pd.DataFrame:
    """r2 and slope of `held_out` over sources: mean, low, high by t(S−1), lowest, sources."""
    values = held[["r2", "slope"]].astype(float)
    n, mean = values.count(), values.mean()
    half = student.ppf(0.5 + LEVEL / 2, n - 1) * values.sem()
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half,
                         "lowest": values.min(), "sources": n})


@dataclass(frozen=True)
class SeedVariance:
    """sd of the outcome between seeds of one set, with χ² bounds on df degrees of freedom."""

    sd: float
    df: int
    low: float
    high: float


def seed_variance(runs: pd.DataFrame) -> SeedVariance:
    """From sets that were run on several seeds: the pooled sd inside a set_id.

    8 anchors on 3 seeds give 16 degrees of freedom, a pilot of 4 sets on 3 seeds gives 8.
    """
    repeated = runs.groupby("set_id")["log_loss"].transform("size") > 1
    if not repeated.any():
        raise RunsError("no set was run on more than one seed: add anchors")
    part = runs[repeated]
    gaps = part["log_loss"] - part.groupby("set_id")["log_loss"].transform("mean")
    df = int(len(part) - part["set_id"].nunique())
    total = float((gaps**2).sum())
    low, high = np.sqrt(total / chi2.isf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], df))
    return SeedVariance(np.sqrt(total / df), df, low, high)


def lack_of_fit(fit: RuleFit, seeds: SeedVariance) -> dict[str, float]:
    """F test of the fit's residual variance over the seed variance: is a line enough?

    ratio : residual sd / seed sd, with ratio_low and ratio_high (95 %, from F); f, df1, df2,
    p : one-sided.
    """
    ratio = float(fit.sigma / seeds.sd)
    low, high = sd_ratio_interval(ratio, fit.df, seeds.df)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "f": ratio**2,
            "df1": fit.df, "df2": seeds.df,
            "p": float(fisher.sf(ratio**2, fit.df, seeds.df))}


def bootstrap_choice(runs: pd.DataFrame, columns: Sequence[str],
                     standardizer: Standardizer | None = None, *, n: int = 1000,
                     size: int = 4) -> pd.DataFrame:
    """How often the procedure chooses each indicator when the runs are drawn again.

    By column: frequency (share of n draws), sign_positive (share of its choices with a slope
    above 0). `.attrs["sets"]` counts whole choices.
    """
    runs = pick_arms(runs, DESIGNED)
    X = standardised(runs, columns, standardizer)
    y = runs["log_loss"].to_numpy(float)
    controls = share_matrix(runs)[0]
    rng = np.random.default_rng(0)
    chosen, positive, sets = np.zeros(X.shape[1]), np.zeros(X.shape[1]), Counter()
    for _ in range(n):
        draw = rng.integers(len(X), size=len(X))
        search = SubsetSearch(X[draw], controls[draw][:, controls[draw].any(axis=0)], size,
                              smaller=True)
        choice = search.choose(y[draw][:, None])
        members = search.members(choice.subset[0])
        chosen[members] += 1
        positive[members] += choice.beta[0, : len(members)] > 0
        sets[", ".join(columns[i] for i in members)] += 1
    frame = pd.DataFrame({"frequency": chosen / n,
                          "sign_positive": positive / np.maximum(chosen, 1)}, list(columns))
    frame.loc[chosen == 0, "sign_positive"] = np.nan
    frame.attrs["sets"] = dict(sets.most_common())
    return frame


def effective_dimensions(X: np.ndarray, controls: np.ndarray | None = None) -> pd.Series:
    """How many directions the set means really vary in, beside `controls` (default: a constant).

    participation : (Σλ)²/Σλ² of the covariance's eigenvalues; for_99 : components that hold
    99 % of the variance; first_three : their share; condition : sqrt(largest/smallest λ).
    """
    X = np.asarray(X, float)  # a frame would be matched by its index below
    left = residualise(X, np.ones((len(X), 1)) if controls is None else controls)
    values = np.linalg.svd(left, compute_uv=False) ** 2
    shares = np.cumsum(values) / values.sum()
    return pd.Series({
        "participation": values.sum() ** 2 / (values**2).sum(),
        "for_99": int(np.searchsorted(shares, 0.99) + 1),
        "first_three": shares[min(2, len(shares) - 1)],
        "condition": np.sqrt(values[0] / values[-1]) if values[-1] > 0 else np.inf,
    })


def influence_table(fit: RuleFit) -> pd.DataFrame:
    """One row a run: fitted, residual, studentised, leverage, cook, and set_id, arm, source.

    To look at; no run is dropped for what it shows.
    """
    labels = fit.runs[[c for c in ("set_id", "arm", "source") if c in fit.runs]]
    found = fit.ols.get_influence()
    return labels.assign(fitted=fit.ols.fittedvalues, residual=fit.ols.resid,
                         studentised=found.resid_studentized_internal,
                         leverage=found.hat_matrix_diag, cook=found.cooks_distance[0])
