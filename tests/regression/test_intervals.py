"""Intervals of R², ratios and medians: against quantiles and coverage."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from scipy import stats

from instructmining_core.regression import inference as intervals


def test_r2_bounds_put_the_observed_f_at_both_tails():
    r2, terms, df = 0.4, 3, 30
    f = (r2 / terms) / ((1 - r2) / df)
    low, high = intervals.r2_interval(r2, terms, df)
    assert low < r2 < high
    for bound, tail in ((low, 0.975), (high, 0.025)):
        noncentral = bound / (1 - bound) * (terms + df)
        assert stats.ncf.cdf(f, terms, df, noncentral) == pytest.approx(tail, abs=1e-6)
    assert intervals.r2_interval(0.01, terms, df)[0] == 0
    assert np.isnan(intervals.r2_interval(0.4, 3, 0)).all()


def test_r2_interval_covers_in_fixed_designs():
    rng = np.random.default_rng(3)
    n, terms, studies = 40, 3, 400
    X = np.linalg.qr(rng.normal(size=(n, terms)))[0]
    signal = X @ rng.normal(size=terms)
    signal *= np.sqrt(n * 0.8) / np.linalg.norm(signal)
    true = 0.8 / 1.8  # signal variance over all variance, per run
    y = signal[:, None] + rng.normal(size=(n, studies))
    fitted = X @ (X.T @ y)
    r2 = (fitted**2).sum(axis=0) / (y**2).sum(axis=0)
    bounds = [intervals.r2_interval(r, terms, n - terms) for r in r2]
    held = np.mean([low <= true <= high for low, high in bounds])
    assert held == pytest.approx(0.95, abs=0.04)  # ± 3.7 standard errors


def test_r2_detectable_passes_the_threshold_four_times_in_five():
    seen = intervals.r2_detectable(0.25, 4, 50)
    f = (0.25 / 4) / (0.75 / 50)
    assert stats.ncf.sf(f, 4, 50, seen / (1 - seen) * 54) == pytest.approx(0.8, abs=1e-6)


def test_sd_ratio_interval_covers():
    rng = np.random.default_rng(1)
    ratio = rng.normal(size=(2000, 9)).std(axis=1, ddof=1) / rng.normal(size=(2000, 13)).std(
        axis=1, ddof=1)
    held = [low <= 1 <= high for low, high in (intervals.sd_ratio_interval(r, 8, 12)
                                               for r in ratio)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.018)


def test_median_interval_by_hand():
    # n = 10: the second smallest and largest, 1 − 2·P(Bin(10, ½) ≤ 1) = 97.9 %
    assert intervals.median_interval(range(1, 11)) == (2, 9)
    assert intervals.median_interval([3, 1, 2, 4, 6, np.nan, 5]) == (1, 6)  # n = 6: 96.9 %
    assert np.isnan(intervals.median_interval([1, 2, 3])).all()


def test_significant_keeps_digits():
    assert doctest.testmod(intervals).failed == 0
