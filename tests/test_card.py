import json

import numpy as np
import pandas as pd
import pytest

from instructmining_core.card import CardError, CardMismatch, RuleCard, load_rule, presets
from instructmining_core.card_making import make_card
from instructmining_core.inference import held_out, jackknife_sources
from instructmining_core.regression import RunsError, Standardisation, fit_pooled, fit_within
from instructmining_core.rule_compare import compare_rules
from instructmining_core.subsets import designed_sets, set_means
from instructmining_core.support import SupportError, support
from instructmining_core.worlds import COLUMNS, design, outcomes, synthetic_world


def scored_attrs():
    def of(role, revision="abc", **more):
        return {"version": "1", "model": f"org/{role}", "revision": revision, "stand_in": False,
                **more}

    reference = {"hash": "f00d", "size": 512}
    attrs = {"len_in": of("base"), "len_out": of("base"), "reward": of("reward"),
             "ppl": of("ppl"), "mtld": {"version": "1", "model": "", "revision": ""},
             "knn_6": of("encoder", reference=reference)}
    attrs |= {c: of("unieval") for c in COLUMNS[6:]}
    return {"indicators": attrs}


@pytest.fixture(scope="module")
def study():
    z = synthetic_world(10, rows=300, seed=21)
    pool = z.copy()
    pool[list(COLUMNS)] = z[list(COLUMNS)] * 3 + 10
    pool.attrs = scored_attrs()
    sets = designed_sets(pool, pool, 60, 24, 100, seed=1, columns=COLUMNS)
    made = design(sets, z)
    drawn = outcomes(made, 1, np.random.default_rng(0))
    runs = made.runs(drawn.Y[:, 0])
    runs[list(COLUMNS)] = set_means(sets, pool, COLUMNS).to_numpy()
    constants = Standardisation.fit(pool, COLUMNS)
    fit = fit_within(runs, COLUMNS, constants)
    return pool, runs, constants, fit, drawn.slopes[:, 0]


@pytest.fixture(scope="module")
def card(study):
    pool, runs, constants, fit, _ = study
    return make_card(fit, pool, fitted_on="a test", not_for="anything else", permutation=0.001,
                     new_sources=jackknife_sources(runs, COLUMNS, constants),
                     held_out=held_out(runs, COLUMNS, constants),
                     base={"id": "org/base", "revision": "abc", "stand_in": False},
                     auto_size=128, made_at="2026-11-23T09:00:00+00:00")


def test_published_rules_have_the_papers_numbers():
    assert presets() == ["v1", "v3"]
    one = pd.DataFrame([{"reward": 2.0, "understandability": 0.5, "naturalness": 0.25,
                         "coherence": 0.75, "len_out": 100.0, "knn_6": 0.8}])
    assert load_rule("v3").predict(one)[0] == pytest.approx(
        0.0274 - 0.0078 * 2 + 0.4421 * 0.5 - 0.3212 * 0.25 - 0.1520 * 0.75)
    assert load_rule("v1").predict(one)[0] == pytest.approx(
        1.0684 - 0.1498 * 2 + 8.257e-5 * 100 - 0.9350 * 0.8)
    assert {load_rule(n).kind for n in presets()} == {"pooled"}


def test_predict_is_the_fit_and_contributions_sum_to_it(study, card):
    pool, _, constants, fit, _ = study
    by_hand = fit.intercept + constants.apply(pool).to_numpy() @ fit.slopes.to_numpy()
    assert card.predict(pool).to_numpy() == pytest.approx(by_hand)
    parts = card.contributions(pool)
    assert parts.sum(axis=1).to_numpy() + fit.intercept == pytest.approx(by_hand)
    assert list(parts.columns) == list(COLUMNS)
    holed = pool.head(2).copy()
    holed.loc[holed.index[0], "ppl"] = np.nan
    assert card.predict(holed).isna().tolist() == [True, False]
    with pytest.raises(CardError, match="'mtld'"):
        card.predict(pool.drop(columns="mtld"))


def test_the_card_holds_the_schema(card):
    data = card.data
    for one in data["coefficients"]:
        assert {"name", "estimate", "interval_these_sources", "interval_new_sources", "vif",
                "range"} <= set(one)
        assert one["interval_these_sources"][0] < one["estimate"] < one["interval_these_sources"][1]
        assert one["range"][0] < one["range"][1]
    assert {m["role"] for m in data["models"]} == {"base", "reward", "ppl", "encoder", "unieval"}
    assert all(set(m) == {"role", "id", "revision", "stand_in"} for m in data["models"])
    assert data["knn_reference"] == {"hash": "f00d", "size": 512}
    assert len(data["held_out"]) == 10 and {"source", "r2", "slope"} <= set(data["held_out"][0])
    assert data["permutation_p"] == 0.001 and data["auto_size"] == 128


def test_json_is_stable_and_survives(card, tmp_path):
    card.save(tmp_path / "rule.json")
    again = load_rule(tmp_path / "rule.json")
    assert again.content_hash == card.content_hash
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "rule.json").read_bytes()
    later = RuleCard({**card.data, "made_at": "2027-01-01"})
    assert later.content_hash == card.content_hash
    assert RuleCard({**card.data, "not_for": "x"}).content_hash != card.content_hash


def test_a_card_changed_by_hand_is_refused(card, tmp_path):
    text = card.to_json().replace('"auto_size": 128', '"auto_size": 999')
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(CardError, match="changed by hand"):
        load_rule(tmp_path / "rule.json")


@pytest.mark.parametrize("change, says", [
    ({"schema": "instructmining.rule/9"}, "rule/9"), ({"kind": "magic"}, "magic"),
    ({"coefficients": []}, "no coefficients"), ({"standardisation": {}}, None),
    ({"coefficients": [{"name": "x", "estimate": "much"}]}, "finite estimate"),
    ({"standardisation": {"len_in": {"mean": 0, "sd": 0}}}, "sd above 0")])
def test_broken_cards_are_named(card, change, says):
    if says is None:
        RuleCard({**card.data, **change})
        return
    with pytest.raises(CardError, match=says):
        RuleCard({**card.data, **change})


def test_missing_fields_and_files_are_named(card, tmp_path):
    with pytest.raises(CardError, match="not_for"):
        RuleCard({k: v for k, v in card.data.items() if k != "not_for"})
    with pytest.raises(CardError, match="v1, v3"):
        load_rule("v9")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CardError, match="line 1"):
        load_rule(tmp_path / "bad.json")


def test_check_accepts_its_own_table_and_names_every_difference(card):
    assert card.check(scored_attrs()) == []
    other = scored_attrs()
    other["indicators"]["reward"]["model"] = "org/else"
    other["indicators"]["ppl"]["revision"] = "def"
    other["indicators"]["mtld"]["version"] = "2"
    other["indicators"]["knn_6"]["reference"] = {"hash": "beef", "size": 512}
    other["indicators"]["coherence"]["stand_in"] = True
    del other["indicators"]["len_in"]
    with pytest.raises(CardMismatch) as caught:
        card.check(other)
    text = str(caught.value)
    for part in ("reward: model is 'org/else' in the table, 'org/reward' in the card",
                 "ppl: revision", "mtld: version", "knn_6: reference hash", "coherence: stand-in",
                 "len_in: the table does not say"):
        assert part in text
    assert len(card.check(other, allow_mismatch=True)) == 6


def test_a_moved_folder_with_the_same_weights_is_the_same_model(card):
    data = json.loads(card.to_json())
    for model in data["models"]:
        model["revision"] = "sha256:0123"
    del data["content_hash"]
    attrs = scored_attrs()
    for one in attrs["indicators"].values():
        if one["model"]:
            one |= {"model": "/somewhere/else", "revision": "sha256:0123"}
    assert RuleCard(data).check(attrs) == []
    attrs["indicators"]["reward"]["revision"] = "sha256:9999"
    assert "reward: revision" in RuleCard(data).check(attrs, allow_mismatch=True)[0]


def test_published_rules_refuse_other_models():
    with pytest.raises(CardMismatch, match="oasst-rm-2.1-pythia"):
        load_rule("v3").check(scored_attrs())
    assert any("names no sentence encoder" in line
               for line in load_rule("v1").check(scored_attrs(), allow_mismatch=True))


def test_a_pool_of_one_source_may_only_use_within(card, study):
    pool, runs, constants, _, _ = study
    assert card.check(scored_attrs(), sources=["a", "a"]) == []
    pooled = RuleCard({**card.data, "kind": "pooled"})
    with pytest.raises(CardMismatch, match="one source"):
        pooled.check(scored_attrs(), sources=["a", "a"])
    with pytest.raises(RunsError, match="one source"):
        make_card(fit_pooled(runs, COLUMNS, constants), pool.head(300), fitted_on="", not_for="")


def test_support_of_like_and_unlike_data(card, study):
    pool = study[0]
    own = support(card, pool)
    assert own.at["all", "verdict"] == "inside" and len(own) == 11
    assert own.at["all", "outside_rows"] < 0.1 < own.at["all", "outside_range"]
    far = pool.assign(ppl=pool["ppl"] + 30, mtld=pool["mtld"] - 30)
    assert card.support(far).at["all", "verdict"] == "far"
    with pytest.raises(SupportError, match="--strict"):
        support(card, far, strict=True)
    assert load_rule("v3").support(pool).at["all", "verdict"] == "unknown"


def test_prediction_intervals_hold_new_runs():
    z = synthetic_world(10, rows=300, seed=5)
    made = design(designed_sets(z, z, 84, 36, 100, seed=1, columns=COLUMNS), z)
    drawn = outcomes(made, 40, np.random.default_rng(0), source_sd=0.0)
    new = design(designed_sets(z, z, 42, 18, 100, seed=2, columns=COLUMNS), z)
    z.attrs = scored_attrs()
    held = []
    for b in range(40):
        card = make_card(fit_within(made.runs(drawn.Y[:, b]), COLUMNS), z, fitted_on="", not_for="")
        true = new.X @ drawn.slopes[:, b] + np.random.default_rng(b).normal(0, 0.01, len(new.X))
        found = card.intervals(new.runs(true))
        held.append(((found["low_these"] <= true) & (true <= found["high_these"])).mean())
    assert 0.92 < np.mean(held) < 0.99
    assert found["low_new"].isna().all()


def test_new_source_intervals_are_wider(card, study):
    found = card.intervals(study[0].head(50))
    assert (found["high_new"] - found["low_new"] > found["high_these"] - found["low_these"]).all()
    with pytest.raises(CardError, match="no uncertainty"):
        load_rule("v3").intervals(study[0])


def test_the_page_says_what_the_card_says(card):
    page = card.render()
    assert "length or training tokens" in page and "p = 0.001" in page and "f00d" in page
    assert page.count("\n| ") == 9 + 10 + 5 + 6
    weak = RuleCard({**card.data, "permutation_p": 0.4}).render()
    assert "**no evidence**" in weak
    assert "not known" in load_rule("v3").render()


def test_rules_are_compared_by_rank_and_by_rows(card, study):
    pool = study[0]
    pairs, rows = compare_rules({"ours": card, "v3": load_rule("v3"), "again": card}, pool, 20)
    by = pairs.set_index(["rule_1", "rule_2"])
    assert by.at[("ours", "again"), "spearman"] == pytest.approx(1)
    assert by.at[("ours", "again"), "jaccard"] == 1
    assert by.at[("ours", "v3"), "spearman"] == pytest.approx(
        card.predict(pool).corr(load_rule("v3").predict(pool), method="spearman"))
    assert "oasst" in by.at[("ours", "v3"), "notes_2"] and not by.at[("ours", "v3"), "notes_1"]
    assert len(rows) == 20 and rows["gap"].is_monotonic_decreasing
    assert set(rows) == {"row_hash", "ours", "v3", "again", "gap"}
