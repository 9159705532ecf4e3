"""The front page: effects on made-up runs whose answer is known, and the words for them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from instructmining import paper, reports
from instructmining.figures import plot_forest

POOLS = ["north", "south", "west"]
FACTS = {"rule": "56 sets", "base": "the base", "pools": "three pools"}


def runs_of(gain: float, by_tokens: float | None = None, repeats: int = 6) -> pd.DataFrame:
    """Gate runs where the selected rows lie `gain` nats below random ones, with seed noise."""
    rng, rows = np.random.default_rng(3), []
    shifts = {"selected": gain, "random": 0.0, "matched": gain / 2, "worst": -gain}
    for pool in POOLS:
        for method, shift in shifts.items():
            for seed in range(repeats):
                noise = rng.normal(0, 0.002, 2)
                other = shift if by_tokens is None else shift * by_tokens
                rows.append({
                    "pool": pool, "method": method, "seed": seed, "base_eval_2": 2.1,
                    "base_eval_2_token": 1.9, "loss_eval_2": 2.0 - shift + noise[0],
                    "loss_eval_2_token": 1.8 - other + noise[1],
                    "relevance": 0.9 + (0.05 if method == "selected" else 0.0),
                })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    return pd.DataFrame({
        "arm": ["within"] * 4 + ["fusion"], "source": ["a", "a", "b", "b", ""],
        "loss_eval_2": [1.9, 2.0, 2.1, 2.0, 9.0], "loss_eval_2_token": [1.7, 1.8, 1.9, 1.8, 9.0],
    })  # fmt: skip


def test_effects_are_welchs_and_in_units_of_the_spread(sweep):
    runs = runs_of(0.03)
    effects = reports.gate_effects(runs, sweep)
    spread = np.std([1.95, 2.05], ddof=1)
    assert reports.spread_between(sweep, "loss_eval_2") == pytest.approx(spread)
    row = effects[(effects["pool"] == "south") & (effects["versus"] == "random")].iloc[0]
    part = runs[runs["pool"] == "south"]
    random, own = (part.loc[part["method"] == m, "loss_eval_2"] for m in ("random", "selected"))
    low, high = ttest_ind(random, own, equal_var=False).confidence_interval()
    assert row["low"] == pytest.approx(low) and row["high"] == pytest.approx(high)
    assert row["effect"] == pytest.approx(random.mean() - own.mean())
    assert row["base"] == pytest.approx(random.mean() - 2.1) and row["base"] < 0
    assert row["relevance"] == pytest.approx(0.05)
    whole = effects[effects["pool"] == reports.POOLED].set_index(["versus", "averaging"])
    assert whole.loc[("random", "prompts"), "effect"] == pytest.approx(0.03, abs=0.003)
    assert whole.loc[("matched", "tokens"), "effect"] == pytest.approx(0.015, abs=0.003)
    assert len(plot_forest(effects).axes) == 1


@pytest.mark.parametrize("gain, by_tokens, word", [
    (0.03, None, "lower"), (-0.03, None, "higher"), (0.0, None, "unclear"), (0.03, -1.0, "depends"),
    (0.03, 0.0, "unclear"),
])  # fmt: skip
def test_a_word_needs_both_averagings(sweep, gain, by_tokens, word):
    effects = reports.gate_effects(runs_of(gain, by_tokens), sweep)
    assert reports.verdict_of(effects, "random") == word


def test_single_repeats_have_no_interval_and_no_word(sweep):
    effects = reports.gate_effects(runs_of(0.03, repeats=1), sweep)
    assert effects["low"].isna().all() and reports.verdict_of(effects, "random") == "unclear"
    assert "not measured often enough" in reports._followed(effects)


@pytest.mark.parametrize("changes, word", [
    ((0.05, 0.06, 0.05), "more"), ((-0.05, -0.06, -0.05), "less"), ((0.05, 0.0, -0.04), "as much"),
])  # fmt: skip
def test_the_word_on_relevance_needs_an_interval_off_zero(sweep, changes, word):
    runs = runs_of(0.03)
    change = runs["pool"].map(dict(zip(POOLS, changes, strict=True)))
    runs["relevance"] = 0.9 + change.where(runs["method"] == "selected", 0.0)
    told = reports._followed(reports.gate_effects(runs, sweep))
    assert told.startswith(f"- The model heeds its prompt {word}") and "[" in told


def test_the_page_answers_first_and_escapes_what_it_is_given(sweep):
    verdict = paper.claims().assign(ours="x | y", detectable="2 %", verdict="undecided")
    verdict.loc[0, "verdict"] = reports.NOT_ASKED
    facts = FACTS | {"pools": "<script>alert(1)</script>"}
    effects = reports.gate_effects(runs_of(0.03), sweep)
    effects.attrs["facts"] = facts
    page = reports.front_page(effects, verdict)
    first = page.splitlines()[0]
    assert first.endswith("Yes: the rows that it picks lower the loss.")
    assert "<script>" not in page and "of the same length they lower the loss averaged" in page
    assert page.count("\n| ") == len(verdict) - 1 + 2 and "x / y" in page
    assert "heeds its prompt more" in page
