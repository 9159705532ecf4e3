"""The gate: known contrasts, verdicts, and its error rates over simulated studies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

from bench.studies import holm_rows, simulate_crossed, simulate_gate
from instructmining_core.config import InstructMiningError
from instructmining_core.selection import beat_random, contrasts
from instructmining_core.selection.beat_random import answers_table, beats_length, both_ends

RNG = np.random.default_rng(7)


def runs_of(groups: dict[tuple[str, str, int], list[float]]) -> pd.DataFrame:
    rows = [
        {"pool": pool, "method": method, "size": size, "seed": seed,
         "loss_eval_1": loss + 0.1, "loss_eval_2": loss}
        for (pool, method, size), losses in groups.items()
        for seed, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows)


def around(mean: float, n: int = 10, sd: float = 0.01) -> list[float]:
    noise = RNG.normal(size=n)
    return list(mean + sd * (noise - noise.mean()) / noise.std(ddof=1))


@pytest.fixture
def study() -> pd.DataFrame:
    return runs_of({
        ("new", "selected", 100): around(0.95), ("new", "random", 100): around(1.00),
        ("new", "longest", 100): around(0.97, 5), ("new", "selected", 200): around(0.99, 5),
        ("new", "random", 200): around(1.00, 5), ("new", "full", 900): around(0.98, 3),
        ("old", "selected", 100): around(1.0, 10, 0.002),
        ("old", "random", 100): around(1.001, 10, 0.002),
        ("old", "longest", 100): around(1.0, 5),
    })


def test_welch_equals_scipy():
    a, b = RNG.normal(1.0, 0.1, 7), RNG.normal(1.1, 0.3, 12)
    ours = contrasts.contrast(a, b)
    theirs = stats.ttest_ind(np.log(a), np.log(b), equal_var=False)
    interval = theirs.confidence_interval()
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.df == pytest.approx(theirs.df)
    assert np.log1p([ours.low, ours.high]) == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize("sd", [0.004, 0.02])
def test_two_one_sided_tests_agree_with_the_90_percent_interval(sd):
    a, b = np.array(around(0.997, 8, sd)), np.array(around(1.0, 12, sd))
    interval = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.9)
    inside = np.log(0.99) < interval.low and interval.high < np.log(1.01)
    assert (contrasts.contrast(a, b).p_margin < 0.05) == inside == (sd < 0.01)


def test_detectable_difference_equals_statsmodels_power():
    sd, n = 0.01, 10
    d = TTestIndPower().solve_power(nobs1=n, alpha=0.05, power=0.8)
    ours = contrasts.detectable_difference(sd * np.sqrt(2 / n), 2 * n - 2)
    assert np.log1p(ours) == pytest.approx(d * sd, rel=1e-3)
    assert np.isnan(contrasts.detectable_difference(0.0, 5))


def test_detectable_difference_of_the_plan():
    """The plan says 2.4, 1.5 and 1 %; the exact noncentral t says 2.6, 1.6 and 1.1 %."""
    seen = []
    for n in (5, 10, 20):
        seed, draw = 1e-4 / n, 2e-4 / n
        df = (seed + draw) ** 2 / ((seed**2 + draw**2) / (n - 1))
        seen.append(100 * contrasts.detectable_difference(np.sqrt(seed + draw), df))
    assert seen == pytest.approx([2.55, 1.65, 1.12], abs=0.02)


def test_verdicts():
    assert contrasts.verdict(-0.02, 0.01, 0.9) == "better"
    assert contrasts.verdict(0.02, 0.01, 0.9) == "worse"
    assert contrasts.verdict(0.001, 0.6, 0.01) == "within ±1 %"
    assert contrasts.verdict(0.01, 0.6, 0.2) == "undecided"
    assert contrasts.verdict(-0.05, float("nan"), float("nan")) == "undecided"


def test_a_real_but_tiny_difference_says_both():
    table = beat_random.compare_with_random(runs_of({
        ("p", "selected", 9): around(0.996, 10, 0.002), ("p", "random", 9): around(1.0, 10, 0.002),
    }))  # fmt: skip
    row = table.iloc[0]
    assert -0.01 < row["low"] < row["high"] < 0
    assert row["p_margin"] < 0.05 and row["verdict"] == "better, and within ±1 %"
    assert contrasts.verdict(0.004, 0.01, 0.01) == "worse, and within ±1 %"


def test_no_variation_is_undecided_not_certain():
    result = contrasts.contrast([1.0, 1.0], [1.1, 1.1])
    assert result.difference == pytest.approx(-1 / 11)
    assert np.isnan(result.p) and np.isnan(result.low)


def test_compare_plans_primary_and_secondary_contrasts(study):
    table = beat_random.compare_with_random(study, primary_size=100)
    primary = table[table["role"] == "primary"].set_index("pool")
    assert primary.loc["new", "verdict"] == "better"
    assert primary.loc["new", "difference"] == pytest.approx(-0.05, abs=0.001)
    assert primary.loc["old", "verdict"] == "within ±1 %"
    assert primary.loc["new", "p_holm"] == 2 * primary.loc["new", "p"], "Holm over two pools"
    assert primary.loc["old", "p_holm"] == max(primary["p_holm"].min(), primary.loc["old", "p"])
    secondary = table[table["role"] == "secondary"]
    assert secondary["p_holm"].isna().all()
    found = set(zip(secondary["pool"], secondary["method"], secondary["versus"],
                    secondary["size"], secondary["size_versus"], strict=True))
    assert found == {
        ("new", "longest", "random", 100, 100), ("new", "selected", "longest", 100, 100),
        ("new", "selected", "random", 200, 200), ("new", "full", "random", 900, 100),
        ("new", "selected", "full", 100, 900), ("old", "longest", "random", 100, 100),
        ("old", "selected", "longest", 100, 100),
    }


def test_a_diverged_run_is_left_out_and_counted(study):
    study.loc[study.index[0], "loss_eval_2"] = np.nan
    first = beat_random.compare_with_random(study, primary_size=100).iloc[0]
    assert (first["n"], first["lost"]) == (9, 1)


def test_a_pool_without_a_p_value_still_counts_in_holm(study):
    one = study[(study["pool"] != "old") | (study["method"] != "selected") | (study["seed"] == 0)]
    primary = beat_random.compare_with_random(one, primary_size=100).iloc[:2].set_index("pool")
    assert np.isnan(primary.loc["old", "p_holm"])
    assert primary.loc["old", "verdict"] == "undecided"
    assert primary.loc["new", "p_holm"] == 2 * primary.loc["new", "p"]


def test_compare_refuses_what_it_cannot_answer(study):
    with pytest.raises(InstructMiningError, match="primary size None"):
        beat_random.compare_with_random(study)
    with pytest.raises(InstructMiningError, match="lack the columns"):
        beat_random.compare_with_random(study.drop(columns="size"), primary_size=100)
    with pytest.raises(InstructMiningError, match="no 'random' runs"):
        beat_random.compare_with_random(study[study["method"] != "random"], primary_size=100)
    study.loc[0, "loss_eval_2"] = -1.0
    with pytest.raises(InstructMiningError, match="positive"):
        beat_random.compare_with_random(study, primary_size=100)


def paired(difference, seed_sd, pools=("p", "q"), n=5):
    """Runs whose seeds move all pools and both methods alike, but for a small seed effect.

    The relative difference is that of the mean over seeds; a seed_sd of 0 makes equal runs equal.
    """
    common, own = RNG.normal(0, 0.05, n), RNG.normal(0, seed_sd, n)
    own -= own.mean()
    return runs_of({
        (pool, method, 100): list(np.exp(0.1 * i + common + (method == "selected") * (
            np.log1p(difference) + own)))
        for i, pool in enumerate(pools)
        for method in ("selected", "longest")
    })  # fmt: skip


def test_beats_length_is_a_paired_t_over_seeds_of_the_pools_mean():
    runs = paired(-0.02, 0.004)
    found = beats_length(runs)
    logs = np.log(runs.pivot(index="seed", columns=["method", "pool"], values="loss_eval_2"))
    means = (logs["selected"].mean(axis=1), logs["longest"].mean(axis=1))
    theirs = stats.ttest_rel(*means)
    interval = theirs.confidence_interval()
    assert (found.pools, found.seeds, found.answer) == (2, 5, "yes")
    assert found.p == pytest.approx(theirs.pvalue)
    assert np.log1p([found.low, found.high]) == pytest.approx([interval.low, interval.high])
    se = stats.sem(means[0] - means[1])
    assert found.detectable == pytest.approx(contrasts.detectable_difference(se, 4))


def test_more_pools_of_the_same_seeds_are_no_more_evidence():
    """Pools that share all of a seed's noise: two of them are known no better than one."""
    two = paired(-0.02, 0.01)
    one = beats_length(two[two["pool"] == "p"])
    assert beats_length(two).p == pytest.approx(one.p)
    table = beats_length(two).table
    assert len(table) == 2, "and the table still shows each pool"


def test_beats_length_answers():
    swap = {"method": {"selected": "longest", "longest": "selected"}}
    assert beats_length(paired(-0.03, 0.004).replace(swap)).answer == "no, length alone is better"
    assert beats_length(paired(0.0, 0.001)).answer == "no, they are equal within ±1 %"
    assert beats_length(paired(-0.004, 0.001)).answer == "yes, but within ±1 %"
    assert beats_length(paired(0.01, 0.05)).answer == "undecided"
    single = beats_length(paired(-0.02, 0.0, n=1))
    assert single.answer == "undecided" and np.isnan([single.low, single.detectable]).all()
    assert single.difference == pytest.approx(-0.02), "one seed gives a number, and no interval"


def test_a_rule_that_chooses_the_longest_rows_is_equal_to_length():
    runs = paired(0.0, 0.0)
    same = beats_length(runs)
    assert same.answer == "no, they are equal within ±1 %" and (same.low, same.high) == (0, 0)


def test_beats_length_takes_only_the_seeds_that_both_have():
    runs = paired(-0.02, 0.004)
    fewer = runs[~((runs["method"] == "longest") & (runs["seed"] > 2))]
    both = runs[runs["seed"] < 3]
    assert beats_length(fewer).low == pytest.approx(beats_length(both).low)
    assert beats_length(fewer).seeds == 3


def test_beats_length_carries_the_prompt_interval():
    runs = paired(-0.02, 0.004)
    matrices = {
        (pool, method, 100): RNG.normal(1.0, 0.1, (5, 30))
        for pool in "pq" for method in ("selected", "longest")
    }  # fmt: skip
    found = beats_length(runs, per_example=matrices)
    means = [
        (matrices["p", m, 100] + matrices["q", m, 100]) / 2 for m in ("selected", "longest")
    ]
    expected = contrasts.crossed_interval(*means)
    assert (found.low_prompts, found.high_prompts) == pytest.approx(expected)
    del matrices["q", "longest", 100]
    assert np.isnan(beats_length(runs, per_example=matrices).low_prompts)


def budgets():
    return runs_of({
        ("p", "selected", 100): around(0.95), ("p", "random", 100): around(1.0),
        ("p", "longest", 100): around(0.97), ("p", "shortest", 100): around(0.96),
        ("p", "random_tokens", 100): around(0.951), ("p", "longest_tokens", 100): around(0.99),
        ("p", "shortest_tokens", 100): around(0.96),
    })  # fmt: skip


def test_equal_rows_and_equal_tokens_are_kept_apart():
    matrices = {("p", method, 100): RNG.normal(1.0, 0.1, (10, 20))
                for method in ("selected", "random", "random_tokens")}  # fmt: skip
    table = beat_random.compare_budgets(budgets(), matrices, loss="loss_eval_2")
    primary = table[table["role"] == "primary"].set_index("budget")
    assert primary["verdict"].str.split(",").str[0].to_dict() == {
        "equal rows": "better", "equal tokens": "within ±1 %",
    }  # fmt: skip
    assert not table["method"].str.endswith("_tokens").any()
    rows, tokens = table[table["budget"] == "equal rows"], table[table["budget"] != "equal rows"]
    pairs = {("selected", "random"), ("longest", "random"), ("selected", "longest"),
             ("shortest", "random"), ("selected", "shortest")}  # fmt: skip
    for part in (rows, tokens):
        assert set(zip(part["method"], part["versus"], strict=True)) == pairs
    for budget, name in (("equal rows", "random"), ("equal tokens", "random_tokens")):
        expected = contrasts.crossed_interval(matrices["p", "selected", 100],
                                              matrices["p", name, 100])  # fmt: skip
        assert primary.loc[budget, ["low_prompts", "high_prompts"]].tolist() == pytest.approx(
            list(expected)
        )
    plain = budgets().query("method in ('selected', 'random')")
    assert set(beat_random.compare_budgets(plain)["budget"]) == {"equal rows"}


def test_both_ends_answers_at_both_budgets():
    found = both_ends(budgets())
    assert {k: list(v) for k, v in found.items()} == {
        "equal rows": ["longest", "shortest"], "equal tokens": ["longest", "shortest"],
    }  # fmt: skip
    table = answers_table(found)
    assert table.loc[("equal tokens", "longest"), "difference"] == pytest.approx(-0.04, abs=0.01)
    assert table.loc[("equal rows", "longest"), "difference"] == pytest.approx(-0.02, abs=0.01)


def test_crossed_interval_widens_when_prompts_differ():
    rng = np.random.default_rng(0)
    level = 2 + rng.normal(0, 0.3, 60)
    same = [level + rng.normal(0, 0.01, (8, 1)) + rng.normal(0, 0.001, (8, 60)) for _ in "ab"]
    taste = rng.normal(0, 0.2, 60)
    low, high = contrasts.crossed_interval(*same)
    low_taste, high_taste = contrasts.crossed_interval(same[0] + taste, same[1])
    plain = contrasts.contrast(same[0].mean(1), same[1].mean(1))
    assert high - low == pytest.approx(plain.high - plain.low, rel=0.15)
    assert high_taste - low_taste > 3 * (high - low)
    with pytest.raises(InstructMiningError, match="same prompts"):
        contrasts.crossed_interval(same[0], same[1][:, :5])


def test_compare_carries_the_prompt_interval(study):
    matrices = {
        ("new", m, 100): RNG.normal(1.0, 0.1, (10, 20)) for m in ("selected", "random")
    }
    table = beat_random.compare_with_random(study, primary_size=100, per_example=matrices)
    assert np.isfinite(table.iloc[0][["low_prompts", "high_prompts"]].astype(float)).all()
    assert table.iloc[1:][["low_prompts", "high_prompts"]].isna().all(axis=None)


def test_selection_table_has_the_paper_shape(study):
    study = study.assign(rule=-0.1, tokens_trained=range(len(study)))
    table = beat_random.selection_table(study)
    assert table["tokens_trained"].iloc[0] == 4.5, "tokens are shown beside the losses"
    assert len(table) == 9
    row = table.iloc[0]
    values = study.loc[:9, "loss_eval_2"]
    assert row["loss_eval_2_half"] == pytest.approx(
        stats.t.isf(0.025, 9) * stats.sem(values)
    )
    assert row["rule"] == pytest.approx(-0.1)


def test_acceptance_of_the_gate_quick():
    null = simulate_gate(4000, 1)
    assert null["better"] <= 0.035 and null["worse"] <= 0.035
    assert null["covered"] == pytest.approx(0.95, abs=0.012)
    assert simulate_gate(4000, 2, pools=3)["any_better"] <= 0.035
    assert simulate_gate(4000, 3, effect=-0.016)["better"] >= 0.75


def test_simulated_holm_is_holm():
    p = RNG.uniform(size=(5, 4))
    theirs = [multipletests(row, method="holm")[1] for row in p]
    assert holm_rows(p) == pytest.approx(np.array(theirs))


def test_prompt_interval_covers_where_runs_alone_do_not():
    cover = simulate_crossed(400, 4)
    assert cover["crossed"] >= 0.92
    assert cover["runs_only"] < 0.85


def test_the_prompt_interval_stays_finite_with_two_runs():
    rng = np.random.default_rng(2)
    level = 2 + rng.normal(0, 0.3, 40)
    sides = [level + np.array([[0.0], [1e-4]]) + rng.normal(0, 0.05, (2, 40)) for _ in "ab"]
    low, high = contrasts.crossed_interval(*sides)
    assert -0.2 < low < high < 0.2
