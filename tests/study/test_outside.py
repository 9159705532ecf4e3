"""Agreement with what others chose: the areas are right, and so are their intervals."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from instructmining.experiments import outside
from instructmining.profile import OutsideConfig
from instructmining_core.regression.rule_card import load_rule


def test_the_mean_placement_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    order, chosen = rng.integers(0, 8, 300).astype(float), rng.random(300) < 0.2
    first, second = outside.placements(order, chosen)
    wanted = roc_auc_score(chosen, -order)  # the lowest is preferred
    assert first.mean() == pytest.approx(wanted) == second.mean()
    assert (len(first), len(second)) == (chosen.sum(), (~chosen).sum())


@pytest.mark.parametrize("against", [False, True])
def test_intervals_cover_the_truth(against):
    """Two normal scores with known areas, alike in part; 400 studies."""
    rng, covered, shifts = np.random.default_rng(1), 0, np.array([0.8, 0.5])
    true = norm.cdf(shifts / np.sqrt(2))
    for _ in range(400):
        chosen = rng.random(250) < 0.2
        scores = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 250)
        own, rival = (scores - np.outer(chosen, shifts)).T
        _, low, high = outside.agreement(own, chosen, rival if against else None)
        covered += low <= (true[0] - true[1] if against else true[0]) <= high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.fixture
def scores():
    rng = np.random.default_rng(2)
    names = [one.name for one in load_rule("v3").coefficients]
    table = pd.DataFrame(rng.normal(1, 0.3, (200, len(names))), columns=names)
    return table.assign(len_out=rng.integers(5, 90, 200), ifd=rng.uniform(0.2, 1.2, 200),
                        row=np.arange(200), ppl=rng.uniform(2, 60, 200))  # fmt: skip


def test_what_chose_by_length_is_found_by_length(scores):
    chosen = {"long": (scores["len_out"] > 60).to_numpy(), "any": np.arange(200) % 5 == 0}
    table = outside.chosen_by_others(scores, chosen, {"v3": load_rule("v3")})
    table = table.set_index(["selection", "by"])
    assert table.loc[("long", "longest"), ["auc", "low", "high"]].tolist() == [1, 1, 1]
    assert table.loc[("long", "v3"), "beyond_high"] < 0
    assert table.loc["any"].eval("low < 0.5 < high").all()
    assert (table["rows"] == 200).all() and table.loc["any", "chosen"].eq(40).all()
    assert set(table.index.get_level_values("by")) == {"v3", *outside.RIVALS}


def test_an_ifd_of_one_and_more_comes_last(scores):
    order = outside.orders(scores, {})["ifd"]
    assert order[scores["ifd"] >= 1].min() > order[scores["ifd"] < 1].max()


def test_pairs_are_counted_with_ties_as_halves(scores):
    worse = scores.assign(len_out=scores["len_out"] - np.resize([1, 0, -1, 1], 200))
    table = outside.preferred_by_experts(scores, worse, {}).set_index("by")
    assert table.loc["longest", ["right", "beyond", "pairs"]].tolist() == [0.625, 0, 200]
    assert table.loc["ifd", "right"] == 0.5 and table.loc["ifd", "low"] == 0.5


def test_a_published_selection_is_its_records(tmp_path, monkeypatch, scores):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    with gzip.open(tmp_path / "index.json.gz", "wt") as stream:
        json.dump({"one": [3, 5, 999], "other": []}, stream)
    config = OutsideConfig(of="a", index="index.json.gz", names=("one",))
    study = SimpleNamespace(profile=SimpleNamespace(outside=config,
                                                    data=SimpleNamespace(folder="")))
    found = outside.published_selections(study, scores)
    assert list(found) == ["one"] and np.flatnonzero(found["one"]).tolist() == [3, 5]
