"""The gate's plan without a model: parts of a pool, matched rows, equal steps, order, numbers."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from instructmining import plan
from instructmining.design import interleaved, of_sources
from instructmining.experiments import gate
from instructmining.profile import SelectionConfig, load_profile
from instructmining_core.config import FinetuneConfig, InstructMiningError
from instructmining_core.regression.rule_card import load_rule
from instructmining_core.selection.select import choose_rows


def study_of(rows: int, **selection):
    scores = pd.DataFrame({"row_hash": [f"h{i}" for i in range(rows)], "source": "s"})
    profile = SimpleNamespace(selection=SelectionConfig(**selection), data=SimpleNamespace(seed=1))
    return SimpleNamespace(profile=profile, pool_scores=lambda pool: scores)


def test_parts_are_disjoint_where_rows_allow_and_half_samples_else():
    repeats = dict(redraws=True, size=5, seeds=3, draws=3, refits=0)
    kind, parts = gate.pool_parts(study_of(151, **repeats), "p")
    assert kind == "disjoint part" and [len(part) for part in parts] == [50] * 3
    assert not set(parts[0]["row_hash"]) & set(parts[1]["row_hash"])
    kind, parts = gate.pool_parts(study_of(149, **repeats), "p")
    assert kind == "half-sample" and [len(part) for part in parts] == [74] * 3
    shared = set(parts[0]["row_hash"]) & set(parts[1]["row_hash"])
    assert 20 < len(shared) < 55, "half of a half, not the same rows"
    again = gate.pool_parts(study_of(149, **repeats), "p")[1]
    assert all(a.equals(b) for a, b in zip(parts, again, strict=True))
    kind, parts = gate.pool_parts(study_of(149, size=5, seeds=2, draws=2), "p")
    assert kind == "whole pool" and all(len(part) == 149 for part in parts)


def test_matched_rows_are_alike_in_all_of_length_and_no_row_twice():
    rng = np.random.default_rng(0)
    part = pd.DataFrame({"row_hash": [f"h{i}" for i in range(600)]})
    lengths = pd.DataFrame({"answer": rng.lognormal(4, 0.8, 600),
                            "prompt": rng.lognormal(3, 0.5, 600),
                            "whole": rng.random(600) > 0.2}, index=part["row_hash"])  # fmt: skip
    long = part[lengths["answer"].gt(70).to_numpy() & lengths["prompt"].lt(20).to_numpy()].iloc[:40]
    matched = gate.matched_rows(part, long, lengths, seed=3)
    assert len(matched) == 40 and matched["row_hash"].is_unique
    own, found = lengths.loc[long["row_hash"]], lengths.loc[matched["row_hash"]]
    assert own["whole"].sum() == found["whole"].sum()
    long_ones, some, plain = (np.log(one[["answer", "prompt"]]).mean()
                              for one in (own, found, lengths))  # fmt: skip
    assert ((long_ones - some).abs() < 0.25 * (long_ones - plain).abs()).all(), "most of it is gone"
    assert len(set(matched["row_hash"]) & set(long["row_hash"])) < 30
    other = gate.matched_rows(part, long, lengths, seed=4)
    assert set(other["row_hash"]) != set(matched["row_hash"])


@pytest.mark.parametrize("rows,batch", [(96, 16), (100, 17), (61, 11), (40, 7), (200, 34)])
def test_equal_tokens_take_equal_steps(rows, batch):
    usual = FinetuneConfig(batch_size=16, epochs=2)
    same = gate.same_steps(usual, rows, 96)
    assert same.batch_size == batch and same.steps(rows) == usual.steps(96) == 12


def test_every_prefix_holds_each_group_in_proportion():
    plans = ["f"] * 129 + ["a"] * 8 + ["b"] * 8 + ["m"] * 24 + ["x"] * 2
    order = interleaved(list(enumerate(plans)), lambda one: one[1])
    assert sorted(order) == list(enumerate(plans))
    whole = Counter(plans)
    for n in range(1, len(order) + 1):
        part = Counter(name for _, name in order[:n])
        assert all(abs(part[g] - n * whole[g] / len(plans)) <= 1.5 for g in whole), (n, part)
    for group in whole:
        own = [i for i, name in order if name == group]
        assert own == sorted(own), "a group keeps its own order"


def test_an_unknown_source_is_named():
    rows = pd.DataFrame({"source": ["a", "b"]})
    assert of_sources(rows, ()).equals(rows) and len(of_sources(rows, ("b",))) == 1
    with pytest.raises(InstructMiningError, match="no row is of source 'c'; there are a, b"):
        of_sources(rows, ("a", "c"))


def test_the_worst_rows_and_the_instructions_hardest_to_follow():
    scores = pd.DataFrame({
        "row_hash": [f"h{i}" for i in range(6)], "ifd": [0.2, 1.3, 0.9, np.nan, 0.5, 1.0],
        "reward": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "naturalness": 0.5, "coherence": 0.5,
        "understandability": 0.5,
    })  # fmt: skip
    assert choose_rows(scores, "ifd", 2)["row_hash"].tolist() == ["h2", "h4"]  # below 1 only
    rule = load_rule("v3")
    best, worst = (choose_rows(scores, m, 6, rule=rule)["row_hash"].tolist()
                   for m in ("selected", "worst"))  # fmt: skip
    assert worst == best[::-1] and best[0] == "h5"


def test_the_replication_is_as_large_as_it_says():
    profile = load_profile("replication")
    sources, pools = len(profile.data.sources), len(profile.data.pools_of)
    counts = {stage: plan.expected_runs(profile, stage, sources, pools) for stage in plan.STAGES}
    assert (sources, pools) == (11, 8)
    assert (counts["regime"], counts["dose"], counts["sweep"]) == (108, 48, 129 + 72 + 24 + 16)
    assert 230 <= counts["gate"] + counts["refit"] <= 290
    models = profile.models.roles().values()
    assert {ref.dtype for ref in models} == {"float32"}
    named = {source.name for source in profile.data.sources}
    assert set(profile.data.pools_of) | set(profile.design.fusion_sources) <= named
    assert len(profile.design.fusion_sources) == 4, "the paper's four kinds"
