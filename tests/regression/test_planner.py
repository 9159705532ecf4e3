from collections import Counter

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import t

from bench.studies import COLUMNS, design, outcomes, synthetic_world
from instructmining_core.finetuning.sets import designed_sets, fusion_sets
from instructmining_core.regression.inference import SeedVariance
from instructmining_core.regression.planner import (
    d_optimal,
    half_widths,
    plan_runs,
    replan,
    sigma_band,
)
from instructmining_core.regression.rule import fit_rule
from instructmining_core.regression.run_table import RankError

PILOT = SeedVariance(0.01, 8, 0.0068, 0.019)


@pytest.fixture(scope="module")
def world():
    return synthetic_world(10, rows=300, seed=11)


@pytest.fixture(scope="module")
def made(world):
    return design(designed_sets(world, 90, 30, 100, seed=1, columns=COLUMNS), world)


def test_half_widths_equal_a_fit_with_that_noise():
    rng = np.random.default_rng(0)
    M, y = rng.normal(size=(30, 4)), rng.normal(size=30)
    fit = sm.OLS(y, M).fit()
    theirs = np.diff(fit.conf_int(), axis=1)[:, 0] / 2
    assert half_widths(M, np.sqrt(fit.scale)) == pytest.approx(theirs)
    assert np.isinf(half_widths(M[:3], 1.0)).all()
    assert np.isinf(half_widths(np.hstack([M, M[:, :1]]), 1.0)).all()


def test_sigma_band_holds_a_study_in_80_percent():
    rng = np.random.default_rng(1)
    pilot = np.sqrt(rng.chisquare(8, 4000) / 8)
    study = np.sqrt(rng.chisquare(50, 4000) / 50)
    low, high = sigma_band(1.0, 8, 50)
    assert np.mean((pilot * low <= study) & (study <= pilot * high)) == pytest.approx(0.8, abs=0.03)


def test_plan_shrinks_with_runs_and_counts_what_is_needed(made):
    plan = plan_runs(made.shares, made.X, COLUMNS, PILOT, [30, 60, 90, 120])
    wide = plan.table.pivot(index="runs", columns="coefficient", values="half_width")
    assert plan.sources == 10 and wide.index.tolist() == [30, 60, 90, 120]
    assert (wide.loc[120] < wide.loc[60]).all()
    assert (plan.table["low"].dropna() < plan.table["half_width"].loc[
        plan.table["low"].dropna().index]).all()
    target = float(wide.loc[90, "reward"]) * 1.0001
    assert plan.runs_needed(target, safe=False)["reward"] == 90
    assert plan.runs_needed(1e-9).isna().all()


def test_plan_is_what_the_study_then_has(made):
    drawn = outcomes(made, 1, np.random.default_rng(3))
    fit = fit_rule(made.runs(drawn.Y[:, 0]), COLUMNS)
    last = plan_runs(made.shares, made.X, COLUMNS, replan(PILOT, fit), [len(made.X)]).table
    p = len(COLUMNS)
    assert last["half_width"].to_numpy() == pytest.approx(t.ppf(0.975, fit.df) * fit.ols.bse[-p:])


def test_replan_keeps_the_pilot_until_the_fit_knows_more(made):
    drawn = outcomes(made, 1, np.random.default_rng(3))
    runs = made.runs(drawn.Y[:, 0])
    fit = fit_rule(runs, COLUMNS)
    found = replan(PILOT, fit)
    assert found.df == fit.df and found.low < found.sd < found.high
    assert replan(SeedVariance(0.01, 500, 0.009, 0.011), fit).df == 500


def test_d_optimal_beats_random_and_keeps_a_fifth_random(world):
    sets = designed_sets(world, 700, 300, 100, seed=2, columns=COLUMNS)
    made = design(sets, world)
    M = np.hstack([made.shares, made.X])
    chosen = d_optimal(M, 80, seed=1)
    assert len(set(chosen.tolist())) == 80
    rng = np.random.default_rng(1)
    undesigned = set(rng.choice(1000, 16, replace=False).tolist())
    assert undesigned <= set(chosen.tolist())
    ours = np.median(half_widths(M[chosen], 1.0)[-9:])
    random = [np.median(half_widths(M[np.random.default_rng(s).choice(1000, 80, replace=False)],
                                    1.0)[-9:]) for s in range(20)]
    assert np.median(random) / ours > 1.1
    with pytest.raises(RankError):
        d_optimal(M, 10)


def test_d_optimal_keeps_each_groups_number(world):
    sets = designed_sets(world, 300, 100, 100, seed=2, columns=COLUMNS)
    made = design(sets, world)
    M = np.hstack([made.shares, made.X])
    groups = [one.source for one in sets]
    quota = {name: 5 for name in dict.fromkeys(groups) if name} | {"": 10}
    n = sum(quota.values())
    chosen = d_optimal(M, n, seed=3, groups=groups, quota=quota)
    assert Counter(groups[i] for i in chosen) == quota and len(set(chosen.tolist())) == n
    loose = np.linalg.slogdet(M[chosen].T @ M[chosen])[1]
    rng = np.random.default_rng(0)
    places = {g: [i for i, h in enumerate(groups) if h == g] for g in quota}
    for _ in range(20):
        drawn = np.concatenate([rng.choice(places[g], k, replace=False) for g, k in quota.items()])
        assert np.linalg.slogdet(M[drawn].T @ M[drawn])[1] < loose
    with pytest.raises(RankError, match="too few candidates"):
        d_optimal(M, n, groups=groups, quota={"s00": n})


def test_tilting_narrows_the_slopes_more_than_choosing_does(world, made):
    fused = design(fusion_sets(world, 120, 100, 1), world)
    tilted, mixed = (np.median(half_widths(np.hstack([d.shares, d.X]), 1.0)[-9:])
                     for d in (made, fused))
    assert mixed / tilted > 2.5
