"""Transfer, ablation, loss variants and the slope of length, on worlds whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from regression.test_card import scored_attrs

from bench.studies import COLUMNS, design, synthetic_world
from instructmining import tables
from instructmining.experiments import comparisons
from instructmining_core.finetuning.sets import designed_sets, equal_token_sets, fusion_sets
from instructmining_core.regression import checks
from instructmining_core.regression.checks import univariate
from instructmining_core.regression.paper_rule import fit_paper
from instructmining_core.regression.rule import fit_rule
from instructmining_core.regression.rule_card import make_card
from instructmining_core.regression.run_table import Standardizer
from instructmining_core.selection.beat_random import compare_with_random

SLOPES = np.array([0.0, 0.03, -0.04, 0.02, 0.0, 0.0, -0.03, 0.0, 0.01])
NOISE = 1e-3


@pytest.fixture(scope="module")
def world():
    table = synthetic_world(8, rows=300, seed=5)
    table.attrs = scored_attrs()
    return table


@pytest.fixture(scope="module")
def made(world):
    return design(designed_sets(world, 48, 16, 100, seed=2, columns=COLUMNS), world)


def runs_of(made, slopes, seed=0):
    rng = np.random.default_rng(seed)
    return made.runs(made.shares @ rng.normal(0, 0.1, made.shares.shape[1]) + made.X @ slopes
                     + rng.normal(0, NOISE, len(made.X)))


@pytest.fixture(scope="module")
def found(made):
    """The rule's own base, its second evaluation set at half the effect, and a base upside down."""
    own = runs_of(made, SLOPES)
    half, none = runs_of(made, SLOPES / 2, 1)["log_loss"], runs_of(made, 0 * SLOPES, 3)["log_loss"]
    other = runs_of(made, -SLOPES, 2)
    return {("a", "eval_1"): own, ("a", "eval_2"): own.assign(log_loss_eval_2=half),
            ("b", "eval_1"): other, ("b", "eval_2"): other.assign(log_loss_eval_2=none)}


def test_transfer_slopes_are_the_share_of_the_effect_that_carries(found, world):
    fit = fit_rule(found["a", "eval_1"], COLUMNS)
    card = make_card(fit, world, not_for="")
    table = tables.transfer_table(found, card)
    assert table["slope"].tolist() == pytest.approx([1, 0.5, -1, 0], abs=0.03)
    assert table["slope"][0] == pytest.approx(1, abs=1e-9)  # by construction
    assert table["carries"].tolist() == ["fitted", "in part", "reversed", "not seen"]
    assert (table["low"] < table["slope"]).all() and (table["r2_low"] <= table["r2"]).all()


def test_carries_in_words():
    words = [tables.carries(*bounds) for bounds in [(0.8, 1.1), (1.2, 1.4), (-0.1, 0.9)]]
    assert words == ["whole", "amplified", "not seen"]


def test_coefficient_map_says_what_holds(found):
    frame = tables.coefficient_map(found, COLUMNS, Standardizer.identity(COLUMNS))
    settings = list(frame["setting"].unique())
    frame = frame.set_index(["setting", "name"])
    strong, flat = COLUMNS[2], COLUMNS[4]
    fit = fit_rule(found["b", "eval_1"], COLUMNS)
    assert frame.loc[("b, eval_1", strong), "low"] == fit.table().loc[strong, "low"]
    holds = frame["holds"].unstack(0)[settings]
    assert holds.loc[strong].tolist() == ["claimed", "holds", "reversed", "not seen"]
    assert frame.loc[("b, eval_1", strong), "same_sign"] == np.False_
    if holds.loc[flat].iloc[0] == "claims nothing":  # one in twenty is claimed by chance
        assert set(holds.loc[flat]) == {"claims nothing"}


def test_dropping_the_carrier_changes_the_selection(world):
    columns = list(COLUMNS[:3])
    sets = designed_sets(world, 48, 16, 100, seed=2, columns=COLUMNS)
    made = design(sets, world)
    runs = runs_of(made, np.array([0.001, 0.04, 0.0, 0, 0, 0, 0, 0, 0]))
    smaller = comparisons.smaller_rules(runs, world, columns)
    fit, card = smaller[columns[1]]
    assert fit.columns == tuple(card.columns) == (columns[0], columns[2])
    rule = make_card(fit_rule(runs, columns, Standardizer.fit(world, columns)), world,
                     not_for="")
    # repeats count once for every rule
    pool = pd.concat([world.head(400), world.head(50)], ignore_index=True)
    table = comparisons.ablation_overlaps(pool, 60, rule, smaller).set_index("without")
    assert table.loc[columns[1], "jaccard"] < 0.4 and table.loc[columns[1], "finetuned"]
    assert table.loc[columns[0], "jaccard"] > 0.9 and not table.loc[columns[0], "finetuned"]
    assert table.loc[columns[1], "r2"] < 0.5 < table.loc[columns[0], "r2"]
    assert comparisons.smaller_rules(runs, world, columns[:1]) == {}


def test_the_contrasts_set_every_smaller_rule_against_random_and_the_full_rule():
    rng = np.random.default_rng(0)
    means = {"selected": 4.0, "random": 4.2, "without x": 4.2}
    runs = pd.DataFrame([
        {"pool": "p", "method": method, "size": 10, "seed": seed,
         "loss_eval_2": mean + rng.normal(0, 0.005)}
        for method, mean in means.items() for seed in range(5)])  # fmt: skip
    table = compare_with_random(runs).set_index(["method", "versus"])
    assert table.loc[("selected", "without x"), "difference"] == pytest.approx(-0.2 / 4.2, abs=3e-3)
    assert table.loc[("selected", "without x"), "verdict"].startswith("better")
    assert abs(table.loc[("without x", "random"), "difference"]) < 5e-3
    assert table["detectable"].notna().all()


def test_loss_variants_flag_a_turned_sign(found):
    own = found["a", "eval_1"]
    turned = own["log_loss"] - 2 * SLOPES[1] * own[COLUMNS[1]]  # one slope's sign is turned
    runs = own.assign(loss_eval_1=np.exp(own["log_loss"]), loss_eval_1_first64=np.exp(turned),
                      loss_eval_2=np.nan, effective_n_eval_1=57.0)
    table = checks.variant_table(runs, COLUMNS)
    assert list(table["loss"].unique()) == ["mean over prompts", "first 64 tokens of a response"]
    flagged = table[table["contradicts"]]
    assert flagged["column"].tolist() == [COLUMNS[1]]
    assert flagged["loss"].tolist() == ["first 64 tokens of a response"]
    assert flagged["estimate"].iloc[0] == pytest.approx(-SLOPES[1], abs=3e-3)
    assert checks.variant_page(table).loc[COLUMNS[1]].str.endswith("!!").tolist() == [
        False, True]
    assert checks.effective_n(runs) == {"eval_1": 57.0}


def both_arms(world, per_row, per_token):
    """Runs at equal rows and at equal tokens, whose log loss follows len_out and total tokens."""
    world = world.assign(len_out=np.exp(0.4 * world["len_out"] + 3))
    scores, rng = world[["row_hash", "source", *COLUMNS]], np.random.default_rng(4)
    tokens = round(100 * float(world["len_out"].mean()))
    sets = [*designed_sets(scores, 48, 16, 100, seed=2, columns=COLUMNS),
            *equal_token_sets(scores, 24, tokens, seed=3, columns=COLUMNS)]
    lengths = world.drop_duplicates("row_hash").set_index("row_hash")["len_out"]
    rows = []
    for one in sets:
        own = lengths.loc[list(one.row_hashes)]
        rows.append({
            "set_id": one.set_id, "arm": one.arm, "len_out": own.mean(),
            "tokens_trained": own.sum(), **{f"share_{s}": w for s, w in one.shares.items()},
            "log_loss": per_row * own.mean() + per_token * own.sum() + rng.normal(0, NOISE),
        })  # fmt: skip
    return pd.DataFrame(rows).fillna(0.0), Standardizer.fit(world, ["len_out"])


@pytest.mark.parametrize("per_row, per_token", [(0.01, 0.0), (0.0, 1e-4)])
def test_equal_tokens_tell_length_from_tokens(world, per_row, per_token):
    runs, constants = both_arms(world, per_row, per_token)
    table = checks.length_slopes(runs, constants)
    assert table.loc["equal tokens", "sets"] == 24
    assert table.loc["equal tokens", "tokens_cv"] < 0.02 < table.loc["equal rows", "tokens_cv"]
    assert table.loc["equal rows", "estimate"] == pytest.approx(
        (per_row + 100 * per_token) * constants.sd["len_out"], rel=0.02)
    low, high = table.loc["equal tokens", ["low", "high"]]
    assert low > 0 if per_row else low <= 0 <= high
    # the arm enters no other fit, nor the paper's on "all" runs
    alone = runs[runs["arm"] != "tokens"]
    assert len(fit_rule(runs, ["len_out"], constants, arms=None).runs) == len(alone)
    assert len(fit_rule(runs, ["len_out"], constants).runs) == len(alone)


def test_without_the_arm_length_stays_tokens(found):
    table = checks.length_slopes(
        found["a", "eval_1"].assign(tokens_trained=1.0), Standardizer.identity(COLUMNS))
    assert table.empty


def test_papers_fit_on_its_own_design(world):
    sets = [*designed_sets(world, 48, 16, 100, seed=2, columns=COLUMNS),
            *fusion_sets(world, 30, 100, 1)]
    runs = runs_of(design(sets, world), SLOPES)
    constants = Standardizer.identity(COLUMNS)
    table = tables.paper_table(runs, COLUMNS, constants, 4)
    own = fit_paper(runs, COLUMNS, constants, arms=("fusion",))
    part = table.loc["fusion, the paper's own design"]
    assert list(part.index) == list(own.fit.columns) and (part["runs"] == 30).all()
    assert set(table.loc["all arms", "runs"]) == {94}
    few = runs[(runs["arm"] != "fusion") | (runs["arm"] == "fusion").cumsum().le(3)]
    assert "fusion, the paper's own design" not in tables.paper_table(
        few, COLUMNS, constants, 4).index
    fit = fit_rule(runs, COLUMNS, constants)
    dims = tables.dimensions(runs, fit)
    assert dims["participation"].between(1, len(COLUMNS)).all() and len(dims) == 2


def test_screens_carry_the_interval_of_r2(found):
    table = univariate(found["a", "eval_1"], COLUMNS)
    assert ((table["r2_low"] <= table["r2"]) & (table["r2_low"] <= table["r2_high"])).all()
