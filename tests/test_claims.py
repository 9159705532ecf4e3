"""Verdicts from made-up results: the sentence, the numbers and the word must follow from them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

from instructmining_core import claims, paper


def test_percent_shows_sign_and_interval():
    assert claims.percent(-0.0123, -0.02, 0.004) == "-1.2 % [-2.0, +0.4]"


def test_overall_counts_when_pools_disagree():
    assert claims.overall(["better", "better"]) == "better"
    assert claims.overall(["better", "worse", "better"]) == "2 better, 1 worse"


def test_rule_claim_is_undecided_without_evidence():
    noise = SimpleNamespace(sd=0.01, low=0.008, high=0.014)
    null = np.linspace(0, 0.4, 101)
    weak = claims.rule_claim(None, SimpleNamespace(p=0.2, statistic=0.3, null=null), noise)
    strong = claims.rule_claim(None, SimpleNamespace(p=0.001, statistic=0.6, null=null), noise)
    assert (weak["verdict"], strong["verdict"]) == (claims.UNDECIDED, claims.HOLDS)
    assert "R² 0.38" in weak["detectable"]


def held(slope, r2, sources=9):
    frame = pd.DataFrame([r2, slope], index=["r2", "slope"], columns=["mean", "low", "high"])
    return frame.assign(sources=sources)


def test_transfer_claim_follows_the_intervals():
    assert claims.transfer_claim(held((1, 0.5, 1.5), (0.4, 0.1, 0.7)))["verdict"] == claims.HOLDS
    assert claims.transfer_claim(held((1, -0.5, 2.5), (0.1, -1, 1)))["verdict"] == claims.UNDECIDED
    assert claims.transfer_claim(held((-1, -2, -0.5), (-1, -2, 0)))["verdict"] == claims.FAILS
    few = claims.transfer_claim(held((1, 0.5, 1.5), (0.4, 0.1, 0.7), sources=1))
    assert few["verdict"] == claims.NOT_ASKED


def test_length_claim_takes_the_harder_end_of_length():
    def answer(difference, word):
        return SimpleNamespace(
            difference=difference, low=-0.03, high=0.01, answer=word,
            table=pd.DataFrame({"detectable": [0.004]}),
        )  # fmt: skip

    found = claims.length_claim({"longest": answer(-0.02, "yes"), "shortest": answer(0.0, "no")})
    assert found["verdict"] == "no"
    assert found["ours"].startswith("-2.0 % [-3.0, +1.0] against the longest rows; +0.0 %")


def test_dose_claim_names_harmful_and_helpful_kinds():
    effects = pd.DataFrame(
        {"low": [0.01, -0.02, -0.03], "high": [0.05, 0.02, -0.01]}, index=["a", "b", "c"]
    )
    found = claims.dose_claim(effects)
    assert found["ours"] == "the loss rises with the dose of: a"
    assert found["verdict"] == "1 of 3 kinds; c lower the loss"


def test_size_claim_compares_the_found_size_with_the_largest():
    means = pd.DataFrame({
        "method": "selected", "size": [50, 100], "mean": [4.0, 4.4],
        "low": [3.9, 4.3], "high": [4.1, 4.5],
    })  # fmt: skip
    found = claims.size_claim(means, best=50, rows=100)
    assert found["verdict"] == claims.HOLDS
    assert claims.size_claim(means, best=100, rows=100)["verdict"] == claims.UNDECIDED


def test_front_page_has_every_claim_and_the_answer():
    verdict = paper.claims().assign(ours="x | y", detectable="2 %", verdict="undecided")
    page = claims.front_page(verdict, "smoke", "tiny.")
    assert page.count("\n| ") == len(verdict) + 1
    assert "**Does the rule beat length alone?** Undecided: x | y." in page
    assert "x / y" in page


def test_every_claim_names_a_notebook_that_is_there():
    from instructmining_core.stages import notebooks

    numbers = {path.stem[:2] for path in notebooks()}
    assert set(paper.claims()["notebook"]) <= numbers


def test_papers_table_3_has_the_published_means():
    table = paper.table_3().set_index(["pool", "method", "size"])
    assert table.loc[("OpenOrca", "selected", 1000), "self_instruct"] == 0.958
    assert table.loc[("Dolly", "random", 10000), "mt_bench"] == 0.8086
    assert len(table) == 14
