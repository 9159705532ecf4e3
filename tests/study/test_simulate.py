"""Acceptance of statistics.md, sections 1, 4 and 5, with few studies and bounds to match.

The full version: python -m bench.acceptance --full table.csv
"""

import numpy as np
import pandas as pd
import pytest

from bench import acceptance
from bench.studies import (
    coverage,
    design_comparison,
    permutation_size,
    planner_band,
    pure_noise,
)
from instructmining import tables
from instructmining.paper import R_SQUARED
from instructmining.tables import null_r2


def test_the_papers_r2_lies_in_the_null_of_its_own_design():
    null = null_r2(4, 150, 1)
    assert 0.27 <= null["r2"].median() <= 0.60
    assert (null["r2"] > R_SQUARED).mean() > 0.2
    assert null["all_significant"].mean() > 0.6
    assert null["repeat_rank_correlation"].median() < 0.5
    assert null["first_three"].median() > 0.98 and null["vif"].median() > 20


def test_more_sources_give_more_dimensions_but_no_cure():
    few, many = (null_r2(s, 60, 2) for s in (4, 12))
    assert many["first_three"].median() < 0.9 < few["first_three"].median()
    assert many["r2"].median() > 0.1
    assert many["all_significant"].mean() > 0.3


def test_null_r2_is_seeded_and_without_source_effects_is_small(monkeypatch):
    assert null_r2(4, 3, 5).equals(null_r2(4, 3, 5))
    monkeypatch.setattr(tables, "SOURCE_SD", 0.0)
    assert null_r2(4, 40, 5)["r2"].median() < 0.12


def test_choosing_four_of_nine_from_noise():
    noise = pure_noise(400, 1)
    assert noise["r2"].median() == pytest.approx(0.06, abs=0.02)
    assert 0.3 < noise["any_significant"].mean() < 0.65


def test_intervals_cover():
    found = coverage(4, 60, 1).mean()
    assert 0.94 <= found["hc3"] <= 0.985
    assert found["hc3_uneven"] >= 0.90
    assert 0.93 <= found["jackknife"] <= 0.995


def test_h0b_keeps_its_level_and_h0a_does_not():
    found = permutation_size(4, 40, 3, 99)
    # 160 studies at 5 %: 99.9 % of such simulations reject 0.6 % to 12 %
    assert 0.006 <= found["h0b"].mean() <= 0.12
    assert found["h0a"].mean() > 0.9


def test_tilted_sets_find_what_fusion_cannot():
    both = design_comparison(4, 15, 1)
    median = both.groupby("design").median(numeric_only=True)
    tilted, fused = median.loc["designed with shares"], median.loc["fusion with shares"]
    assert tilted["rank_correlation"] >= 0.85
    assert median.loc["fusion, paper's procedure", "rank_correlation"] < 0.8
    assert tilted["half_width"] <= 0.25 * fused["half_width"]
    covered = both.groupby("design")["coverage"].mean()
    assert covered["designed with shares"] > 0.93 > covered["fusion, nine terms"] + 0.03


def test_the_planners_band_holds():
    # 200 studies: a true 80 % gives 0.71 to 0.88 in 99.7 % of simulations
    assert 0.71 <= planner_band(200, 1)["classical"].mean() <= 0.88


def test_the_command_writes_its_table_and_fails_where_a_figure_fails(tmp_path, monkeypatch):
    good = acceptance.judged([("a", 0.5, (0.0, 1.0), "0.4"), ("b", 2.0, None, "")])
    assert good["passed"].tolist() == [True, None]
    monkeypatch.setattr(acceptance, "table", lambda size, seed: good)
    assert acceptance.command([str(tmp_path / "t.csv"), "--full"]) == 0
    assert pd.read_csv(tmp_path / "t.csv")["value"].tolist() == [0.5, 2.0]
    bad = acceptance.judged([("a", 1.5, (0.0, 1.0), "")])
    monkeypatch.setattr(acceptance, "table", lambda size, seed: bad)
    assert acceptance.command([str(tmp_path / "t.json")]) == 1
    assert np.isfinite(pd.read_json(tmp_path / "t.json")["value"]).all()
