"""BlendSearch over one size, and the size curve's test, on functions whose shape is known."""

from __future__ import annotations

import logging
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from instructmining_core.config import InstructMiningError
from instructmining_core.selection import size as size_curve
from instructmining_core.selection.size import (
    blendsearch,
    random_search,
    search_report,
    simulated_searches,
    size_curve_power,
    size_curve_test,
    size_means,
)

LOSS = "loss_eval_1"


def bowl(size: int) -> float:
    return 1 + 0.05 * (math.log(size) - math.log(2500)) ** 2


def curve(truth, draws=5, sd=0.01, seed=0, method="selected", sizes=None) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    sizes = sizes or [128 * 2**i for i in range(len(truth))]
    return pd.DataFrame([
        {"pool": "p", "method": method, "size": size, "seed": draw,
         "loss_eval_1": math.exp(level + rng.normal(0, sd))}
        for size, level in zip(sizes, truth, strict=True) for draw in range(draws)
    ])


def test_search_spans_the_range_first_and_comes_near_the_minimum():
    trials = blendsearch(bowl, 512, 10_000, 25, seed=1)
    assert list(trials["trial"]) == list(range(1, 26)) and set(trials["search"]) == {"BlendSearch"}
    first = np.geomspace(512, 10_000, 5).round()
    assert list(trials["size"].iloc[:5]) == list(first)
    assert trials["size"].between(512, 10_000).all()
    best = trials["best_size"].iloc[-1]
    assert abs(math.log(best / 2500)) < 0.15
    assert trials["best_loss"].iloc[-1] == pytest.approx(bowl(best))
    assert (trials["cost"].diff().dropna() == trials["size"].iloc[1:]).all()


@pytest.mark.parametrize(("trials", "spanned"), [(2, 2), (3, 2), (6, 3), (10, 5)])
def test_a_small_budget_sees_both_ends_and_is_used_up(trials, spanned):
    """A falling curve: a search from the smallest size up once stopped at half of the range."""
    for seed in range(5):
        table = blendsearch(lambda n: 2 - 0.1 * math.log(n), 32, 256, trials, seed)
        assert len(table) == trials
        assert list(table["size"].iloc[:spanned]) == list(np.geomspace(32, 256, spanned).round())
        assert table["best_size"].iloc[-1] == 256


def test_same_seed_same_path_and_another_seed_another_path():
    first, again, other = (
        blendsearch(bowl, 100, 5000, 10, seed=s)["size"].tolist() for s in (3, 3, 4)
    )
    assert first == again
    assert first[:5] == other[:5] and first != other


def test_a_stopped_search_goes_on_where_it_was():
    whole = blendsearch(bowl, 100, 5000, 10, seed=3)
    trained: dict[int, float] = {}  # what the ledger remembers

    def dies(size: int) -> float:
        if len(trained) == 4:
            raise KeyboardInterrupt
        return trained.setdefault(size, bowl(size))

    with pytest.raises(KeyboardInterrupt):
        blendsearch(dies, 100, 5000, 10, seed=3)
    before = list(trained)
    resumed = blendsearch(lambda size: trained.setdefault(size, bowl(size)), 100, 5000, 10, seed=3)
    pd.testing.assert_frame_equal(whole, resumed)
    assert before == resumed["size"].tolist()[:4]


def test_a_small_range_ends_when_it_is_used_up():
    trials = blendsearch(bowl, 10, 13, 20, seed=0)
    assert sorted(trials["size"]) == [10, 11, 12, 13]


def test_random_search_takes_distinct_log_uniform_sizes_up_to_its_budget():
    for seed in range(20):
        trials = random_search(bowl, 100, 5000, 20_000, seed)
        assert trials["size"].between(100, 5000).all() and trials["size"].is_unique
        assert trials["cost"].iloc[-1] >= 20_000 > trials["cost"].iloc[:-1].max()
        assert trials["best_loss"].iloc[-1] == trials["loss"].min()
    first = [random_search(bowl, 1, 10_000, 1, seed)["size"].iloc[0] for seed in range(400)]
    half = math.log(10_000) / 2  # a uniform mean of 400: within four standard errors
    assert np.log(first).mean() == pytest.approx(half, abs=4 * 2 * half / math.sqrt(12 * 400))
    assert sorted(random_search(bowl, 3, 5, 999, 0)["size"]) == [3, 4, 5]


def test_the_report_sees_the_winner_anew_and_says_how_much_was_flattered():
    runs = curve([0.0, -0.1], sizes=[100, 200]).assign(loss_eval_2=lambda d: 2 * d["loss_eval_1"])
    found = blendsearch(lambda n: 0.8 if n == 200 else 1.0, 100, 200, 2, seed=0)
    report = search_report({"BlendSearch": found}, runs, searched=LOSS, reported="loss_eval_2")
    row, means = report.loc["BlendSearch"], size_means(runs, LOSS).set_index("size")
    assert (row["best_size"], row["found"], row["cost"]) == (200, 0.8, 300)
    assert row["anew"] == means.loc[200, "mean"] and row["low"] < row["anew"] < row["high"]
    assert row["optimism"] == pytest.approx(row["anew"] - 0.8)
    assert row["reported"] == pytest.approx(2 * row["anew"])


def test_simulated_searches_flatter_as_much_as_there_is_noise():
    sizes = [32, 64, 128, 256, 512]
    means = pd.DataFrame({"size": sizes, "mean": [1.2, 1.1, 1.0, 1.1, 1.2]})
    exact = simulated_searches(means, 0.0, 32, 512, 8, repeats=3)
    assert exact["optimism"]["mean"].abs().max() < 1e-12
    noisy = simulated_searches(means, 0.05, 32, 512, 8, repeats=12)
    assert (noisy["optimism"]["mean"] > 2 * noisy["optimism"]["sem"]).all()
    assert (noisy["excess"]["mean"] >= exact["excess"]["mean"]).all()
    cost = noisy["cost"]["mean"]
    assert cost["random search"] >= cost["BlendSearch"]


def test_a_diverged_trial_never_wins():
    trials = blendsearch(lambda n: math.nan if n < 550 else bowl(n), 512, 9000, 8, seed=0)
    assert math.isnan(trials["loss"].iloc[0])
    assert math.isinf(trials["best_loss"].iloc[0])
    assert trials["best_size"].iloc[-1] >= 550 and np.isfinite(trials["best_loss"].iloc[-1])


def test_search_is_silent_and_leaves_the_log_levels(capfd):
    logging.getLogger("optuna").setLevel(logging.INFO)
    before = logging.getLogger("optuna").level
    blendsearch(bowl, 10, 14, 6, seed=0)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logging.getLogger("optuna").level == before


def test_search_refuses_an_empty_space():
    for low, high, trials in ((10, 10, 3), (0, 10, 3), (10, 20, 0)):
        with pytest.raises(InstructMiningError, match="need 1 <= low"):
            blendsearch(bowl, low, high, trials, seed=0)


@pytest.fixture
def fewer(monkeypatch):
    """Fewer simulated curves than in a study."""
    monkeypatch.setattr(size_curve, "DRAWS", 4000)
    monkeypatch.setattr(size_curve, "STUDIES", 2000)


@pytest.mark.usefixtures("fewer")
def test_double_descent_is_found_and_a_u_and_a_fall_are_not():
    double = [0.0, -0.04, -0.08, -0.02, 0.03, -0.03, -0.08, -0.12]
    found = size_curve_test(curve(double), LOSS)
    assert found.falls_rises_falls and found.p < 0.01
    assert found.sizes[1:3] == (512, 2048)
    assert found.rise == pytest.approx(math.expm1(0.11), abs=0.015)
    u = size_curve_test(curve([0.1, 0.05, 0.0, 0.0, 0.05, 0.1, 0.15, 0.2]), LOSS)
    assert not u.falls_rises_falls
    fall = size_curve_test(curve(-0.02 * np.arange(8)), LOSS)
    assert not fall.falls_rises_falls
    assert (fall.df, fall.sd) == (32, pytest.approx(0.01, rel=0.3))


def test_max_min_statistic_by_hand():
    """Means 3 1 2 0 with two draws each: steps 2, 1 and 2 over a standard error of 1."""
    quads = np.array([[0, 1, 2, 3]])
    value, _ = size_curve._max_min(np.array([[3.0, 1.0, 2.0, 0.0]]), np.full(4, 2), quads)
    assert value[0] == pytest.approx(1.0)


def test_level_holds_at_every_boundary_shape():
    counts, df, rng = np.full(8, 5), 32, np.random.default_rng(5)
    quads = np.array([[a, b, c, d] for a in range(8) for b in range(a + 1, 8)
                      for c in range(b + 1, 8) for d in range(c + 1, 8)])
    double = size_curve_test(curve(np.zeros(8)), LOSS)
    shapes = size_curve._boundary_shapes(8)
    shapes += [np.zeros(8), 5.0 * np.arange(8), np.r_[50, 0, 9, 9, 9, 9, 9, 50.0]]
    for shape in shapes:
        null = size_curve._simulate(shape, counts, df, quads, 4000, rng)
        assert (null > double.critical).mean() <= 0.06


@pytest.mark.usefixtures("fewer")
def test_power_is_as_planned():
    assert size_curve_power(2, sizes=8, draws_each=5) == pytest.approx(0.63, abs=0.06)
    assert size_curve_power(3, sizes=8, draws_each=5) >= 0.94


def test_size_curve_needs_sizes_and_repeats():
    with pytest.raises(InstructMiningError, match="at least 4 sizes"):
        size_curve_test(curve([0, 1, 2]), LOSS)
    with pytest.raises(InstructMiningError, match="repeats"):
        size_curve_test(curve([0, 1, 2, 3], draws=1), LOSS)


def test_size_means_pools_the_noise_of_one_curve():
    runs = curve([0.0, 0.1], draws=2)
    table = size_means(runs, LOSS)
    logs = np.log(runs["loss_eval_1"].to_numpy()).reshape(2, 2)
    sd = math.sqrt(logs.var(axis=1, ddof=1).mean())
    reach = stats.t.isf(0.025, 2) * sd / math.sqrt(2)
    assert table["mean"].to_numpy() == pytest.approx(np.exp(logs.mean(1)))
    assert table["high"].to_numpy() == pytest.approx(np.exp(logs.mean(1) + reach))
    assert size_means(curve([0.0, 0.1], draws=1), LOSS)["low"].isna().all()
