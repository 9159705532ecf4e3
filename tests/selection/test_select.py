"""Ranking, top-k and the baselines, on tables small enough to read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection.select import (
    BASELINES,
    choose_rows,
    choose_tokens,
    rank,
    select,
    top_rows,
)


def rule(auto_size=None, **slopes):
    data = {
        "schema": "instructmining.rule/1", "kind": "within", "intercept": 1.0,
        "coefficients": [
            {"name": name, "estimate": slope, "interval_these_sources": None,
             "interval_new_sources": None, "vif": None, "range": None}
            for name, slope in slopes.items()
        ],
        "standardisation": None, "held_out": [], "permutation_p": None, "models": [],
        "knn_reference": None, "fitted_on": "a test", "not_for": "anything else",
    }  # fmt: skip
    return RuleCard.from_dict({**data, "auto_size": auto_size})


def table(values, **columns):
    n = len(values)
    return pd.DataFrame({
        "id": [f"r{i}" for i in range(n)], "source": "s", "file": "f", "row": range(n),
        "row_hash": [f"h{i}" for i in range(n)], "len_out": values, "reasons": "", **columns,
    })  # fmt: skip


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def texts_in(records):
    """Conversations of rows, looked up in a table with `messages`."""
    by_id = records.set_index("id")["messages"]
    return lambda rows: by_id.loc[rows["id"]].tolist()


def different(rows):
    return [talk(f"question {i}", "yes") for i in rows["id"]]


def words_of(rows):
    return rows["len_out"]


WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
LONG = " ".join(WORDS)


def test_the_lowest_predicted_loss_ranks_first():
    ranked = rank(table([3.0, 1.0, 2.0]), rule(len_out=-0.1))
    assert ranked["id"].tolist() == ["r0", "r2", "r1"]
    assert ranked["score"].tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert ranked["rank"].tolist() == [1, 2, 3]
    assert ranked["percentile"].tolist() == pytest.approx([100, 200 / 3, 100 / 3])


def test_ties_keep_the_order_of_the_table():
    ranked = rank(table([2.0, 1.0, 2.0, 1.0]), rule(len_out=1.0))
    assert ranked["id"].tolist() == ["r1", "r3", "r0", "r2"]


def test_rows_without_a_score_come_last_with_their_reason():
    scores = table([np.nan, 1.0, np.nan, np.inf])
    scores.loc[0, "reasons"] = '{"len_out": "empty response"}'
    scores.loc[2, "reasons"] = '{"row": "x.jsonl, line 3: expected JSON"}'
    ranked = rank(scores, rule(len_out=1.0))
    assert ranked["id"].tolist() == ["r1", "r0", "r2", "r3"]
    assert ranked["reason"].tolist() == [
        "", "len_out: empty response", "x.jsonl, line 3: expected JSON", "len_out: no value",
    ]  # fmt: skip
    assert ranked["rank"].isna().tolist() == [False, True, True, True]


def test_rank_keeps_what_made_the_scores():
    scores = table([1.0])
    scores.attrs["indicators"] = {"len_out": {"version": "1"}}
    assert rank(scores, rule(len_out=1.0)).attrs == scores.attrs


def test_select_keeps_the_best_and_names_every_other_row():
    records = table([4.0, 1.0, 2.0, np.nan, 3.0])
    records["messages"] = [talk("q", LONG), talk("p", "short"), talk("Q!", LONG.upper()),
                           talk("", ""), talk("other", "words")]  # fmt: skip
    found = select(records, rule(len_out=1.0), 2, texts_in(records))
    assert found.kept["id"].tolist() == ["r1", "r2"]
    dropped = found.dropped.set_index("id")
    assert dropped["why"].to_dict() == {"r3": "no score"}
    assert found.counts() == {
        "rows": 5, "kept": 2, "no score": 1, "near duplicate": 0, "below the cut": 2,
    }  # fmt: skip
    more = select(records, rule(len_out=1.0), 4, texts_in(records))
    assert more.kept["id"].tolist() == ["r1", "r2", "r4"], "fewer than asked where there are none"
    twin = more.dropped.set_index("id").loc["r0"]
    assert twin["why"] == "near duplicate"
    assert twin["reason"] == "near duplicate of r2, which ranks 2"


def test_exact_duplicates_go_by_hash():
    scores = table([1.0, 2.0, 3.0], row_hash=["a", "a", "b"])
    assert select(scores, rule(len_out=1.0), 2, different).kept["id"].tolist() == ["r0", "r2"]


def test_unread_rows_are_not_duplicates_of_each_other():
    scores = table([1.0, 2.0], row_hash=["", ""])
    assert len(select(scores, rule(len_out=1.0), 2, different).kept) == 2


def test_texts_are_asked_for_from_the_best_on_and_no_further(monkeypatch):
    monkeypatch.setattr("instructmining_core.selection.select.BATCH_ROWS", 2)
    asked = []

    def fetch(rows):
        asked.extend(rows["id"])
        return [talk(f"question {i}", "same answer") for i in rows["id"]]

    select(table([5.0, 4.0, 3.0, 2.0, 1.0]), rule(len_out=1.0), 1, fetch)
    assert asked == ["r4", "r3"]


def test_nothing_to_select_is_an_error():
    with pytest.raises(InstructMiningError, match="none of the 1 rows has a score.*no value"):
        select(table([np.nan]), rule(len_out=1.0), 1, different)


def test_auto_is_the_size_on_the_card():
    assert top_rows(rule(auto_size=7, len_out=1.0), "auto") == 7
    assert top_rows(rule(len_out=1.0), 3) == 3
    with pytest.raises(InstructMiningError, match="search the size"):
        top_rows(rule(len_out=1.0), "auto")
    for wrong in (0, -1, 1.5, True, "many"):
        with pytest.raises(InstructMiningError, match="top_k"):
            top_rows(rule(len_out=1.0), wrong)


POOL = dict(
    ppl=[5.0, np.nan, 2.0, 9.0], reward=[0.1, 0.9, 0.5, 0.2], compression=[1.0, 3.0, 2.0, 0.5],
    ifd=[0.5, 0.9, 0.7, 1.2],
)


def test_baselines_take_the_right_end_of_each_column():
    pool = table([10.0, 40.0, 20.0, 30.0], **POOL)
    found = {name: choose_rows(pool, name, 2, seed=1)["id"].tolist()
             for name in ("random", *BASELINES, "full")}
    assert found["longest"] == ["r1", "r3"]
    assert found["lowest_ppl"] == ["r2", "r0"], "a row without a value is not the lowest"
    assert found["reward"] == ["r1", "r2"]
    assert found["compression"] == ["r3", "r0"]
    assert found["full"] == ["r0", "r1", "r2", "r3"]
    assert len(set(found["random"])) == 2
    assert found["shortest"] == ["r0", "r2"]
    assert choose_rows(pool, "worst", 2, rule=rule(len_out=1.0))["id"].tolist() == ["r1", "r3"]


def test_choose_selected_is_the_ranking():
    pool = table([10.0, 40.0, np.nan, 30.0])
    assert choose_rows(pool, "selected", 2, rule=rule(len_out=-1.0))["id"].tolist() == ["r1", "r3"]
    with pytest.raises(InstructMiningError, match="needs a rule"):
        choose_rows(pool, "selected", 2)
    with pytest.raises(InstructMiningError, match="can choose 3 rows, 4 were asked for"):
        choose_rows(pool, "selected", 4, rule=rule(len_out=-1.0))


def test_random_draws_repeat_with_their_seed_only():
    pool = table(np.arange(100.0))
    first = choose_rows(pool, "random", 10, seed=3)["id"].tolist()
    assert choose_rows(pool, "random", 10, seed=3)["id"].tolist() == first
    assert choose_rows(pool, "random", 10, seed=4)["id"].tolist() != first
    assert len(set(first)) == 10


def test_choose_counts_duplicates_once_and_unread_rows_not_at_all():
    pool = table([1.0, 2.0, 3.0, 4.0], row_hash=["a", "a", "b", ""])
    assert choose_rows(pool, "full", 0)["id"].tolist() == ["r0", "r2"]
    assert sorted(choose_rows(pool, "random", 2)["id"]) == ["r0", "r2"]


def test_unknown_methods_and_columns_are_told():
    with pytest.raises(InstructMiningError, match="unknown method 'best'; known: selected, worst"):
        choose_rows(table([1.0]), "best", 1)
    with pytest.raises(InstructMiningError, match="needs the column 'ppl'"):
        choose_rows(table([1.0]), "lowest_ppl", 1)


def test_choose_tokens_comes_as_near_as_a_whole_row_can():
    pool = table([5.0, 40.0, 20.0, 30.0, 7.0])

    def chosen(method, tokens):
        return choose_tokens(pool, method, tokens, tokens_of=words_of)["id"].tolist()

    assert chosen("longest", 60) == ["r1", "r3"], "70, not 40 or 90"
    assert chosen("longest", 54) == ["r1"], "40 is nearer than 70"
    assert chosen("shortest", 31) == ["r0", "r4", "r2"]
    assert chosen("shortest", 1) == ["r0"], "one row at least"


def test_choose_tokens_counts_the_tokens_that_it_is_given_and_no_more_than_needed():
    rng = np.random.default_rng(0)
    pool = table(rng.permutation(1000).astype(float))
    cost = dict(zip(pool["row_hash"], rng.integers(5, 90, 1000), strict=True))
    asked = []

    def tokens_of(rows):
        asked.extend(rows["row_hash"])
        return [cost[own] for own in rows["row_hash"]]

    for wanted in (40, 5_000, 9_000):
        asked.clear()
        found = choose_tokens(pool, "random", wanted, seed=3, tokens_of=tokens_of)
        draw = choose_rows(pool, "random", 1000, seed=3)["row_hash"].tolist()
        totals = [sum(cost[own] for own in draw[: k + 1]) for k in range(1000)]
        best = min(range(1000), key=lambda k: abs(totals[k] - wanted))
        assert found["row_hash"].tolist() == draw[: best + 1]
        assert len(asked) == len(set(asked)) <= 4 * (best + 64)


def test_choose_tokens_says_where_there_are_too_few():
    with pytest.raises(InstructMiningError, match="rows of 3 target tokens, 9 were asked for"):
        choose_tokens(table([1.0, 2.0]), "longest", 9, tokens_of=words_of)
    with pytest.raises(InstructMiningError, match=" 0 were asked for"):
        choose_tokens(table([1.0]), "longest", 0, tokens_of=words_of)
