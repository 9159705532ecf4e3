import itertools

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import chi2
from scipy.stats import f as fisher

from bench.studies import COLUMNS, design, hc3_studies, jackknife_studies, outcomes, synthetic_world
from instructmining_core.finetuning.sets import designed_sets, fusion_sets
from instructmining_core.regression.inference import (
    SeedVariance,
    bootstrap_choice,
    effective_dimensions,
    held_out,
    influence_table,
    jackknife_sources,
    lack_of_fit,
    over_sources,
    seed_variance,
)
from instructmining_core.regression.paper_rule import SubsetSearch
from instructmining_core.regression.permutation import freedman_lane, permutation
from instructmining_core.regression.rule import fit_rule, residualise, slope_map
from instructmining_core.regression.run_table import RankError, RunsError

SLOPES = np.array([0.0, 0.03, -0.04, 0.02, 0.0, 0.0, -0.03, 0.0, 0.01])


@pytest.fixture(scope="module")
def made():
    world = synthetic_world(12, rows=400, seed=7)
    sets = designed_sets(world, 72, 30, 120, seed=1, columns=COLUMNS)
    return design(sets, world)


@pytest.fixture(scope="module")
def runs(made):
    rng = np.random.default_rng(0)
    alpha = rng.normal(0, 0.1, 12)
    y = made.shares @ alpha + made.X @ SLOPES + rng.normal(0, 0.005, len(made.X))
    return made.runs(y)


@pytest.fixture(scope="module")
def nothing(made):
    rng = np.random.default_rng(3)
    return made.runs(made.shares @ rng.normal(0, 0.1, 12) + rng.normal(0, 0.01, len(made.X)))


def test_slope_map_is_the_regression(made, runs):
    y = runs["log_loss"].to_numpy()
    theirs = sm.OLS(y, np.hstack([made.shares, made.X])).fit()
    assert slope_map(made.X, made.shares) @ y == pytest.approx(theirs.params[-9:], rel=1e-8)
    with pytest.raises(RankError):
        slope_map(made.shares[:, :2], made.shares)


def test_jackknife_equals_refits_one_by_one(made, runs):
    found = jackknife_sources(runs, COLUMNS)
    full = fit_rule(runs, COLUMNS).slopes
    refits = pd.DataFrame({s: fit_rule(runs[runs[f"share_{s}"] == 0], COLUMNS).slopes
                           for s in made.source_names}).T
    assert found.replicates.to_numpy() == pytest.approx(refits.to_numpy())
    se = np.sqrt(11 / 12 * ((refits - full) ** 2).sum())
    assert found.table["se"].to_numpy() == pytest.approx(se.to_numpy())
    half = found.table["high"] - found.table["estimate"]
    assert (half / found.table["se"]).to_numpy() == pytest.approx(np.full(9, 2.20099), rel=1e-5)
    assert found.table["interval"].unique().tolist() == [
        "new sources: delete-one-source jackknife, t(S-1)"]


def test_fusion_cannot_be_jackknifed_and_says_so():
    world = synthetic_world(8, rows=300, seed=1)
    fused = design(fusion_sets(world, 40, 150, 1), world)
    runs = fused.runs(np.random.default_rng(0).normal(size=40))
    with pytest.raises(RunsError, match="fusion"):
        jackknife_sources(runs, COLUMNS, arms=("fusion",))


def test_many_outcomes_at_once_equal_one_at_a_time(made):
    drawn = outcomes(made, 3, np.random.default_rng(5))
    beta, half = hc3_studies(made.X, made.shares, drawn.Y)
    wide, spread = jackknife_studies(made, drawn.Y)
    for b in range(3):
        runs = made.runs(drawn.Y[:, b])
        table = fit_rule(runs, COLUMNS).table()
        assert beta[:, b] == pytest.approx(table["estimate"].to_numpy())
        assert half[:, b] == pytest.approx((table["high"] - table["estimate"]).to_numpy())
        other = jackknife_sources(runs, COLUMNS).table
        assert spread[:, b] == pytest.approx((other["high"] - other["estimate"]).to_numpy())
        assert wide[:, b] == pytest.approx(other["estimate"].to_numpy())


def test_freedman_lane_equals_a_plain_loop_over_subsets_and_permutations(made):
    y = np.random.default_rng(6).normal(size=len(made.X))
    search = SubsetSearch(made.X, made.shares, 2)
    seen, null = freedman_lane(search, y, 5, np.random.default_rng(9))
    order = np.argsort(np.random.default_rng(9).random((5, len(y))), axis=1)
    e = residualise(y[:, None], made.shares)[:, 0]
    fitted = y - e

    def best(outcome):
        reduced = sm.OLS(outcome, made.shares).fit().ssr
        pairs = itertools.combinations(range(9), 2)
        return max(1 - sm.OLS(outcome, np.hstack([made.shares, made.X[:, p]])).fit().ssr / reduced
                   for p in map(list, pairs))

    assert seen == pytest.approx(best(y))
    assert null == pytest.approx([best(fitted + e[o]) for o in order])


def test_h0b_sees_indicators_and_not_sources_while_h0a_sees_sources(runs, nothing):
    assert permutation(runs, COLUMNS, seed=1).p <= 0.002
    assert permutation(nothing, COLUMNS, seed=1).p > 0.05
    free = permutation(nothing, COLUMNS, null="H0a", seed=1)
    assert free.p <= 0.05 and "composition" in free.meaning
    with pytest.raises(ValueError, match="H7"):
        permutation(runs, COLUMNS, null="H7")


def test_shuffled_indicators_end_in_no_evidence(runs):
    rng = np.random.default_rng(8)
    shuffled = runs.copy()
    shuffled[list(COLUMNS)] = runs[list(COLUMNS)].to_numpy()[rng.permutation(len(runs))]
    assert permutation(shuffled, COLUMNS).p > 0.05


def test_held_out_is_near_one_for_a_true_rule_and_below_nothing_for_none(made, runs, nothing):
    quiet = made.X @ SLOPES + np.random.default_rng(1).normal(0, 0.001, len(made.X))
    true = held_out(made.runs(quiet), COLUMNS)
    assert len(true) == 12 and set(true["n_sets"]) == {6}
    means = over_sources(true)
    assert means.at["r2", "lowest"] > 0.8
    assert means.at["slope", "low"] < 1 < means.at["slope", "high"]
    assert 0.4 < over_sources(held_out(runs, COLUMNS)).at["r2", "mean"] < means.at["r2", "mean"]
    assert over_sources(held_out(nothing, COLUMNS)).at["r2", "mean"] < 0
    few = held_out(runs.drop(runs[runs["source"] == "s03"].index[:2]), COLUMNS)
    assert few.attrs["too_few"] == {"s03": 4} and len(few) == 11


def test_held_out_does_not_look_at_the_source_it_tests(runs):
    spoiled = runs.copy()
    own = spoiled["share_s05"] > 0
    spoiled.loc[own, "log_loss"] = -spoiled.loc[own, "log_loss"]
    a, b = (held_out(r, COLUMNS).set_index("source") for r in (runs, spoiled))
    assert b.at["s05", "slope"] == pytest.approx(-a.at["s05", "slope"])
    rest = runs[runs["share_s05"] == 0]
    inside = runs[runs["share_s05"] == 1]
    guess = inside[list(COLUMNS)] @ fit_rule(rest, COLUMNS).slopes
    plain = sm.OLS(inside["log_loss"], sm.add_constant(guess)).fit()
    assert a.loc["s05", ["slope_low", "slope_high"]].tolist() == pytest.approx(
        plain.conf_int().iloc[1].tolist())


def test_over_sources_by_hand():
    held = pd.DataFrame({"r2": [0.0, 1.0], "slope": [1.0, 1.0]})
    found = over_sources(held).loc["r2"]
    assert found["mean"] == 0.5 and found["lowest"] == 0
    assert found["high"] == pytest.approx(0.5 + 12.7062 * np.sqrt(0.5) / np.sqrt(2), rel=1e-4)


def test_seed_variance_by_hand():
    runs = pd.DataFrame({"set_id": ["a", "a", "a", "b", "b", "b", "c"],
                         "log_loss": [1.0, 2.0, 3.0, 5.0, 5.0, 8.0, 100.0]})
    found = seed_variance(runs)
    assert found.df == 4 and found.sd == pytest.approx(np.sqrt((2 + 6) / 4))
    assert found.low == pytest.approx(np.sqrt(8 / chi2.ppf(0.975, 4)))
    assert found.high == pytest.approx(np.sqrt(8 / chi2.ppf(0.025, 4)))
    with pytest.raises(RunsError, match="anchors"):
        seed_variance(runs.drop_duplicates("set_id"))


def test_pilot_band_is_the_plans(monkeypatch):
    pilot = pd.DataFrame({"set_id": np.repeat(list("abcd"), 3),
                          "log_loss": np.random.default_rng(0).normal(size=12)})
    monkeypatch.setattr("instructmining_core.regression.inference.LEVEL", 0.8)
    found = seed_variance(pilot)
    assert found.df == 8
    assert found.sd / found.high == pytest.approx(0.66, abs=0.005)
    assert found.sd / found.low == pytest.approx(1.29, abs=0.005)


def test_lack_of_fit_sees_a_curve(made, runs):
    seeds = SeedVariance(0.005, 16, 0.004, 0.008)
    plain = lack_of_fit(fit_rule(runs, COLUMNS), seeds)
    assert plain["p"] > 0.01
    # the lower bound is 1 where the two-sided test is on its edge
    edge = plain["ratio"] / plain["ratio_low"]
    assert fisher.sf(edge**2, plain["df1"], plain["df2"]) == pytest.approx(0.025)
    bent = runs.assign(log_loss=runs["log_loss"] + 0.05 * runs["reward"] ** 2)
    assert lack_of_fit(fit_rule(bent, COLUMNS), seeds)["p"] < 0.001


def test_bootstrap_chooses_what_matters(runs):
    found = bootstrap_choice(runs, COLUMNS, n=40)
    assert found.at["reward", "frequency"] > 0.9 and found.at["reward", "sign_positive"] == 0
    assert found["frequency"].sum() <= 4 and sum(found.attrs["sets"].values()) == 40
    assert found.at["knn_6", "frequency"] < 0.5


def test_effective_dimensions_of_known_shapes():
    circle = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    found = effective_dimensions(circle)
    assert found["participation"] == pytest.approx(2) and found["for_99"] == 2
    line = np.outer([1.0, 2, 4], [1, 1])
    assert effective_dimensions(line)["participation"] == pytest.approx(1)
    later = pd.DataFrame(circle, index=range(7, 7 + len(circle)))  # some rows of a larger table
    pd.testing.assert_series_equal(effective_dimensions(later), found)


def test_influence_table_is_statsmodels_influence(made, runs):
    page = influence_table(fit_rule(runs, COLUMNS))
    theirs = sm.OLS(runs["log_loss"], np.hstack([made.shares, made.X])).fit().get_influence()
    assert page["leverage"].to_numpy() == pytest.approx(theirs.hat_matrix_diag)
    assert page["cook"].to_numpy() == pytest.approx(theirs.cooks_distance[0], rel=1e-8)
    assert list(page.columns[:3]) == ["set_id", "arm", "source"]
