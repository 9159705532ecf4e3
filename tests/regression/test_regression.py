import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from bench.studies import COLUMNS, design, synthetic_world
from instructmining import tables
from instructmining_core.config import InstructMiningError
from instructmining_core.finetuning.sets import TrainingSet, designed_sets
from instructmining_core.regression.checks import (
    baseline_comparison,
    baseline_slopes,
    sign_flags,
    transfer_slope,
    univariate,
)
from instructmining_core.regression.paper_rule import NOT_VALID, SubsetSearch, fit_paper
from instructmining_core.regression.rule import (
    LENGTH_LABEL,
    fit_rule,
    hc3,
    mundlak_test,
    ols,
    vif,
)
from instructmining_core.regression.run_table import (
    RankError,
    RunsError,
    Standardizer,
    one_per_set,
    run_table,
)

CERTIFIED = Path(__file__).parent / "certified"
SLOPES = np.array([0.0, 0.03, -0.04, 0.02, 0.0, 0.0, -0.03, 0.0, 0.01])


@pytest.fixture(scope="module")
def longley():
    known = json.loads((CERTIFIED / "longley.json").read_text())
    data = np.array(known["data"], float)
    X = np.hstack([np.ones((16, 1)), data[:, 1:]])
    return known, ols(X, data[:, 0], ["constant", *known["columns"][1:]])


@pytest.fixture(scope="module")
def from_r():
    known = json.loads((CERTIFIED / "r_output.json").read_text())
    i = np.arange(1, 41)
    x = np.column_stack([np.sin(1.7 * i) + 0.02 * i, np.cos(2.3 * i) + 0.5 * np.sin(1.7 * i),
                         np.sin(0.9 * i) ** 3])
    groups = np.eye(3)[i % 3]
    return known, x, groups, np.array(known["y"])


@pytest.fixture(scope="module")
def made():
    world = synthetic_world(12, rows=400, seed=7)
    sets = designed_sets(world, 60, 30, 120, seed=1, columns=COLUMNS)
    return design(sets, world)


@pytest.fixture(scope="module")
def runs(made):
    rng = np.random.default_rng(0)
    alpha = rng.normal(0, 0.1, 12)
    return made.runs(made.shares @ alpha + made.X @ SLOPES + rng.normal(0, 1e-4, len(made.X)))


def test_longley_equals_nist(longley):
    known, fit = longley
    assert fit.params == pytest.approx(known["estimate"], rel=1e-8)
    assert fit.bse == pytest.approx(known["sd"], rel=1e-8)
    assert np.sqrt(fit.scale) == pytest.approx(known["residual_sd"], rel=1e-8)
    assert fit.rsquared == pytest.approx(known["r2"], rel=1e-10)


def test_longley_hc3_vif_and_cook_equal_r(longley, from_r):
    _, fit = longley
    known = from_r[0]
    # R's longley has other units (employed in thousands, two decimals moved): ratios are free
    units = np.array([1000, 1000, 1, 100, 100, 1, 1000])  # y and x units, by coefficient
    assert np.sqrt(np.diag(hc3(fit))) / units == pytest.approx(
        np.array(known["longley_hc3_se"]), rel=1e-6)
    assert vif(fit.model.exog[:, 1:]) == pytest.approx(known["longley_vif"], rel=1e-6)
    cook = fit.get_influence().cooks_distance[0]
    assert cook == pytest.approx(known["longley_cook"], rel=1e-6)


@pytest.mark.parametrize("name", ["groups", "plain"])
def test_equals_r_with_sandwich(from_r, name):
    known, x, groups, y = from_r
    X = np.hstack([groups if name == "groups" else np.ones((40, 1)), x])
    fit, r = ols(X, y, [f"b{j}" for j in range(X.shape[1])]), known[name]
    k = X.shape[1]
    found = fit.get_influence()
    assert fit.params == pytest.approx(r["coef"], rel=1e-8)
    assert fit.bse == pytest.approx(r["se"], rel=1e-8)
    assert hc3(fit) == pytest.approx(np.array(r["hc3"]).reshape(k, k), rel=1e-6)
    assert found.cooks_distance[0] == pytest.approx(r["cook"], rel=1e-6)
    assert found.hat_matrix_diag == pytest.approx(r["leverage"], rel=1e-8)
    assert found.resid_studentized_internal == pytest.approx(r["studentised"], rel=1e-8)
    assert np.sqrt(fit.scale) == pytest.approx(r["residual_sd"], rel=1e-8)


def test_a_run_that_is_fitted_exactly_says_nothing_of_the_noise(from_r):
    _, x, _, y = from_r
    alone = np.zeros((40, 1))
    alone[7] = 1  # a source with one set
    X = np.hstack([np.ones((40, 1)), alone, x])
    found, rest = hc3(ols(X, y, list("abcde"))), np.delete(np.arange(40), 7)
    without = hc3(ols(np.delete(X[rest], 1, axis=1), y[rest], list("acde")))
    kept = [0, 2, 3, 4]
    assert found[np.ix_(kept, kept)] == pytest.approx(without, rel=1e-8)


def test_vif_equals_car(from_r):
    assert vif(from_r[1]) == pytest.approx(from_r[0]["plain_vif"], rel=1e-6)


def test_ols_names_the_column_it_cannot_use():
    x = np.arange(6.0)
    with pytest.raises(RankError, match="'twice'"):
        ols(np.column_stack([np.ones(6), x, 2 * x]), x**2, ["one", "x", "twice"])
    with pytest.raises(InstructMiningError, match=r"\['x'\]"):
        ols(np.column_stack([np.ones(6), np.where(x == 2, np.nan, x)]), x, ["one", "x"])
    with pytest.raises(RankError, match="2 runs"):
        ols(np.ones((2, 3)), np.ones(2), ["a", "b", "c"])


def test_the_rule_finds_the_slopes_with_statsmodels_inference(made, runs):
    fit = fit_rule(runs, COLUMNS)
    assert fit.slopes.to_numpy() == pytest.approx(SLOPES, abs=1e-3)
    theirs = sm.OLS(runs["log_loss"], np.hstack([made.shares, made.X])).fit().get_robustcov_results(
        "HC3", use_t=True)
    table = fit.table()
    assert table["se"].to_numpy() == pytest.approx(theirs.bse[-9:], rel=1e-8)
    assert table["p"].to_numpy() == pytest.approx(theirs.pvalues[-9:], rel=1e-6)
    assert table[["low", "high"]].to_numpy() == pytest.approx(theirs.conf_int()[-9:], rel=1e-6)
    assert table["interval"].unique().tolist() == ["these sources: HC3, t(n-k)"]
    assert fit.r2_beyond_controls > 0.99


def test_length_is_named_for_what_it_may_be(runs):
    assert fit_rule(runs, COLUMNS).table().at["len_out", "label"] == LENGTH_LABEL
    equal = runs.assign(arm="tokens")
    assert fit_rule(equal, COLUMNS, arms=("tokens",)).table().at["len_out", "label"] == "len_out"


def test_raw_units_and_standardised_units_tell_the_same(runs):
    constants = Standardizer(pd.Series(5.0, COLUMNS), pd.Series(2.0, COLUMNS))
    raw = runs.copy()
    raw[list(COLUMNS)] = raw[list(COLUMNS)] * 2 + 5
    one, two = fit_rule(runs, COLUMNS), fit_rule(raw, COLUMNS, constants)
    assert two.slopes.to_numpy() == pytest.approx(one.slopes.to_numpy())
    assert two.table()["raw"].to_numpy() == pytest.approx(one.slopes.to_numpy() / 2)


def test_shares_must_sum_to_one(runs):
    with pytest.raises(RunsError, match="do not sum to one"):
        fit_rule(runs.assign(share_s00=0.5), COLUMNS)
    with pytest.raises(RunsError, match="no run of arm"):
        fit_rule(runs, COLUMNS, arms=("fusion",))


def test_a_study_of_fusion_alone_is_fitted_on_its_fusion_sets(runs):
    alone = runs.assign(arm="fusion")
    assert fit_rule(alone, COLUMNS).slopes.equals(fit_rule(alone, COLUMNS, arms=None).slopes)
    some = runs.assign(arm=["fusion"] * 10 + list(runs["arm"].iloc[10:]))
    assert len(fit_rule(some, COLUMNS).runs) == len(runs) - 10


def test_repeats_stay_out_of_the_fit(runs):
    repeats = runs.iloc[:5].assign(init_seed=1, log_loss=99.0)
    both = pd.concat([repeats, runs.assign(init_seed=0)], ignore_index=True)
    assert len(one_per_set(both)) == len(runs)
    assert fit_rule(both, COLUMNS).slopes.to_numpy() == pytest.approx(
        fit_rule(runs, COLUMNS).slopes.to_numpy())


def test_run_table_joins_ledger_and_means():
    ledger = pd.DataFrame({
        "set_id": ["a", "b", "a"], "status": ["done", "diverged", "done"],
        "shares": [{"x": 0.25, "y": 0.75}, {"x": 1.0}, {"x": 0.25, "y": 0.75}],
        "loss_eval_1": [np.e, np.nan, np.e**2]})
    means = pd.DataFrame({"reward": [1.5, 2.5]}, index=["a", "b"])
    found = run_table(ledger, means, "loss_eval_1")
    assert found["log_loss"].tolist() == pytest.approx([1, 2])
    assert found[["share_x", "share_y", "reward"]].to_numpy().tolist() == [[0.25, 0.75, 1.5]] * 2
    assert found.attrs["left_out"] == 1
    with pytest.raises(RunsError, match="loss_eval_9"):
        run_table(ledger, means, "loss_eval_9")


def test_subset_search_equals_statsmodels_on_every_subset(made):
    y = np.random.default_rng(1).normal(size=len(made.X)) + made.X[:, 2]
    search = SubsetSearch(made.X, np.ones((len(y), 1)), 4, smaller=True)
    assert len(search.subsets) == 9 + 36 + 84 + 126
    r2 = search.r2(y[:, None])[0]
    for g in (0, 40, 100, 250):
        theirs = sm.OLS(y, sm.add_constant(made.X[:, search.members(g)])).fit()
        assert r2[g] == pytest.approx(theirs.rsquared, rel=1e-9)
    choice = search.choose(y[:, None])
    theirs = sm.OLS(y, sm.add_constant(made.X[:, search.members(choice.subset[0])])).fit()
    terms = search.terms[choice.subset[0]]
    assert choice.p[0, :terms] == pytest.approx(theirs.pvalues[1:], rel=1e-6)
    assert choice.beta[0, :terms] == pytest.approx(theirs.params[1:], rel=1e-9)
    assert r2[choice.subset[0]] >= r2.max() - 0.01


def test_paper_procedure_finds_a_strong_rule_and_marks_its_p_values(runs):
    true = 0.5 * runs["reward"] - 0.4 * runs["coherence"] + 0.3 * runs["mtld"]
    found = fit_paper(runs.assign(log_loss=true + 1e-3 * np.sin(np.arange(len(runs)))), COLUMNS)
    assert set(found.fit.columns) == {"reward", "coherence", "mtld"}
    assert set(found.table()["interval"]) == {NOT_VALID}
    assert found.fit.kind == "pooled"


def test_mundlak_tells_equal_slopes_from_unequal(made):
    rng = np.random.default_rng(2)
    columns = list(COLUMNS[:3])
    means = pd.DataFrame(
        [made.parts[:, s].sum(axis=0) / made.shares[:, s].sum() for s in range(12)],
        index=list(made.source_names), columns=list(COLUMNS))[columns]
    B = made.shares @ means.to_numpy()
    W = made.X[:, :3] - B
    noise = rng.normal(0, 0.01, len(B))
    same = mundlak_test(made.runs(W @ [0.1, 0, 0] + B @ [0.1, 0, 0] + noise), columns, means)
    other = mundlak_test(made.runs(W @ [0.1, 0, 0] + B @ [-0.1, 0, 0] + noise), columns, means)
    assert same.p > 0.01 and other.p < 1e-6
    assert other.table.at["len_in", "difference"] == pytest.approx(-0.2, abs=0.03)
    for side, true in (("within", 0.1), ("between", -0.1)):
        low, middle, high = other.table.loc["len_in", [f"{side}_low", side, f"{side}_high"]]
        assert low < middle < high and low < true < high
    with pytest.raises(RunsError, match="add sources"):
        mundlak_test(made.runs(noise), COLUMNS + ("reward", "ppl"), means)


def test_univariate_counts_its_tests(runs):
    table = univariate(runs, COLUMNS)
    alone = fit_rule(runs, ["reward"]).table().loc["reward"]
    assert table.at["reward", "estimate"] == pytest.approx(alone["estimate"])
    ordered = table.sort_values("p")
    by_hand = (ordered["p"] * np.arange(9, 0, -1)).cummax().clip(upper=1)
    assert ordered["p_holm"].to_numpy() == pytest.approx(by_hand.to_numpy())


def test_baselines_that_are_the_whole_story_leave_nothing(runs):
    rng = np.random.default_rng(4)
    vocabulary = runs["reward"] + rng.normal(0, 1, len(runs))
    y = 0.1 * vocabulary + rng.normal(0, 0.01, len(runs))
    told = baseline_comparison(runs.assign(log_loss=y, unigram=vocabulary), COLUMNS, ["unigram"])
    assert told.at["+ unigram", "r2"] > 0.95 > told.at["+ indicators", "r2"]
    slopes = baseline_slopes(told)
    own = fit_rule(runs.assign(log_loss=y), COLUMNS).table()
    assert slopes["without_low"].tolist() == pytest.approx(own["low"].tolist())
    assert (told["r2_low"] < told["r2"]).all() and (told["r2"] < told["r2_high"]).all()
    assert abs(slopes.at["reward", "with"]) < 0.01 < abs(slopes.at["reward", "without"])


def test_sign_flags_mark_coefficients_that_turn(runs):
    turned = runs.assign(log_loss=runs["log_loss"] - 2 * SLOPES[2] * runs["reward"])
    flags = sign_flags(fit_rule(runs, COLUMNS), fit_rule(turned, COLUMNS))
    assert flags.index[flags["contradicts"]].tolist() == ["reward"]
    with pytest.raises(RunsError, match="other columns"):
        sign_flags(fit_rule(runs, COLUMNS), fit_rule(runs, ["reward"]))


def test_transfer_slope_of_a_rule_that_carries_whole_and_half(runs):
    score = pd.Series(runs[list(COLUMNS)].to_numpy() @ SLOPES, runs.index)
    assert transfer_slope(score, runs).slopes["score"] == pytest.approx(1, abs=0.01)
    half = runs.assign(log_loss=0.5 * runs["log_loss"])
    assert transfer_slope(score, half).slopes["score"] == pytest.approx(0.5, abs=0.01)


def test_unigram_loss_by_hand(monkeypatch):
    monkeypatch.setattr(tables, "SMOOTHING", 1)
    sets = [TrainingSet("one", "fusion", ("a", "b"), {"s": 1.0})]
    found = tables.unigram_losses(sets, {"a": "The cat", "b": "the dog"}, ["the end", "cat"])
    # vocabulary the, cat, dog, end: four words seen, one added to each of four
    the, cat, end = (np.log(c / 8) for c in (3, 2, 1))
    assert found["one"] == pytest.approx(-((the + end) / 2 + cat) / 2)
    with pytest.raises(ValueError, match="no response text"):
        tables.unigram_losses(sets, {"a": "x"}, ["y"])
