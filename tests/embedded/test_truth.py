"""Dose sets, dose effects, AUC within twins: against values worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from embedded.test_defects import table
from scipy import stats

from instructmining import tables
from instructmining.embedded.defects import KINDS
from instructmining.experiments import planted_defects
from instructmining.tables import permuted_within_source
from instructmining_core.config import InstructMiningError

DOSES = (0.0, 0.25, 0.5, 1.0)


def test_dose_sets_differ_in_the_share_of_twins_only():
    clean = table(("one", "two", "three"), rows=20)
    sets = planted_defects.dose_sets(clean, 16, doses=DOSES, seeds=(0, 1))
    sizes = sets.groupby(["set_kind", "dose", "seed"]).size()
    assert (sizes == 16).all() and len(sizes) == 2 * (1 + len(KINDS) * 3)
    for (kind, dose, _), rows in sets.groupby(["set_kind", "dose", "seed"]):
        assert (rows["kind"] != "").sum() == round(dose * 16)
        assert set(rows["kind"]) <= {"", kind}
        assert rows["place"].tolist() == list(range(16))
        assert rows["source"].value_counts().max() <= 6  # 16 rows of three sources
    for _, rows in sets.groupby("seed"):
        prompts = rows.groupby(["set_kind", "dose"])["prompt"].agg(tuple)
        assert prompts.nunique() == 1
        chosen = [set(rows.loc[(rows["set_kind"] == "scrambled") & (rows["dose"] == d)
                               & (rows["kind"] != ""), "place"]) for d in (0.25, 0.5, 1.0)]
        assert chosen[0] < chosen[1] < chosen[2]
    assert sets.groupby("seed")["prompt"].agg(tuple).nunique() == 2


def test_too_small_a_source_is_an_error():
    with pytest.raises(InstructMiningError, match="are needed"):
        planted_defects.dose_sets(table(("one",), rows=5), 10, doses=DOSES, seeds=(0,))


def runs(noise: float) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(3):
        for kind, slope in (("clean", 0.0), ("cut_short", 0.2), ("repetitive", 0.0)):
            for dose in (0.0,) if kind == "clean" else (0.25, 0.5, 1.0):
                log = 1 + 0.1 * seed + slope * dose + noise * rng.normal()
                rows.append((kind, dose, seed, np.exp(log)))
    return pd.DataFrame(rows, columns=["kind", "dose", "seed", "loss_eval_1"])


def test_dose_effects_find_the_slope_and_agree_with_statsmodels():
    exact = planted_defects.dose_effects(runs(noise=0.0))
    assert exact["slope"].to_dict() == pytest.approx({"cut_short": 0.2, "repetitive": 0.0})
    frame = runs(noise=0.02)
    ours = planted_defects.dose_effects(frame)
    design = pd.DataFrame({f"s{s}": (frame["seed"] == s).astype(float) for s in range(3)})
    for kind in ("cut_short", "repetitive"):
        for dose in sorted(frame.loc[frame["kind"] == kind, "dose"].unique()):
            name = kind if dose == 1 else f"{kind}_{dose}"
            design[name] = ((frame["kind"] == kind) & (frame["dose"] == dose)).astype(float)
    theirs = sm.OLS(np.log(frame["loss_eval_1"]), design).fit()
    for kind in ("cut_short", "repetitive"):
        assert ours.loc[kind, "slope"] == pytest.approx(theirs.params[kind])
        assert ours.loc[kind, ["low", "high"]].tolist() == pytest.approx(
            theirs.conf_int().loc[kind].tolist())
        assert ours.loc[kind, "p"] == pytest.approx(theirs.pvalues[kind])
    assert ours.loc["cut_short", ["harms", "seen"]].tolist() == [True, True]
    assert ours.loc["repetitive", ["harms", "seen"]].tolist() == [False, False]


def test_a_kind_that_bends_does_not_push_up_one_that_does_nothing():
    frame = runs(noise=0.0005)
    clean = frame[frame["kind"] == planted_defects.CLEAN].set_index("seed")["loss_eval_1"]
    bent = (frame["kind"] == "cut_short") & (frame["dose"] < 1)  # harms at the full dose only
    frame.loc[bent, "loss_eval_1"] = frame.loc[bent, "seed"].map(clean)
    effects = planted_defects.dose_effects(frame)
    assert effects["harms"].to_dict() == {"cut_short": True, "repetitive": False}
    assert effects.loc["repetitive", "slope"] == pytest.approx(0, abs=2e-3)


def test_one_run_a_kind_has_no_interval():
    frame = runs(0.01).query("seed == 0 and dose in [0, 1]")
    effects = planted_defects.dose_effects(frame)
    assert effects["low"].isna().all() and not effects["harms"].any()


SCORES = pd.DataFrame({
    "id": ["a", "b", "c", "a#x", "b#x", "c#x", "z#x"],
    "source": ["s", "s", "t", "s", "s", "t", "t"],
    "kind": ["", "", "", "cut_short", "repetitive", "cut_short", "cut_short"],
    "twin": ["", "", "", "a", "b", "c", "not scored"],
    "len_out": [5.0, 4.0, 3.0, 2.0, 9.0, 3.0, 1.0],
}, index=[10, 11, 12, 13, 14, 15, 16])  # fmt: skip


def test_twin_auc_by_hand():
    auc = planted_defects.twin_auc(SCORES, {"longest": -SCORES["len_out"]})
    auc = auc.set_index(["kind", "source"])
    assert auc.loc[("cut_short", "s"), "auc"] == 1.0  # the longer one is the clean one
    assert auc.loc[("repetitive", "s"), "auc"] == 0.0
    assert auc.loc[("cut_short", "t"), "auc"] == 0.5  # a tie
    assert auc["pairs"].tolist() == [1, 1, 1] and auc["missing"].sum() == 0
    assert auc["seen"].to_dict() == {
        ("cut_short", "s"): True, ("repetitive", "s"): False, ("cut_short", "t"): True}


def test_missing_scores_are_counted_not_guessed():
    broken = (-SCORES["len_out"]).where(SCORES["id"] != "a")
    auc = planted_defects.twin_auc(SCORES, {"longest": broken}).set_index(["kind", "source"])
    assert np.isnan(auc.loc[("cut_short", "s"), "auc"])
    assert auc.loc[("cut_short", "s"), ["pairs", "missing"]].tolist() == [0, 1]


def test_rivals_and_their_order():
    effects = pd.DataFrame({"slope": {"cut_short": 0.3, "repetitive": 0.1},
                            "harms": {"cut_short": True, "repetitive": False}})
    scores = SCORES.assign(ppl=1.0, reward=[3, 3, 3, 1, 1, 1, 1.0], compression=1.0)
    rules = planted_defects.rivals(scores, effects)
    assert list(rules) == ["random", "longest", "shortest", "lowest_ppl", "compression", "reward",
                           "oracle", "loss_oracle"]
    table = planted_defects.twin_auc(scores, rules)
    auc = table.groupby(["scorer", "kind"])["auc"].mean().unstack()
    assert auc.loc["oracle"].tolist() == [1, 1] and auc.loc["reward"].tolist() == [1, 1]
    # the loss oracle does not flee from a kind that was not seen to harm, whatever its slope
    assert auc.loc["loss_oracle"].tolist() == [1, 0.5]
    assert auc.loc["lowest_ppl"].tolist() == [0.5, 0.5]


def test_over_libraries_is_a_t_interval():
    values = [0.6, 0.7, 0.9]
    auc = pd.DataFrame({"scorer": "rule", "kind": "cut_short", "seen": True,
                        "source": ["a", "b", "c"], "pairs": [10, 20, 30], "auc": values})
    row = planted_defects.over_libraries(auc).iloc[0]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (row["auc"], row["low"], row["high"]) == pytest.approx((np.mean(values), low, high))
    assert (row["sources"], row["pairs"]) == (3, 60)


def test_against_is_paired_by_library():
    auc = pd.DataFrame({
        "scorer": ["rule"] * 3 + ["longest"] * 3, "kind": "repetitive", "seen": False,
        "source": ["a", "b", "c"] * 2, "pairs": 5, "auc": [0.9, 0.8, 0.6, 0.5, 0.5, 0.5]})
    row = planted_defects.against(auc, "rule", "longest").iloc[0]
    test = stats.ttest_1samp([0.4, 0.3, 0.1], 0).confidence_interval(0.95)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(
        (0.8 / 3, test.low, test.high))
    with pytest.raises(InstructMiningError, match="No AUC of 'nobody'"):
        planted_defects.against(auc, "rule", "nobody")


def test_permuted_within_source_moves_rows_whole():
    scores = pd.DataFrame({"source": ["a"] * 50 + ["b"] * 50, "x": np.arange(100.0)})
    scores["y"] = 2 * scores["x"]
    shuffled = permuted_within_source(scores, ["x", "y"], seed=0)
    assert (shuffled["y"] == 2 * shuffled["x"]).all()
    assert sorted(shuffled["x"][:50]) == list(range(50)) != shuffled["x"][:50].tolist()
    assert abs(np.corrcoef(shuffled["x"][:50], scores["x"][:50])[0, 1]) < 0.5


def test_errors():
    with pytest.raises(InstructMiningError, match="stands twice"):
        planted_defects.twin_auc(pd.concat([SCORES, SCORES]), {})
    with pytest.raises(InstructMiningError, match="clean twin"):
        planted_defects.twin_auc(SCORES[SCORES["kind"] == ""], {})
    with pytest.raises(InstructMiningError, match="dose above 0"):
        planted_defects.dose_effects(runs(0).query("kind == 'clean'"))
    assert set(planted_defects.CLEAN) and planted_defects.CLEAN not in KINDS


def test_fitted_and_unseen_rows_stand_apart():
    fitted = {"a", "a#x", "c", "c#x", "z#x"}
    auc = planted_defects.apart(SCORES, {"longest": -SCORES["len_out"]}, fitted)
    by = auc.set_index(["rows", "kind", "source"])["auc"].to_dict()
    assert by == {(planted_defects.FITTED, "cut_short", "s"): 1.0,
                  (planted_defects.FITTED, "cut_short", "t"): 0.5,
                  (planted_defects.UNSEEN, "repetitive", "s"): 0.0}


def found_by_length() -> pd.DataFrame:
    """AUCs on unseen rows: "shortest" is ahead in `repetitive`, behind in `wrong_identifier`."""
    level = {("rule", "repetitive"): 0.6, ("shortest", "repetitive"): 0.9,
             ("longest", "repetitive"): 0.1, ("rule", "wrong_identifier"): 0.6,
             ("shortest", "wrong_identifier"): 0.5, ("longest", "wrong_identifier"): 0.5,
             ("rule", "cut_short"): 0.9, ("shortest", "cut_short"): 0.0,
             ("longest", "cut_short"): 1.0}  # fmt: skip
    rows = [
        {"scorer": scorer, "kind": kind, "source": source, "pairs": 10, "auc": auc + shift * 0.01,
         "missing": 0, "seen": kind == "cut_short", "rows": rows}
        for (scorer, kind), auc in level.items()
        for rows in (planted_defects.FITTED, planted_defects.UNSEEN)
        for source, shift in (("a", -1), ("b", 0), ("c", 1 if scorer == "rule" else 0))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_better_end_of_length_is_the_one_to_beat_and_why():
    effects = pd.DataFrame({"harms": [False, True]}, index=["repetitive", "wrong_identifier"])
    found = planted_defects.defects_found(found_by_length(), effects)
    # on unseen kinds: rule 0.6, shortest (0.9 + 0.5) / 2, longest 0.3
    assert (found["rival"], found["rows"]) == ("shortest", planted_defects.UNSEEN)
    difference = np.mean([0.6 - 0.7, 0.6 - 0.7, 0.61 - 0.7])
    assert found["difference"] == pytest.approx(difference)
    assert found["low"] < difference < found["high"]
    assert (found["kind"], found["kind_harms"]) == ("repetitive", False)
    assert found["kind_rival"] == pytest.approx(0.9, abs=0.01)
    # on wrong_identifier alone: 0.6 against 0.5
    assert found["harmful"]["difference"] == pytest.approx(0.1, abs=0.01)
    against = planted_defects.rule_against(found_by_length()).set_index("rows", append=True)
    fitted = against.loc[("shortest", planted_defects.FITTED), "difference"]
    assert fitted == pytest.approx(difference)


def test_kinds_that_do_not_harm_are_negative_controls():
    effects = pd.DataFrame({
        "slope": [0.2, 0.0], "low": [0.1, -0.1], "high": [0.3, 0.1], "harms": [True, False],
        "seen": [True, False]}, index=pd.Index(["cut_short", "repetitive"], name="kind"))
    table = planted_defects.by_kind(found_by_length(), effects)
    assert table["role"].tolist() == ["harms", "negative control"]
    assert table.loc["repetitive", "rule"].startswith("0.60 [0.58")


def test_the_control_shows_which_test_to_believe():
    def test(p, statistic):
        return SimpleNamespace(p=p, statistic=statistic)

    shuffled = [{tables.COUNTED: test(0.01 if i < 2 else 0.5, 0.0),
                 tables.PLAIN: test(0.01 if i < 12 else 0.5, 0.01 * i)} for i in range(40)]
    own = {tables.COUNTED: test(0.002, 0.0), tables.PLAIN: test(0.001, 0.35)}
    table = tables.control_table(own, shuffled)
    assert table.loc[tables.PLAIN, "p against the shuffles"] == (1 + 5) / 41  # 0.35 to 0.39
    assert table["significant at 5 %"].tolist() == [2, 12]
    assert table.loc[tables.COUNTED, "low"] < 0.05 < table.loc[tables.COUNTED, "high"]
    assert table.loc[tables.PLAIN, "low"] > 0.05, "so its p is not to be believed"
    assert table["p of the study"].tolist() == [0.002, 0.001]
