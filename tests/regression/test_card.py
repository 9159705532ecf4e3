import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.studies import COLUMNS, design, outcomes, synthetic_world
from instructmining.cli.rule import explained
from instructmining.cli.select import _kept
from instructmining.reports import card_markdown
from instructmining_core.config import InstructMiningError
from instructmining_core.finetuning.sets import designed_sets, set_means
from instructmining_core.regression.inference import held_out, jackknife_sources
from instructmining_core.regression.rule import fit_pooled, fit_rule
from instructmining_core.regression.rule_card import RuleCard, load_rule, make_card, presets
from instructmining_core.regression.run_table import RunsError, Standardizer
from instructmining_core.selection.select import Selection, compare_rules, rank
from instructmining_core.selection.support import intervals, row_intervals, support

EVIDENCE = Path(__file__).parents[2] / "evidence"


def scored_attrs():
    def of(role, revision="abc", **more):
        return {"version": "1", "model": f"org/{role}", "revision": revision, "stand_in": False,
                **more}

    reference = {"hash": "f00d", "size": 512}
    attrs = {"len_in": of("base"), "len_out": of("base"), "reward": of("reward"),
             "log_ppl": of("ppl"), "mtld": {"version": "1", "model": "", "revision": ""},
             "knn_6": of("encoder", reference=reference)}
    attrs |= {c: of("unieval") for c in COLUMNS[6:]}
    return {"indicators": attrs}


@pytest.fixture(scope="module")
def study():
    z = synthetic_world(10, rows=300, seed=21)
    pool = z.copy()
    pool[list(COLUMNS)] = z[list(COLUMNS)] * 3 + 10
    pool.attrs = scored_attrs()
    sets = designed_sets(pool, 60, 24, 100, seed=1, columns=COLUMNS)
    made = design(sets, z)
    drawn = outcomes(made, 1, np.random.default_rng(0))
    runs = made.runs(drawn.Y[:, 0])
    runs[list(COLUMNS)] = set_means(sets, pool, COLUMNS).to_numpy()
    constants = Standardizer.fit(pool, COLUMNS)
    fit = fit_rule(runs, COLUMNS, constants)
    return pool, runs, constants, fit, drawn.slopes[:, 0]


@pytest.fixture(scope="module")
def card(study):
    pool, runs, constants, fit, _ = study
    return make_card(fit, pool, note="a test", not_for="anything else", permutation_p=0.001,
                     profile="tiny", set_size=100,
                     new_sources=jackknife_sources(runs, COLUMNS, constants),
                     held_out=held_out(runs, COLUMNS, constants),
                     base={"id": "org/base", "revision": "abc", "stand_in": False},
                     auto_size=128)


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
    by_hand = card.constant + constants.transform(pool).to_numpy() @ fit.slopes.to_numpy()
    assert card.predict(pool).to_numpy() == pytest.approx(by_hand)
    parts = card.contributions(pool)
    assert parts.sum(axis=1).to_numpy() + fit.intercept == pytest.approx(by_hand)
    assert list(parts.columns) == list(COLUMNS)
    holed = pool.head(2).copy()
    holed.loc[holed.index[0], "log_ppl"] = np.nan
    assert card.predict(holed).isna().tolist() == [True, False]
    with pytest.raises(InstructMiningError, match="'mtld'"):
        card.predict(pool.drop(columns="mtld"))


def test_the_card_holds_the_schema(card):
    data = card.content()
    for one in data["coefficients"]:
        assert {"name", "estimate", "interval_these_sources", "interval_new_sources", "vif",
                "range"} <= set(one)
        assert one["interval_these_sources"][0] < one["estimate"] < one["interval_these_sources"][1]
        assert one["range"][0] < one["range"][1]
    assert {m["role"] for m in data["models"]} == {"base", "reward", "ppl", "encoder", "unieval"}
    assert all(set(m) == {"role", "id", "revision", "stand_in"} for m in data["models"])
    assert data["knn_reference"] == {"hash": "f00d", "size": 512}
    assert len(data["held_out"]) == 10 and {"source", "r2", "slope"} <= set(data["held_out"][0])
    for one in data["held_out"]:
        assert one["slope_interval"][0] < one["slope"] < one["slope_interval"][1]
    assert data["permutation_p"] == 0.001 and data["auto_size"] == 128
    assert data["fitted_on"] == {"sources": [f"s{i:02d}" for i in range(10)], "profile": "tiny",
                                 "sets": 84, "set_size": 100, "note": "a test"}


def test_json_is_stable_and_survives(card, tmp_path):
    card.save(tmp_path / "rule.json")
    again = load_rule(tmp_path / "rule.json")
    assert again.content_hash == card.content_hash
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "rule.json").read_bytes()
    later = RuleCard.from_dict({**card.content(), "made_at": "2027-01-01"})
    assert later.content_hash == card.content_hash
    assert RuleCard.from_dict({**card.content(), "not_for": "x"}).content_hash != card.content_hash


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*/rule.json")), ids=lambda p: p.parent.name)
def test_the_committed_cards_load_and_keep_their_hash(path, tmp_path):
    text = json.loads(path.read_text())
    card = load_rule(path)
    assert card.content_hash == text["content_hash"]
    sources = [one["source"] for one in text["uncertainty"]["constants"]]
    known = card.fitted_on
    assert known.sources == sources and known.profile == path.parent.name
    assert known.sets == text["design"]["sets"] and known.note == ""
    card.save(tmp_path / "rule.json")
    again = load_rule(tmp_path / "rule.json")
    assert again.content() == card.content()


def test_the_published_cards_keep_the_hash_of_their_first_schema():
    assert load_rule("v1").content_hash == "686d79335e59cb3eacf894308447ded3"
    assert load_rule("v3").content_hash == "4b65d9fa8d2f30d99e49eb7f14157da1"


def test_the_sentence_of_older_schemas_becomes_the_note():
    older = json.loads((EVIDENCE.parent / "instructmining_core/rules/v3.json").read_text())
    found = RuleCard.from_dict({**older, "fitted_on": "9 sets from 2 sources (a, b)"}).fitted_on
    assert (found.sources, found.note) == ([], "9 sets from 2 sources (a, b)")


def test_a_card_changed_by_hand_is_refused(card, tmp_path):
    text = card.to_json().replace('"auto_size": 128', '"auto_size": 999')
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(InstructMiningError, match="changed by hand"):
        load_rule(tmp_path / "rule.json")


@pytest.mark.parametrize("change, says", [
    ({"schema": "instructmining.rule/9"}, "rule/9"), ({"kind": "magic"}, "magic"),
    ({"coefficients": []}, "coefficients"), ({"standardisation": {}}, None),
    ({"coefficients": [{"name": "x", "estimate": "much"}]}, r"coefficients\[0\]"),
    ({"standardisation": {"len_in": {"mean": 0, "sd": 0}}}, "sd above 0")])
def test_broken_cards_are_named(card, change, says):
    if says is None:
        RuleCard.from_dict({**card.content(), **change})
        return
    with pytest.raises(InstructMiningError, match=says):
        RuleCard.from_dict({**card.content(), **change})


def test_missing_fields_and_files_are_named(card, tmp_path):
    with pytest.raises(InstructMiningError, match="not_for"):
        RuleCard.from_dict({k: v for k, v in card.content().items() if k != "not_for"})
    with pytest.raises(InstructMiningError, match="v1, v3"):
        load_rule("v9")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InstructMiningError, match="line 1"):
        load_rule(tmp_path / "bad.json")


def test_check_accepts_its_own_table_and_names_every_difference(card):
    assert card.check(scored_attrs()) == []
    other = scored_attrs()
    other["indicators"]["reward"]["model"] = "org/else"
    other["indicators"]["log_ppl"]["revision"] = "def"
    other["indicators"]["mtld"]["version"] = "2"
    other["indicators"]["knn_6"]["reference"] = {"hash": "beef", "size": 512}
    other["indicators"]["coherence"]["stand_in"] = True
    del other["indicators"]["len_in"]
    with pytest.raises(InstructMiningError) as caught:
        card.check(other)
    text = str(caught.value)
    for part in ("reward: model is 'org/else' in the table, 'org/reward' in the card",
                 "log_ppl: revision", "mtld: version", "knn_6: reference hash",
                 "coherence: stand-in", "len_in: the table does not say"):
        assert part in text
    assert len(card.check(other, allow_mismatch=True)) == 6


ISSUE_KEYS = {
    "top": ("schema", "kind", "coefficients", "standardisation", "held_out", "permutation_p",
            "models", "knn_reference", "fitted_on", "not_for"),
    "coefficient": ("name", "estimate", "interval_these_sources", "interval_new_sources", "vif",
                    "range"),
}


def bare(card):
    """The card with exactly the keys that the issue lists: no role, no version, no intercept."""
    data = {k: card.content()[k] for k in ISSUE_KEYS["top"]}
    data["coefficients"] = [{k: c[k] for k in ISSUE_KEYS["coefficient"]}
                            for c in data["coefficients"]]
    return RuleCard.from_dict(data)


def test_a_card_with_the_issues_keys_alone_compares_models_and_reference(card, study):
    alone = bare(card)
    assert alone.check(scored_attrs()) == []
    for column, key, value in (("reward", "model", "org/else"), ("naturalness", "revision", "x"),
                               ("log_ppl", "stand_in", True),
                               ("knn_6", "reference", {"hash": "beef", "size": 512})):
        other = scored_attrs()
        other["indicators"][column][key] = value
        found = alone.check(other, allow_mismatch=True)
        assert len(found) == 1 and found[0].startswith(f"{column}: "), found
    assert "no intercept" in card_markdown(alone)
    assert "not known" not in card_markdown(card).split("## Held")[0]
    gap = card.predict(study[0]) - alone.predict(study[0])
    assert gap.to_numpy() == pytest.approx(card.intercept)
    assert row_intervals(alone, study[0]).empty


def test_a_card_can_not_turn_its_checks_off(card):
    lying = json.loads(json.dumps(card.content()))
    for one in lying["coefficients"]:
        one["role"], one["pool_relative"] = None, False
    other = scored_attrs()
    other["indicators"]["reward"]["model"] = "org/else"
    other["indicators"]["knn_6"]["reference"] = None
    found = RuleCard.from_dict(lying).check(other, allow_mismatch=True)
    assert [line.split(":")[0] for line in found] == ["reward", "knn_6", "knn_6"]
    unnamed = RuleCard.from_dict({**card.content(), "knn_reference": None})
    assert "names no reference" in unnamed.check(scored_attrs(), allow_mismatch=True)[0]
    words = {"indicators": {"len_out": {"version": "tokens-1", "model": "org/base"}}}
    plain = RuleCard.from_dict({**card.content(), "coefficients": [{
        **card.content()["coefficients"][1], "version": None}], "models": []})
    assert "len_out: model" in plain.check(words, allow_mismatch=True)[0]


@pytest.mark.parametrize("path, value, says", [
    (("coefficients", 2, "interval_these_sources"), [2, 1], r"coefficients\[2\].interval_these"),
    (("coefficients", 0, "interval_new_sources"), "wide", r"coefficients\[0\].interval_new"),
    (("coefficients", 1, "vif"), "big", r"coefficients\[1\].vif"),
    (("coefficients", 1, "range"), [0], r"coefficients\[1\].range: it must be \[low, high\]"),
    (("held_out", 3, "r2"), "good", r"held_out\[3\].r2"),
    (("held_out", 0, "source"), "", r"held_out\[0\].source"),
    (("models", 4, "stand_in"), "no", r"models\[4\].stand_in"),
    (("models", 0, "id"), None, r"models\[0\].id"),
    (("knn_reference", "size"), 0, "knn_reference.size"),
    (("permutation_p",), 1.2, "permutation_p"),
    (("models", 1, "role"), "base", "'base' more than once"),
    (("uncertainty", "constants", 0, "variance"), None, r"uncertainty.constants\[0\].variance")])
def test_a_wrong_leaf_is_named_by_its_path(card, path, value, says):
    data = json.loads(json.dumps(card.content()))
    inside = data
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    with pytest.raises(InstructMiningError, match=says):
        RuleCard.from_dict(data)
    if path[-1] in ISSUE_KEYS["coefficient"] + ("r2", "source", "stand_in", "id", "size"):
        del inside[path[-1]]
        with pytest.raises(InstructMiningError, match=f"{says.split(': ')[0]}.*must be given"):
            RuleCard.from_dict(data)


def test_every_scored_indicator_needs_its_model(card):
    for role, column in (("reward", "reward"), ("encoder", "knn_6"), ("unieval", "naturalness")):
        models = [m for m in card.content()["models"] if m["role"] != role]
        with pytest.raises(InstructMiningError, match=rf"{role}.*coefficients\[\d\] '{column}'"):
            RuleCard.from_dict({**card.content(), "models": models})


def test_a_moved_folder_with_the_same_weights_is_the_same_model(card):
    data = json.loads(card.to_json())
    for model in data["models"]:
        model["revision"] = "sha256:0123"
    del data["content_hash"]
    attrs = scored_attrs()
    for one in attrs["indicators"].values():
        if one["model"]:
            one |= {"model": "/somewhere/else", "revision": "sha256:0123"}
    assert RuleCard.from_dict(data).check(attrs) == []
    attrs["indicators"]["reward"]["revision"] = "sha256:9999"
    assert "reward: revision" in RuleCard.from_dict(data).check(attrs, allow_mismatch=True)[0]


def test_published_rules_refuse_other_models():
    with pytest.raises(InstructMiningError, match="oasst-rm-2.1-pythia"):
        load_rule("v3").check(scored_attrs())
    assert any("names no sentence encoder" in line
               for line in load_rule("v1").check(scored_attrs(), allow_mismatch=True))


def test_a_pool_of_one_source_may_only_use_within(card, study):
    pool, runs, constants, _, _ = study
    assert card.check(scored_attrs(), sources=["a", "a"]) == []
    pooled = RuleCard.from_dict({**card.content(), "kind": "pooled"})
    with pytest.raises(InstructMiningError, match="one source"):
        pooled.check(scored_attrs(), sources=["a", "a"])
    with pytest.raises(RunsError, match="one source"):
        make_card(fit_pooled(runs, COLUMNS, constants), pool.head(300), not_for="")


def test_support_of_like_and_unlike_data(card, study):
    pool = study[0]
    own = support(card, pool)
    assert own.at["all", "verdict"] == "inside" and len(own) == 11
    assert own.at["all", "outside_rows"] < 0.1 < own.at["all", "outside_range"]
    far = pool.assign(log_ppl=pool["log_ppl"] + 30, mtld=pool["mtld"] - 30)
    assert support(card, far).at["all", "verdict"] == "far"
    with pytest.raises(InstructMiningError, match="--strict"):
        support(card, far, strict=True)
    assert support(load_rule("v3"), pool).at["all", "verdict"] == "unknown"


def test_strict_refuses_one_far_source_among_many(card, study):
    pool = study[0]
    stray = pool["source"].eq("s03")
    mixed = pool.assign(log_ppl=pool["log_ppl"] + 30 * stray, mtld=pool["mtld"] - 30 * stray)
    mixed = pd.concat([pool] * 3 + [mixed], ignore_index=True).assign(
        source=["near"] * 3 * len(pool) + list(np.where(stray, "stray", "near")))
    found = support(card, mixed)
    assert found["verdict"].to_dict() == {"all": "inside", "near": "inside", "stray": "far"}
    with pytest.raises(InstructMiningError, match="stray: far") as caught:
        support(card, mixed, strict=True)
    assert "near" not in str(caught.value)
    with pytest.raises(InstructMiningError, match="all: unknown"):
        support(load_rule("v3"), pool, strict=True)


def test_rows_without_a_value_are_not_inside(card, study):
    pool = study[0]
    own = support(card, pool).loc["all"]
    holed = pool.copy()
    holed.loc[holed.index[::5], "reward"] = np.nan
    found = support(card, holed).loc["all"]
    assert found["missing"] == 0.2 and found["outside_rows"] >= 0.2 and found["verdict"] == "far"
    assert found["outside_range"] >= own["outside_range"]
    assert support(card, pool.assign(reward=np.nan)).at["all", "verdict"] == "far"
    assert intervals(card, holed)["outside"].to_numpy()[::5].all()


def test_distances_of_rows_by_hand(card, study):
    pool, _, constants, fit, _ = study
    inverse = np.linalg.inv(np.cov(fit.indicators, rowvar=False))
    gaps = constants.transform(pool)[list(COLUMNS)].to_numpy() - fit.indicators.mean(axis=0)
    by_hand = [float(np.sqrt(g @ inverse @ g)) for g in gaps]
    found = support(card, pool).loc["all"]
    assert found["row_distance_median"] == pytest.approx(np.median(by_hand))
    assert found["row_distance_95"] == pytest.approx(np.quantile(by_hand, 0.95))
    middle = gaps.mean(axis=0)
    assert found["distance"] == pytest.approx(np.sqrt(middle @ inverse @ middle))


def test_prediction_intervals_hold_new_runs():
    """Sources of their own level (sd 0.04): their own constant where fitted, else the spread."""
    z = synthetic_world(12, rows=300, seed=5)
    z.attrs = scored_attrs()
    pool = z[~z["source"].isin(["s10", "s11"])]
    fitted = designed_sets(pool, 84, 36, 100, seed=1, columns=COLUMNS)
    again = designed_sets(z, 144, 0, 100, seed=2, columns=COLUMNS)
    everything = design(fitted + again, z)
    drawn = outcomes(everything, 40, np.random.default_rng(0))
    known, strange, narrow, blind = [], [], [], []
    for b in range(40):
        runs = everything.runs(drawn.Y[:, b])
        card = make_card(fit_rule(runs.head(len(fitted)), COLUMNS), pool, not_for="",
                         base={"id": "b", "revision": "r", "stand_in": False})
        new = runs.tail(len(again))
        found = intervals(card, new)
        held = new["log_loss"].between(found["low_these"], found["high_these"])
        unseen = new["source"].isin(["s10", "s11"])
        assert (found["own_source"] == ~unseen).all()
        known.append(held[~unseen].mean())
        strange.append(held[unseen].mean())
        narrow.append((found["high_these"] - found["low_these"])[~unseen].mean())
        # as before: the sources' mean constant for all, without the spread
        off = (new["log_loss"] - card.predict(new)).abs()
        half = (found["high_these"] - found["low_these"]) / 2
        blind.append((off <= half)[~unseen].mean())
    assert 0.93 < np.mean(known) < 0.97
    assert 0.88 < np.mean(strange) < 0.99
    assert np.mean(narrow) < 0.06 and np.mean(blind) < 0.6
    assert found["low_new"].isna().all()


def test_an_older_card_without_constants_has_the_spread(card, study):
    older = json.loads(json.dumps(card.content()))
    older |= {"schema": "instructmining.rule/1", "fitted_on": "a test"}
    del older["uncertainty"]["constants"]
    now, then = intervals(card, study[0]), intervals(RuleCard.from_dict(older), study[0])
    assert now["own_source"].all() and not then["own_source"].any()
    wide = then["high_these"] - then["low_these"]
    assert (wide > now["high_these"] - now["low_these"]).all()
    assert then["predicted"].to_numpy() == pytest.approx(card.predict(study[0]).to_numpy())


def test_new_source_intervals_are_wider(card, study):
    found = intervals(card, study[0].head(50))
    assert (found["high_new"] - found["low_new"] > found["high_these"] - found["low_these"]).all()
    with pytest.raises(InstructMiningError, match="no uncertainty"):
        intervals(load_rule("v3"), study[0])
    strangers = study[0].head(50).assign(source="elsewhere")
    shown = row_intervals(card, strangers)
    assert set(shown["interval"]) == {"a new source"}
    assert shown["low"].to_numpy() == pytest.approx(found["low_new"].to_numpy())
    assert set(row_intervals(card, study[0])["interval"]) == {"its own source"}


def test_the_commands_show_a_rows_interval(card, study):
    pool = study[0].head(40).assign(file="f", row=range(40), reasons="", part=0)
    pool["id"] = [f"r{i}" for i in range(40)]
    pool.loc[pool.index[20:], "source"] = "elsewhere"
    ranked = rank(pool, card)
    shown = row_intervals(card, ranked)
    kept = _kept(Selection(ranked, ranked.head(0), len(ranked)), card)
    assert [row["low"] for row in kept] == pytest.approx(shown["low"].tolist())
    assert {row["interval"] for row in kept} == {"its own source", "a new source"}
    assert all(row["low"] < row["predicted"] < row["high"] for row in kept)
    pages = {source: explained(part.iloc[0], card, 40) for source, part in ranked.groupby("source")}
    own = shown.loc[ranked.index[ranked["source"] != "elsewhere"][0]]
    assert f"95 % prediction, its own source: {own['low']:.4f} to {own['high']:.4f}" in pages["s00"]
    assert "95 % prediction, a source like these:" in pages["elsewhere"]
    assert "95 % prediction, a new source:" in pages["elsewhere"]


def test_the_page_says_what_the_card_says(card):
    page = card_markdown(card)
    assert "length or training tokens" in page and "p = 0.001" in page and "f00d" in page
    assert page.count("\n| ") == (9 + 2) + (9 + 2) + (10 + 2) + (5 + 2)
    assert "had other sets been" in page and "leaving out one source" in page
    assert "anything else" in page and "10 sources have an sd of" in page
    assert "**stand-in**" not in page.split("## Models")[1]
    weak = card_markdown(RuleCard.from_dict({**card.content(), "permutation_p": 0.4}))
    assert "**no evidence**" in weak
    assert "not known" in card_markdown(load_rule("v3"))
    models = [{**m, "stand_in": True} for m in card.content()["models"]]
    small = RuleCard.from_dict({**card.content(), "models": models})
    assert card_markdown(small).count("| **stand-in** |") == 5


def test_the_page_is_plain_markdown_whatever_others_wrote(card):
    from docutils.core import publish_doctree
    from myst_parser.docutils_ import Parser

    odd = RuleCard.from_dict({
        **card.content(), "fitted_on": {"note": "a|b *c [d](e) <f> $g$ `h` {i}`j`\n# k"},
        "held_out": [{"source": "s|*`1", "r2": None, "slope": None}]})
    for one in (card, odd, load_rule("v1")):
        tree = publish_doctree(card_markdown(one), parser=Parser(), settings_overrides={
            "halt_level": 2, "report_level": 2, "myst_enable_extensions": ["dollarmath"]})
        assert len([n for n in tree.findall() if n.tagname == "table"]) >= 2
    assert "a|b *c [d](e) <f> $g$ `h` {i}`j` # k" in publish_doctree(
        card_markdown(odd), parser=Parser()).astext()


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
