"""A study in miniature on a tiny real model: sweep, `fit`, `plan`, gate, `select --verify`."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from instructmining import plan, reports
from instructmining.cli import main
from instructmining.experiments import comparisons, gate, regime
from instructmining.experiments.comparisons import draw_prompts
from instructmining.study import Study
from instructmining_core.indicators.score_table import write_scores
from instructmining_core.indicators.scorer import score
from instructmining_core.regression.rule_card import FittedOn, load_rule
from instructmining_core.selection import beat_random
from instructmining_core.selection.select import TOKENS

WORDS = np.array("sort list file path item value key row index name open close read write".split())
PROFILE = """extends: smoke
name: mini
data:
  kind: files
  folder: ""
  sources: [{{name: a, where: a.jsonl}}, {{name: b, where: b.jsonl}}, {{name: c, where: c.jsonl}}]
  unseen: [{{name: d, where: d.jsonl}}, {{name: e, where: e.jsonl}}]
  eval_1: {{name: x, where: x.jsonl}}
  eval_2: {{name: y, where: y.jsonl}}
  eval_more: [{{name: z, where: z.jsonl}}]
  regime_prompts: 4
  pool_rows: 30
  eval_prompts: 6
  choices: []
regime: {{learning_rates: [1.0e-3], rows: [8], layers: [0, 1], sources: [a, b], draws: 2}}
models: {{base: {{id: {base}, dtype: float32}}, ladder: []}}
design: {{size: 8, fusion: 0, within: 9, mixed: 3, tokens: 0, anchors: 1, anchor_seeds: 1}}
finetune: {{max_tokens: 96}}
indicators: [len_in, len_out]
inference: {{columns: [len_out], permutations: 19}}
selection:
  {{size: 6, redraws: false, seeds: 2, draws: 2, matched: 2, baseline_seeds: 2,
    rivals: [longest, worst], equal_steps: false}}
"""


def write_rows(path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with open(path, "w") as stream:
        for _ in range(count):
            asked, told = (" ".join(rng.choice(WORDS, n)) for n in rng.integers(2, 9, 2))
            stream.write(json.dumps({"instruction": asked, "output": told}) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_lm_folder):
    """A folder with the files, the profile, and a finished sweep; the current one."""
    folder = tmp_path_factory.mktemp("mini")
    for seed, name in enumerate("abcdexyz"):
        write_rows(folder / f"{name}.jsonl", 6 if name in "xy" else 40, seed)
    (folder / "mini.yaml").write_text(PROFILE.format(base=tiny_lm_folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("INSTRUCTMINING_HOME", str(folder))
        study = Study.open("mini.yaml")
        columns = (*study.profile.indicators, "compression")
        write_scores(score(study.data.everything, {}, indicators=columns),
                     study.folder / "scores.parquet")  # fmt: skip
        study.save(study.data.roles, "roles.parquet")
        sets = study.draw_sets()
        study.save(pd.DataFrame({"set_id": [s.set_id for s in sets],
                                 "set": [json.dumps(s.as_dict()) for s in sets]}),
                   "sets.parquet")  # fmt: skip
        study.run("sweep", comparisons.sweep_plans(study), progress=False)
        arguments = ["fit", "--profile", "mini.yaml", "-o", "rule.json", "--permutations", "19"]
        assert main(arguments) == 0
        yield folder


@pytest.fixture(scope="module")
def study(home):
    return Study.open("mini.yaml")


@pytest.fixture(scope="module")
def first_pool(study):
    """(plans, runs) of the gate on the first pool."""
    pool = next(iter(study.data.pools))
    plans = [one for one in gate.gate_plans(study, load_rule("rule.json"))
             if one.label["pool"] == pool]  # fmt: skip
    return plans, study.run("gate", plans, progress=False)


def test_fit_profile_fits_the_sweep_of_the_study(home, study):
    from instructmining_core.regression.rule import fit_rule
    from instructmining_core.regression.run_table import Standardizer

    card = load_rule("rule.json")
    constants = Standardizer.fit(study.candidate_scores, ["len_out"])
    by_hand = fit_rule(study.sweep(), ["len_out"], constants)
    assert card.coefficients[0].estimate == pytest.approx(by_hand.slopes["len_out"])
    assert card.fitted_on.sources == ["a", "b", "c"]
    assert (card.fitted_on.profile, card.fitted_on.sets) == (study.profile.name, len(by_hand.runs))


def test_plan_profile_prints_the_half_widths_of_the_design(home, capsys):
    def half_width(sigma):
        assert main(["plan", "--profile", "mini.yaml", "--sigma", sigma]) == 0
        return float(re.search(r"len_out +([0-9.]+)", capsys.readouterr().out).group(1))

    assert half_width("0.2") == pytest.approx(2 * half_width("0.1"), abs=2e-4)


def test_main_arms_are_judged_on_every_prompt(study, first_pool):
    _, runs = first_pool
    assert {name: len(exam) for name, exam in study.data.exams.items()} == {
        "eval_1": 6, "eval_2": 6, "regime": 4, "gate": 36 - sum(
            study.data.facts.query("source == 'z'")["near copies of evaluation rows"])}
    main = runs["method"].isin(gate.MAIN)
    assert runs.loc[main, "loss_gate"].notna().all() and runs.loc[~main, "loss_gate"].isna().all()
    assert runs[["loss_eval_1", "loss_eval_2", "relevance"]].notna().all(axis=None)


def test_the_plan_counts_what_is_there_and_what_is_to_come(study):
    assert plan.head_count(study).loc["gate", "waits_for"] == "gate needs rule.json"
    shutil.copy("rule.json", study.folder)
    table = plan.head_count(study)
    assert table.loc["sweep", ["runs", "done", "left"]].tolist() == [13, 13, 0]
    assert table.loc["sweep", "hours"] > 0 and not table["waits_for"].any()
    assert list(table.index) == ["regime", "sweep", "gate", "refit"]
    for stage in table.index:
        told = plan.expected_runs(study.profile, stage, 3, len(study.data.pools))
        assert table.loc[stage, "runs"] == told, stage


def test_the_regime_reads_its_runs_and_the_base(study):
    runs = regime.regime_runs(study)
    table = regime.regime_table(study, runs)
    assert table.index.names == regime.SETTING and len(table) == 2
    mixed = runs[(runs["kind"] == regime.MIXTURE) & (runs["layers"] == 0)]
    for end in ("", "_token"):
        gain = (mixed[f"base_regime{end}"] - mixed[f"loss_regime{end}"]).mean()
        # records keep six places of each prompt's nll
        assert table.loc[0, f"gain{end}"].iloc[0] == pytest.approx(gain, abs=2e-5)
    assert table["collections"].tolist() == [2, 2]
    assert not table["chosen"].any() or table.loc[table["chosen"], "admissible"].all()
    hashes = {one for table in study.data.exams.values() for one in table["row_hash"]}
    assert sum(map(len, study.data.exams.values())) == len(hashes), "no prompt serves twice"


def test_losses_by_prompt_are_those_of_the_runs(study, first_pool):
    _, runs = first_pool
    found = comparisons.per_example(study, runs)
    groups = dict(list(runs.groupby(["pool", "method", "size"])))
    assert set(found) == set(groups)
    for key, matrix in found.items():
        by_seed = groups[key].sort_values("seed")["loss_eval_2"]
        assert matrix.shape == (len(by_seed), 6)
        assert matrix.mean(axis=1) == pytest.approx(by_seed.to_numpy(), rel=1e-5)


def test_token_plans_hold_the_selected_rows_tokens(study, first_pool):
    plans, runs = first_pool
    cost = gate.row_lengths(study, [h for one in plans for h in one.row_hashes])["answer"]
    own = next(one for one in plans if one.label["method"] == "selected")
    selected = cost.loc[list(own.row_hashes)].sum()
    tokens = runs.set_index("method")["tokens_trained"]
    assert tokens["selected"].iloc[0] == selected, "one epoch: what was counted is what is trained"
    at_tokens = [one for one in plans if one.label["method"].endswith(TOKENS)]
    assert {one.label["method"] for one in at_tokens} == {"random" + TOKENS, "longest" + TOKENS}
    for one in at_tokens:
        assert abs(cost.loc[list(one.row_hashes)].sum() - selected) <= cost.max() / 2
        assert one.label["size"] == 6, "told by the set whose tokens they have"
    prompts = comparisons.per_example(study, runs)
    table = beat_random.compare_budgets(runs, prompts, loss="loss_eval_2")
    primary = table[table["role"] == "primary"]
    assert primary["budget"].tolist() == ["equal rows", "equal tokens"]
    assert primary["low_prompts"].notna().all()


def test_refits_are_rules_of_resampled_sweeps(study):
    pool = next(iter(study.data.pools))
    cards = gate.refit_cards(study, 3, pool)
    slopes = [card.coefficients[0].estimate for card in cards]
    assert len(set(slopes)) == 3 and np.isfinite(slopes).all()
    own = load_rule("rule.json")
    assert cards[0].standardisation == own.standardisation, "the same constants"
    again = gate.refit_cards(study, 3, pool)
    assert [card.coefficients for card in again] == [c.coefficients for c in cards]
    plans = gate.refit_plans(study)
    assert len(plans) == study.profile.selection.refits * len(study.data.pools)
    assert {one.label["method"] for one in plans} == {"refit"}


def test_a_pool_of_a_fitted_source_is_judged_by_a_rule_without_it(study, monkeypatch):
    whole = load_rule("rule.json")
    assert gate.rule_for(study, whole, "d (unseen source)") is whole
    without = gate.rule_for(study, whole, "a")
    assert without.fitted_on.sources == ["b", "c"]
    assert without.coefficients[0].estimate != whole.coefficients[0].estimate
    assert without.standardisation != whole.standardisation, "its constants do not know it either"


def test_resampling_keeps_to_arm_and_source_and_makes_new_ids():
    runs = pd.DataFrame({
        "set_id": [f"s{i}" for i in range(9)], "arm": ["within"] * 6 + ["mixed"] * 3,
        "source": ["a"] * 4 + ["b"] * 2 + [""] * 3,
    })  # fmt: skip
    drawn = gate.resampled(runs, np.random.default_rng(0))
    sizes = drawn.groupby(["arm", "source"]).size()
    assert sizes.to_dict() == runs.groupby(["arm", "source"]).size().to_dict()
    assert drawn["set_id"].is_unique and drawn["drawn"].duplicated().any()
    home_of = runs.set_index("set_id")["source"]
    assert (drawn["drawn"].map(home_of) == drawn["source"]).all()


def test_select_verify_from_end_to_end(home, capsys):
    assert main(["score", "d.jsonl", "-o", "s.parquet", "--quiet", "--indicators",
                 "len_in,len_out,compression"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["select", "s.parquet", "--rule", "rule.json", "--top", "6", "-o", "best.jsonl",
                 "--verify", "--profile", "mini.yaml", "--quiet"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    verdict = json.load(open("best.jsonl.report.json"))["verdict"]
    page = open("best.jsonl.verdict.md").read()
    assert verdict["pool"] == "unseen source" and "**unseen source**" in page
    table = pd.DataFrame(verdict["contrasts"])
    primary = table[table["role"] == "primary"]
    assert primary["budget"].tolist() == ["equal rows", "equal tokens"]
    assert primary[["n", "n_versus"]].to_numpy().tolist() == [[2, 2], [2, 2]]
    assert primary[["low_prompts", "detectable"]].notna().all(axis=None)
    against = table[(table["method"] == "selected") & (table["budget"] == "equal rows")]
    assert set(against["versus"]) == {"random", "longest", "shortest", "compression", "full"}
    first = page.splitlines()[0]
    won = primary["verdict"].str.startswith("better")
    assert first.startswith("The selected rows train" if won.all() else "No evidence that")
    assert first in printed and "could have seen" in printed
    for row in table.to_dict("records"):
        assert f"{row['method']} against {row['versus']}" in page and row["verdict"] in page


def contrasts(*verdicts, budgets=("equal rows", "equal tokens"), **changes):
    """One primary contrast a verdict, the budgets in turn."""
    rows = [
        {"budget": budgets[i % len(budgets)], "pool": f"p{i // len(budgets)}", "role": "primary",
         "method": "selected", "versus": "random", "n": 3, "n_versus": 3, "difference": -0.02,
         "low": -0.03, "high": -0.01, "low_prompts": -0.04, "high_prompts": 0.01,
         "detectable": 0.015, "p_margin": 0.4, "verdict": word, **changes}
        for i, word in enumerate(verdicts)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_first_line_is_the_answer():
    head = reports.headline
    assert head(contrasts("better", "better")).startswith("The selected rows train a better model")
    assert "but by less than 1 %" not in head(contrasts("better", "better"))
    tiny = contrasts("better, and within ±1 %", "better, and within ±1 %")
    assert head(tiny).startswith("The selected rows train a better model than random rows, but by")
    part = head(contrasts("better", "undecided"))
    assert part.startswith("No evidence that") and "than random rows at equal tokens:" in part
    none = head(contrasts("undecided", "worse", "undecided", "undecided"))
    assert none.startswith("No evidence that") and "worse in 1 of 2 pools" in none
    some = head(contrasts("better", "undecided", budgets=("equal rows",)))
    assert some.startswith("No evidence that") and "in every pool at equal rows" in some
    assert "better in 1 and worse in 0 of 2 pools" in some


def test_a_negative_page_says_what_it_rules_out():
    card = load_rule("v3")
    kinds = {"p0": reports.PoolKind("unseen source", "by name")}
    page = reports.verdict_markdown(contrasts("undecided", "undecided"), kinds, card)
    assert "an advantage of 1.5 % or more would have been found with 80 % power" in page
    row = "| -2.0 % [-3.0 %, -1.0 %] | [-4.0 %, +1.0 %] | 1.5 % | not shown | **undecided** |"
    assert row in page
    assert "rules out" not in reports.verdict_markdown(contrasts("better", "better"), kinds, card)
    nan = dict.fromkeys(("low", "high", "low_prompts", "high_prompts", "detectable"), np.nan)
    alone = reports.verdict_markdown(contrasts("undecided", "undecided", **nan), kinds, card)
    assert "nothing could be detected" in alone and "nan" not in alone


def test_pools_are_named_by_what_the_rule_has_seen():
    card = SimpleNamespace(fitted_on=FittedOn(sources=["a", "b"]))
    fitted = pd.DataFrame({"source": ["a", "b"], "row_hash": ["1", "2"]})

    def kind(source, row, rows=fitted, card=card):
        pool = pd.DataFrame({"source": [source, source], "row_hash": [row, "9"]})
        return reports.pool_kind(pool, card, rows)

    assert kind("z", "2").name == "fitted rows" and kind("z", "2").why.startswith("1 of 2")
    assert kind("a", "3").name == "unseen rows of a fitted source"
    assert kind("z", "3").name == "unseen source"
    assert kind("a", "3", rows=None).name == "unseen rows of a fitted source"
    assert "not at hand" in kind("z", "3", rows=None).why
    silent = SimpleNamespace(fitted_on=FittedOn())
    assert kind("z", "3", rows=None, card=silent).name == "origin unknown"
    assert load_rule("v3").fitted_on.sources == []


def test_prompts_for_the_judge_come_from_all_sources():
    table = pd.DataFrame({"source": ["a"] * 50 + ["b"] * 30 + ["c"] * 2, "id": range(82)})
    drawn = draw_prompts(table, 20, seed=3)
    counts = drawn["source"].value_counts()
    assert counts["c"] == 2 and {counts["a"], counts["b"]} == {9}
    assert drawn["id"].is_monotonic_increasing and drawn["id"].is_unique
    assert drawn["id"].tolist() == draw_prompts(table, 20, seed=3)["id"].tolist()
    assert drawn["id"].tolist() != draw_prompts(table, 20, seed=4)["id"].tolist()
    assert len(draw_prompts(table, 1, seed=0)) == 1 and len(draw_prompts(table, 99, seed=0)) == 82
