"""Intervals of what is no slope: R², ratios of spreads, medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from .rule import LEVEL, RuleFit

TAIL = (1 - LEVEL) / 2
POWER = 0.8


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


def sd_ratio_interval(ratio: float, df1: int, df2: int) -> tuple[float, float]:
    """Bounds of a ratio of two independent standard deviations, from F on df1 and df2."""
    return (float(ratio / np.sqrt(stats.f.isf(TAIL, df1, df2))),
            float(ratio / np.sqrt(stats.f.ppf(TAIL, df1, df2))))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a median by order statistics: no assumption but independent draws.

    NaN where there are too few values for the level.
    """
    found = np.asarray(values, float)
    test = stats.quantile_test(found[~np.isnan(found)], p=0.5)
    return tuple(map(float, test.confidence_interval(LEVEL)))


def significant(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its floats as text of three significant digits.

    Rounding to places prints 0.0000 for the slope of a quantity whose unit is small.

    >>> significant(pd.DataFrame({"raw": [0.00001234, -2.0], "n": [3, 4]}))["raw"].tolist()
    ['1.23e-05', '-2']
    """
    out = frame.copy()
    for column in out.select_dtypes("floating"):
        shown = [f"{value:.3g}" for value in out[column]]
        out[column] = ["" if text == "nan" else text for text in shown]
    return out
