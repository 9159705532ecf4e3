"""Verdicts from made-up results: the sentence, the numbers and the word must follow from them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from instructmining import claims, paper, reports
from instructmining_core.regression.inference import r2_detectable, r2_interval


def test_percent_shows_sign_and_interval():
    assert claims.percent(-0.0123, -0.02, 0.004) == "-1.2 % [-2.0, +0.4]"
    assert claims.percent(-0.0029, -0.0033, -0.0026) == "-0.29 % [-0.33, -0.26]"


def test_overall_counts_when_pools_disagree():
    assert claims.overall(["better", "better"]) == "better"
    assert claims.overall(["better", "worse", "better"]) == "2 better; 1 worse"


def test_rule_claim_is_undecided_without_evidence():
    noise = SimpleNamespace(sd=0.01, low=0.008, high=0.014)
    null = np.linspace(0, 0.4, 101)
    fit = SimpleNamespace(r2_beyond_controls=0.5, columns=tuple("abcde"),
                          df=40)
    weak = claims.rule_claim(fit, SimpleNamespace(p=0.2, null=null), noise)
    strong = claims.rule_claim(fit, SimpleNamespace(p=0.001, null=null), noise)
    assert (weak["verdict"], strong["verdict"]) == (claims.UNDECIDED, claims.HOLDS)
    low, high = r2_interval(0.5, 5, 40)
    assert f"R² 0.50 [{low:.2f}, {high:.2f}] beyond" in weak["ours"]
    assert f"an R² of {r2_detectable(0.38, 4, 41):.2f};" in weak["detectable"]


def held(slope, r2, sources=9):
    frame = pd.DataFrame([r2, slope], index=["r2", "slope"], columns=["mean", "low", "high"])
    return frame.assign(sources=sources)


def test_transfer_claim_follows_the_intervals():
    assert claims.transfer_claim(held((1, 0.5, 1.5), (0.4, 0.1, 0.7)))["verdict"] == claims.HOLDS
    assert claims.transfer_claim(held((1, -0.5, 2.5), (0.1, -1, 1)))["verdict"] == claims.UNDECIDED
    assert claims.transfer_claim(held((-1, -2, -0.5), (-1, -2, 0)))["verdict"] == claims.FAILS
    few = claims.transfer_claim(held((1, 0.5, 1.5), (0.4, 0.1, 0.7), sources=1))
    assert few["verdict"] == reports.NOT_ASKED


def answer(difference, word, detectable=0.004):
    return SimpleNamespace(
        difference=difference, low=-0.03, high=0.01, answer=word, detectable=detectable,
        low_prompts=-0.05, high_prompts=0.02,
    )  # fmt: skip


def test_length_claim_takes_the_harder_end_of_length():
    rows = {"longest": answer(-0.02, "yes"), "shortest": answer(0.0, "undecided", 0.006)}
    found = claims.length_claim(rows)
    assert found["verdict"] == "undecided"
    assert found["ours"].startswith(
        "-2.0 % [-3.0, +1.0] against the longest rows ([-5.0, +2.0] for other prompts); +0.0 %"
    )
    assert found["detectable"] == "0.6 % of the loss", "of the harder end, on the claim's own test"


def test_length_claim_names_both_budgets_where_they_differ():
    rows, tokens = {"longest": answer(-0.02, "yes")}, {"longest": answer(0.01, "undecided")}
    found = claims.length_claim(rows, tokens)
    assert found["verdict"] == "yes at equal rows; undecided at equal tokens"
    assert "at equal tokens +1.0 %" in found["ours"]
    assert claims.length_claim(rows, rows)["verdict"] == "yes"


def test_contrasts_claim_names_both_budgets_where_they_differ():
    table = pd.DataFrame({
        "budget": ["equal rows", "equal tokens"], "role": "primary", "pool": "p",
        "difference": [-0.02, 0.0], "low": [-0.03, -0.01], "high": [-0.01, 0.01],
        "detectable": [0.01, 0.02], "verdict": ["better", "undecided"],
    })  # fmt: skip
    found = claims.contrasts_claim(table)
    assert found["verdict"] == "at equal rows better; at equal tokens undecided"
    assert found["detectable"].endswith("at equal tokens 2.0 % of the loss")
    assert "other prompts" not in found["ours"], "where nobody looked"
    drawn = table.assign(low_prompts=[-0.04, -0.02], high_prompts=[-0.001, 0.02])
    assert "; for other prompts too 1 of 1 intervals leave out 0; at equal tokens" in (
        claims.contrasts_claim(drawn)["ours"]
    )
    refitted = table.iloc[:1].assign(method="refit", verdict="undecided").drop(columns="budget")
    both = claims.contrasts_claim(table, refitted)
    assert both["ours"].endswith("the rule refitted undecided, intervals from -3.0 to -1.0 %")
    assert both["verdict"] == found["verdict"]
    same = claims.contrasts_claim(table.assign(verdict="better"))
    assert same["verdict"] == "better"


def test_dose_claim_has_every_number_and_one_source_of_harm():
    effects = pd.DataFrame(
        {"slope": [0.03, 0.0, -0.02], "low": [0.01, -0.02, -0.03], "high": [0.05, 0.02, -0.01],
         "harms": [True, False, False], "df": 8}, index=["a", "b", "c"],
    )  # fmt: skip
    found = claims.dose_claim(effects)
    assert found["ours"] == ("change of the loss at a full dose: a +3.0 % [+1.0, +5.1]; "
                             "b +0.0 % [-2.0, +2.0]; c -2.0 % [-3.0, -1.0]")
    assert found["verdict"] == "1 of 3 kinds; c lower the loss"


def test_defects_claim_follows_the_interval_and_says_why():
    found = {"rival": "shortest", "difference": -0.06, "low": -0.08, "high": -0.04, "sources": 5,
             "rows": "unseen pool rows", "rule": 0.7, "rule_low": 0.6, "rule_high": 0.8,
             "kind": "repetitive", "kind_rule": 0.6, "kind_rival": 0.9, "kind_harms": False,
             "harmful": {"difference": 0.1, "low": 0.05, "high": 0.15}}
    worse = claims.defects_claim(found)
    assert worse["verdict"] == claims.FAILS
    assert "worse than taking the shortest row: -0.06 [-0.08, -0.04]; in repetitive, which" in (
        worse["ours"])
    assert "was not seen to harm the loss, the defective row is the longer one in 90 % of" in (
        worse["ours"])
    assert worse["ours"].endswith("that harm alone the difference is +0.10 [+0.05, +0.15]")
    assert claims.defects_claim({**found, "low": 0.01})["verdict"] == claims.HOLDS
    unsure = claims.defects_claim({**found, "high": 0.04})
    assert unsure["verdict"] == claims.UNDECIDED and "not told from" in unsure["ours"]


def test_detectable_shift_of_a_claim_has_80_per_cent_power():
    seen = claims._seen(-0.5, 0.5, 10)
    se = 0.5 / stats.t.isf(0.025, 10)
    assert stats.nct.sf(stats.t.isf(0.025, 10), 10, seen / se) == pytest.approx(0.8, abs=1e-6)
    assert np.isnan(claims._seen(np.nan, np.nan, 3))


@pytest.mark.parametrize("verdict, word", [
    ("better, and within ±1 %", claims.FAILS), ("within ±1 %", claims.HOLDS),
    ("worse", claims.HOLDS), ("undecided", claims.UNDECIDED),
])  # fmt: skip
def test_a_win_without_defects_is_one_that_defects_do_not_explain(verdict, word):
    pools = pd.DataFrame({"defects": [0.0, 0.5], "difference": -0.005, "low": -0.007,
                          "high": -0.003, "detectable": 0.004, "verdict": [verdict, "better"]})
    found = claims.clean_pool_claim(pools)
    assert found["verdict"] == word and "-0.5 % [-0.7, -0.3]" in found["ours"]
    assert claims.clean_pool_claim(pools.iloc[1:])["verdict"] == reports.NOT_ASKED


SIZES = pd.DataFrame({
    "method": "selected", "size": [50, 100], "n": 3, "mean": [4.0, 4.4],
    "low": [3.9, 4.3], "high": [4.1, 4.5],
})  # fmt: skip


def test_size_claim_compares_the_found_size_with_the_largest():
    found = claims.size_claim(SIZES, best=50, rows=100)
    assert found["verdict"] == claims.HOLDS
    assert "epochs are fixed" in found["ours"]
    largest = claims.size_claim(SIZES, best=100, rows=100)
    assert largest["verdict"] == claims.UNDECIDED and "no larger set" in largest["ours"]


def test_size_claim_could_have_seen_what_a_test_of_two_means_sees():
    half = np.hypot(np.log(4.1 / 4.0), np.log(4.5 / 4.4))
    se = half / stats.t.isf(0.025, 4)
    power = stats.nct.sf(stats.t.isf(0.025, 4), 4, np.log(1.1) / se)
    seen = float(claims.size_claim(SIZES, 50, 100)["detectable"].split()[0]) / 100
    at_seen = stats.nct.sf(stats.t.isf(0.025, 4), 4, np.log1p(seen) / se)
    assert at_seen == pytest.approx(0.8, abs=0.01) and power > at_seen


@pytest.mark.parametrize(
    ("tried", "limit", "early"), [([16, 50], 256, True), ([16, 50, 200], 256, False),
                                  ([16, 50, 100], 100, False), ([16, 50, 60], 256, True)],
)
def test_size_claim_is_undecided_where_the_search_ended_early(tried, limit, early):
    trials = pd.DataFrame({"size": tried})
    found = claims.size_claim(SIZES, 50, 100, trials, limit)
    assert found["verdict"].startswith("undecided: the search ended early") is early
    assert (f"no higher than {max(tried)} of the {limit}" in found["ours"]) is early


def test_bump_claim_could_have_seen_the_smallest_bump_with_80_percent_power():
    test = SimpleNamespace(rise=0.01, p=0.3, sd=0.01)
    found = claims.bump_claim(test, {2.0: 0.3, 3.0: 0.85, 5.0: 0.99})
    assert found["detectable"] == "a rise of 3.0 % of the loss (3 seed-sd)"
    weak = claims.bump_claim(test, {2.0: 0.3, 3.0: 0.41})
    assert weak["detectable"].startswith("no rise up to 3.0 % of the loss (3 seed-sd), where")


GOOD = pd.DataFrame([{"judge": "j", "check": "pandalm", "agreement": 0.8, "low": 0.7, "high": 0.9,
                      "verdict": "above chance"}])  # fmt: skip


def test_judge_claim_could_have_seen_what_its_own_test_sees():
    from instructmining_core.selection.judge import net_win_of_counts

    net = net_win_of_counts(34, 19, 27)
    values = np.repeat([1, 0, -1], [34, 19, 27])
    shift = net.detectable / stats.sem(values)
    assert stats.nct.sf(stats.t.isf(0.025, 79), 79, shift) == pytest.approx(0.8, abs=1e-3)
    assert claims.judge_claim(net, GOOD)["detectable"] == f"a net win of {net.detectable:.2f}"


def test_a_win_of_two_pairs_of_models_says_nothing_of_the_method():
    from instructmining_core.selection.judge import NetWin

    net = NetWin(0.25, 0.01, 0.49, 0.04, 40, 2, 0.1, "these models", 0.34)
    found = claims.judge_claim(net, GOOD)
    assert found["verdict"] == "holds, for these models"
    assert found["ours"] == (
        "net win +0.25 [+0.01, +0.49], of these models, 2 pairs on 40 prompts; the judge is above "
        "chance on pandalm, agreement 0.80 [0.70, 0.90]")
    method = replace(net, pairs=3, scope="the method")
    assert claims.judge_claim(method, GOOD)["verdict"] == "holds"


def test_a_judge_at_chance_or_unchecked_judges_nothing():
    from instructmining_core.selection.judge import NetWin

    net = NetWin(0.25, 0.01, 0.49, 0.04, 40, 5, 0.1, "the method", 0.34)
    weak = GOOD.assign(check="llmbar", agreement=0.52, low=0.45, high=0.59, verdict="at chance")
    for checks in (pd.concat([GOOD, weak]), GOOD[:0]):
        found = claims.judge_claim(net, checks)
        assert found["verdict"] == claims.NOT_JUDGED and "0.25" not in found["ours"]
    assert "llmbar" in claims.judge_claim(net, pd.concat([GOOD, weak]))["ours"]


def test_every_claim_names_a_notebook_that_is_there():
    from instructmining.book import notebooks

    numbers = {path.stem[:2] for path in notebooks()}
    assert set(paper.claims()["notebook"]) <= numbers


def test_papers_table_3_has_the_published_means():
    table = paper.table_3().set_index(["pool", "method", "size"])
    assert table.loc[("OpenOrca", "selected", 1000), "self_instruct"] == 0.958
    assert table.loc[("Dolly", "random", 10000), "mt_bench"] == 0.8086
    assert len(table) == 14
