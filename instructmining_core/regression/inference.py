"""How firm a fit stands: for new sources, against seed noise, by bootstrap; intervals of R²."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from .paper_rule import SubsetSearch
from .rule import LEVEL, NEW_SOURCES, RuleFit, interval_table, residualise, slope_map
from .run_table import DESIGNED, RankError, RunsError, Standardizer, within_sources

MIN_SETS = 6  # of a source, for its held-out fit to say anything
TAIL = (1 - LEVEL) / 2
POWER = 0.8


@dataclass(frozen=True)
class Jackknife:
    """table : columns of interval_table and `interval` (what the bounds speak of)
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
    _, shares, sources, X, y = within_sources(runs, columns, standardizer, arms)
    if len(sources) < 3:
        raise RunsError(f"{len(sources)} sources say nothing about new ones: at least 3, "
                        "better 8 or more")
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
    _, shares, sources, X, y = within_sources(runs, columns, standardizer)
    rows, too_few = [], {}
    for s, name in enumerate(sources):
        inside = np.flatnonzero(shares[:, s] == 1)
        kept = np.flatnonzero(shares[:, s] == 0)
        if len(inside) < MIN_SETS or not len(kept):  # no other source to fit without it
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
        half = stats.t.ppf(0.5 + LEVEL / 2, df) * error
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
    half = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * values.sem()
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
    """From sets that were run on several seeds: the pooled sd inside a set_id."""
    repeated = runs.groupby("set_id")["log_loss"].transform("size") > 1
    if not repeated.any():
        raise RunsError("no set was run on more than one seed: add anchors")
    part = runs[repeated]
    gaps = part["log_loss"] - part.groupby("set_id")["log_loss"].transform("mean")
    df = int(len(part) - part["set_id"].nunique())
    total = float((gaps**2).sum())
    low, high = np.sqrt(total / stats.chi2.isf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], df))
    return SeedVariance(np.sqrt(total / df), df, low, high)


def lack_of_fit(fit: RuleFit, seeds: SeedVariance) -> dict[str, float]:
    """F test, one-sided, of the fit's residual variance over the seed variance.

    ratio : residual sd / seed sd, with ratio_low and ratio_high (95 %, from F)
    """
    ratio = float(fit.sigma / seeds.sd)
    low, high = sd_ratio_interval(ratio, fit.df, seeds.df)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "f": ratio**2,
            "df1": fit.df, "df2": seeds.df,
            "p": float(stats.f.sf(ratio**2, fit.df, seeds.df))}


def bootstrap_choice(runs: pd.DataFrame, columns: Sequence[str],
                     standardizer: Standardizer | None = None, *, n: int = 1000,
                     size: int = 4) -> pd.DataFrame:
    """How often the procedure chooses each indicator when the runs are drawn again, by column:
    frequency (share of n draws), sign_positive (of its choices). `.attrs["sets"]` counts choices.
    """
    _, controls, _, X, y = within_sources(runs, columns, standardizer)
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
    """One row a run: fitted, residual, studentised, leverage, cook, and set_id, arm, source."""
    labels = fit.runs[[c for c in ("set_id", "arm", "source") if c in fit.runs]]
    found = fit.ols.get_influence()
    return labels.assign(fitted=fit.ols.fittedvalues, residual=fit.ols.resid,
                         studentised=found.resid_studentized_internal,
                         leverage=found.hat_matrix_diag, cook=found.cooks_distance[0])


def r2_interval(r2: float, terms: int, df: int) -> tuple[float, float]:
    """Bounds of the population R² of a fixed design, by inverting the noncentral F.

    r2 : observed share of what the controls leave over that `terms` regressors explain; df :
    residual degrees of freedom. The bounds are λ/(λ + terms + df) for the noncentralities λ at
    which the observed F is the upper, then the lower tail's quantile (Steiger & Fouladi 1997).
    They speak of these sources, normal errors of one sd, and regressors that were not chosen by
    this R². An F smaller than chance gives in 97.5 % of studies has both bounds at 0.
    """
    if not (0 <= r2 < 1 and df > 0):
        return np.nan, np.nan
    f = (r2 / terms) / ((1 - r2) / df)
    bounds = [_noncentrality(f, terms, df, p) for p in (1 - TAIL, TAIL)]
    low, high = (value / (value + terms + df) for value in bounds)
    return low, high


def r2_of(fit: RuleFit) -> tuple[float, float, float]:
    """R² of a fit beyond its controls, with the bounds of `r2_interval`."""
    r2 = fit.r2_beyond_controls
    return (r2, *r2_interval(r2, len(fit.columns), fit.df))


def r2_detectable(needed: float, terms: int, df: int) -> float:
    """The population R² at which the observed one passes `needed` with a power of 80 %."""
    if not 0 < needed < 1 or df <= 0:
        return np.nan
    f = (needed / terms) / ((1 - needed) / df)
    value = _noncentrality(f, terms, df, 1 - POWER)
    return value / (value + terms + df)


def _noncentrality(f: float, df1: int, df2: int, p: float) -> float:
    """λ with P(F(df1, df2, λ) ≤ f) = p; 0 where even λ = 0 leaves less than p below f.

    scipy's own inverse ends at 10⁴, which an R² of 0.99 passes.
    """
    def excess(value: float) -> float:
        return float(special.ncfdtr(df1, df2, value, f)) - p

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0 and high < 1e7:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high))


def sd_ratio_interval(ratio: float, df1: int, df2: int) -> tuple[float, float]:
    """Bounds of a ratio of two independent standard deviations, from F on df1 and df2."""
    return (float(ratio / np.sqrt(stats.f.isf(TAIL, df1, df2))),
            float(ratio / np.sqrt(stats.f.ppf(TAIL, df1, df2))))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a median by order statistics; NaN where there are too few values for the level."""
    found = np.asarray(values, float)
    test = stats.quantile_test(found[~np.isnan(found)], p=0.5)
    return tuple(map(float, test.confidence_interval(LEVEL)))


def significant(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its floats as text of three significant digits.

    >>> significant(pd.DataFrame({"raw": [0.00001234, -2.0], "n": [3, 4]}))["raw"].tolist()
    ['1.23e-05', '-2']
    """
    out = frame.copy()
    for column in out.select_dtypes("floating"):
        shown = [f"{value:.3g}" for value in out[column]]
        out[column] = ["" if text == "nan" else text for text in shown]
    return out
