"""The study's own tasks: what is asked, who is right, and whether the loss goes with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from instructmining.embedded.corpus import CANDIDATES, UNSEEN
from instructmining.experiments import choice_tasks
from instructmining.experiments.choice_tasks import answered_right, difference
from instructmining.profile import DataConfig, SourceConfig, load_profile
from instructmining.reports import NOT_ASKED
from instructmining.study_data import (
    ANSWER_WORDS,
    NEAR,
    RIVALS,
    WORDS,
    docstring_questions,
    preference_questions,
    questions_of,
    read_pairs,
)
from instructmining_core.config import ProfileError


@pytest.fixture(scope="module")
def asked():
    return docstring_questions(seed=1)


def test_docstring_questions_have_one_right_answer_of_a_usual_length(asked):
    assert len(asked) >= 200
    shorter = 0
    for one in asked:
        assert len(one.choices) == RIVALS + 1 == len(set(one.choices))
        words = [len(text.split()) for text in one.choices]
        assert max(words) <= WORDS
        shorter += np.argmin([len(text) for text in one.choices]) == one.right
    # the right one is the shortest as often as any other, within four standard errors
    assert shorter / len(asked) == pytest.approx(1 / 4, abs=4 * np.sqrt(3 / 16 / len(asked)))
    places = np.bincount([one.right for one in asked])
    assert places.min() > 0.7 * len(asked) / 4


def test_the_seed_draws_the_questions_and_no_library_of_a_study_is_asked(asked):
    assert docstring_questions(seed=1) == asked != docstring_questions(seed=2)
    named = {one.prompt.split("Question: ")[1] for one in asked}
    assert not [text for text in named for name in (*CANDIDATES, *UNSEEN) if f" {name}." in text]


def pair(prompt, chosen, rejected):
    start = f"\n\nHuman: {prompt}\n\nAssistant:"
    return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}


def pairs_of(rows, folder):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(SourceConfig("pairs", "pairs.jsonl"), DataConfig(), folder)


def test_pairs_of_one_turn_and_one_length_become_questions(tmp_path):
    long = "word " * (ANSWER_WORDS + 1)
    rows = [
        pair("How?", "Like this, step by step.", "Like that, I think so."),
        pair("How?", "A second pair of the same prompt.", "It is left out, since one is enough."),
        pair("Why?", "Short.", "Very much longer than the other one is."),
        pair("When?", long, long + "x"),
        pair("A?\n\nAssistant: B.\n\nHuman: C?", "Two turns are asked.", "Two turns are told."),
        pair("Which?", "the same", "the  same"),
        pair("Where?", "Here\nit is.", "There it is."),
    ]
    found = preference_questions(pairs_of(rows, tmp_path), seed=0)
    assert {one.prompt for one in found} == {f"Question: {q}?\nAnswer:" for q in ("How", "Where")}
    where = next(one for one in found if "Where" in one.prompt)
    assert where.choices[where.right] == "Here it is."
    last = pairs_of(rows[-1:], tmp_path)
    rights = [preference_questions(last, seed=s)[0].right for s in range(20)]
    assert set(rights) == {0, 1}


def test_pairs_of_a_file_keep_to_their_lengths(shared_data):
    source = SourceConfig("preferences", "pref_alpaca_eval_helpful.jsonl.gz", take=50)
    data = DataConfig(folder=str(shared_data))
    found = questions_of(source, data, shared_data)
    assert 30 <= len(found) <= 50 and len({one.prompt for one in found}) == len(found)
    for one in found:
        sizes = sorted(map(len, one.choices))
        assert sizes[1] <= NEAR * sizes[0]
    assert questions_of(source, data, shared_data) == found
    asked = found[0].prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "x"}]
    without = questions_of(source, data, shared_data, [talk])
    assert found[0] not in without and found[1] in without


def test_a_missing_file_of_pairs_is_named():
    source = SourceConfig("mine", "nowhere.jsonl", how_to_get="Ask its authors.")
    with pytest.raises(ProfileError, match="mine: there is no file .*nowhere.jsonl. Ask its"):
        questions_of(source, DataConfig(), Path("/"))


def test_what_presets_ask_of_every_run():
    asked = {name: [one.name for one in load_profile(name).data.choices]
             for name in ("smoke", "laptop", "replication", "paper")}
    assert asked["smoke"] == asked["laptop"] == ["docstrings"] and asked["paper"] == []
    assert asked["replication"] == ["docstrings", "preferences"]


def test_difference_is_paired_by_question():
    rng = np.random.default_rng(0)
    level = rng.random(400)  # of each question
    groups = [(rng.random((3, 400)) < np.clip(level + up, 0, 1)).astype(float) for up in (0.1, 0)]
    found = difference(*groups)
    apart = groups[0].mean(0) - groups[1].mean(0)
    assert found["difference"] == pytest.approx(apart.mean())
    assert found["low"] < 0.08 < found["high"]
    one = difference(groups[0][:1], groups[1][:1])
    low, high = stats.t.interval(0.95, 399, *_mean_se(groups[0][0] - groups[1][0]))
    assert (one["low"], one["high"]) == (pytest.approx(low), pytest.approx(high))


def _mean_se(values):
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def runs(seed=0, slope=-0.1, sources=6, each=12) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    source = np.repeat([f"source {i}" for i in range(sources)], each)
    loss = 2 + np.repeat(rng.normal(0, 0.1, sources), each) + rng.normal(0, 0.05, len(source))
    right = 0.5 + slope * (loss - 2) + rng.normal(0, 0.01, len(source))
    return pd.DataFrame({
        "purpose": "sweep", "group": source, "loss_eval_1": loss, "loss_eval_1_token": loss + 0.1,
        "accuracy_docs": right, "accuracy_docs_norm": right, "base_accuracy_docs_norm": 0.5})


def test_correlations_by_scipy_and_by_hand():
    told = runs()
    table = choice_tasks.correlations(told)
    row = table.query("runs == 'all' and loss == 'loss_eval_1'").iloc[0]
    known = stats.pearsonr(told["loss_eval_1"], told["accuracy_docs_norm"])
    low, high = known.confidence_interval(0.95)
    assert (row["r"], row["low"], row["high"]) == pytest.approx((known.statistic, low, high))
    assert (row["models"], row["groups"], row["task"]) == (72, 6, "accuracy_docs_norm")
    left = [np.arctanh(stats.pearsonr(*part[["loss_eval_1", "accuracy_docs_norm"]].T.to_numpy())[0])
            for name in told["group"].unique() if len(part := told[told["group"] != name])]
    half = stats.t.isf(0.025, 5) * np.sqrt(5 / 6 * ((left - np.mean(left)) ** 2).sum())
    assert row["high_sources"] == pytest.approx(np.tanh(np.arctanh(known.statistic) + half))


def test_intervals_over_few_sources_and_of_no_variation_are_not_told():
    few = choice_tasks.correlations(runs(sources=4)).iloc[-1]
    assert np.isnan(few["high_sources"]) and np.isfinite(few["high"])
    still = choice_tasks.correlations(runs().assign(accuracy_docs_norm=0.5))
    assert still["r"].isna().all()


@pytest.mark.parametrize(("slope", "verdict"), [(-0.5, "docs: holds"), (0.5, "docs: does not hold"),
                                                (0.0, "docs: undecided")])
def test_the_claim_needs_both_losses_and_both_intervals(slope, verdict):
    table = choice_tasks.correlations(runs(slope=slope))
    assert choice_tasks.proxy_claim(table)["verdict"] == verdict


def test_a_correlation_that_a_few_damaged_models_carry_is_told_apart():
    broken = runs(seed=1, each=3).assign(purpose="dose", accuracy_docs_norm=0.2)
    for loss in ("loss_eval_1", "loss_eval_1_token"):
        broken[loss] += 3.0
    table = choice_tasks.correlations(pd.concat([runs(slope=0.0), broken]))
    claim = choice_tasks.proxy_claim(table)
    assert claim["verdict"] == "docs: holds over all models, undecided in the sweep alone"
    assert "all 90 models" in claim["ours"] and "the sweep's 72 models" in claim["ours"]


def test_without_tasks_the_claim_was_not_asked():
    assert choice_tasks.proxy_claim(pd.DataFrame())["verdict"] == NOT_ASKED
    plain = SimpleNamespace(find=lambda name: name, ledger_of=lambda found: SimpleNamespace(
        load=lambda: runs().filter(regex="^(?!.*accuracy)")))
    assert choice_tasks.models(plain).empty


def test_damage_is_held_against_the_clean_sets_question_by_question():
    marks = {"clean": "1111100000", "cut": "1100000000"}
    records = {kind: {"choices": {"docs": {"right_norm": marks[kind]}}} for kind in marks}
    study = SimpleNamespace(find=lambda name: name, ledger_of=lambda found: SimpleNamespace(
        read=records.__getitem__))
    table = pd.DataFrame({"run_id": ["clean", "cut"], "kind": ["clean", "cut"], "dose": [0.0, 1.0],
                          "loss_eval_1": [2.0, 2.2]})
    row = choice_tasks.damage_costs(study, table).iloc[0]
    assert (row["kind"], row["task"], row["loss"]) == ("cut", "docs", pytest.approx(0.1))
    assert (row["accuracy"], row["versus"], row["difference"]) == pytest.approx((0.2, 0.5, -0.3))
    assert row["high"] > 0 > row["low"]
    assert answered_right([records["cut"]], "docs").sum() == 2
