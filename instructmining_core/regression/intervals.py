"""Intervals of what is no slope: R², shares of draws, ratios of spreads, medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from .rule import RuleFit


def r2_interval(r2: float, terms: int, df: int, level: float = 0.95) -> tuple[float, float]:
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
    tail = (1 - level) / 2
    bounds = [_noncentrality(f, terms, df, p) for p in (1 - tail, tail)]
    low, high = (value / (value + terms + df) for value in bounds)
    return low, high


def r2_of(fit: RuleFit, level: float = 0.95) -> tuple[float, float, float]:
    """R² of a fit beyond its controls, with the bounds of `r2_interval`."""
    r2 = fit.r2_beyond_controls
    return (r2, *r2_interval(r2, len(fit.columns), fit.ols.df, level))


def r2_detectable(needed: float, terms: int, df: int, power: float = 0.8) -> float:
    """The population R² at which the observed one passes `needed` with this power."""
    if not 0 < needed < 1 or df <= 0:
        return np.nan
    f = (needed / terms) / ((1 - needed) / df)
    value = _noncentrality(f, terms, df, 1 - power)
    return value / (value + terms + df)


def _noncentrality(f: float, df1: int, df2: int, p: float) -> float:
    """λ with P(F(df1, df2, λ) ≤ f) = p; 0 where even λ = 0 leaves less than p below f."""

    def excess(value: float) -> float:
        return float(special.ncfdtr(df1, df2, value, f)) - p

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, _bracket(excess)))


def _bracket(excess: Callable[[float], float]) -> float:
    """The first of 1, 2, 4, ... at which `excess` is below 0."""
    high = 1.0
    while excess(high) > 0 and high < 1e7:
        high *= 2
    return high


def share_interval(count: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, `count` of `n` (Wilson 1927)."""
    if n < 1:
        return np.nan, np.nan
    z = stats.norm.isf((1 - level) / 2)
    share = count / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def sd_ratio_interval(
    ratio: float, df1: int, df2: int, level: float = 0.95
) -> tuple[float, float]:
    """Bounds of a ratio of two independent standard deviations, from F on df1 and df2."""
    tail = (1 - level) / 2
    return (float(ratio / np.sqrt(stats.f.isf(tail, df1, df2))),
            float(ratio / np.sqrt(stats.f.ppf(tail, df1, df2))))


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bounds of a median by order statistics: no assumption but independent draws.

    NaN where there are too few values for the level.
    """
    found = np.sort(np.asarray(values, float)[~np.isnan(np.asarray(values, float))])
    # the k-th smallest and the k-th largest hold the median unless fewer than k lie on one side
    k = int(stats.binom.ppf((1 - level) / 2, len(found), 0.5))
    if k < 1:
        return np.nan, np.nan
    return float(found[k - 1]), float(found[len(found) - k])


def significant(frame: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """The table with its floats as text of `digits` significant digits.

    Rounding to places prints 0.0000 for the slope of a quantity whose unit is small.

    >>> significant(pd.DataFrame({"raw": [0.00001234, -2.0], "n": [3, 4]}))["raw"].tolist()
    ['1.23e-05', '-2']
    """
    out = frame.copy()
    for column in out.select_dtypes("floating"):
        shown = [f"{value:.{digits}g}" for value in out[column]]
        out[column] = ["" if text == "nan" else text for text in shown]
    return out
