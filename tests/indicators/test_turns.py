"""Reading rows: what is wrong with one, surrogates, and the mean over turns."""

from __future__ import annotations

import math

import pytest
from tiny_models import single

from instructmining_core.indicators.turns import each_turn, mean_over_turns, read


@pytest.mark.parametrize("messages, problem", [
    (None, "messages is NoneType, not a list"),
    ("text", "messages is str, not a list"),
    ([], "no messages"),
    (["x"], "message 0 is str, not an object"),
    ([{"role": "robot", "content": "x"}], "message 0 has role 'robot'"),
    ([{"role": "user"}], "content of message 0 is NoneType, not text"),
    ([{"role": "user", "content": 3}], "content of message 0 is int, not text"),
    ([{"role": "user", "content": "x"}], "no assistant turn"),
])
def test_problems_are_named(messages, problem):
    found = read(messages)
    assert found.problem.startswith(problem) and found.ends == ()


def test_lone_surrogates_become_the_replacement_character_and_nul_stays():
    row = read(single("a\ud800b", "c\x00d\udfff é"))
    assert [m["content"] for m in row.messages] == ["a\ufffdb", "c\x00d\ufffd é"]


def test_turns_with_their_context():
    row = read(single("q1", "a1") + single("q2", "a2"))
    turns = list(each_turn([read([]), row]))
    assert [(t.row, t.index, t.response, len(t.context)) for t in turns] == [
        (1, 0, "a1", 1), (1, 1, "a2", 3)]


def test_mean_leaves_out_what_is_missing_and_says_which_turn():
    rows = [read(single("q", "a") + single("q", "b")), read([]), read(single("q", "c"))]
    column = mean_over_turns(rows, [4.0, math.nan, math.nan], ["", "empty response", "why"])
    assert column.values[0] == 4.0 and math.isnan(column.values[1]) and math.isnan(column.values[2])
    assert column.reasons == ["turn 2: empty response", "no messages", "why"]
    with pytest.raises(ValueError, match="2 values for 3 turns"):
        mean_over_turns(rows, [1.0, 2.0])
