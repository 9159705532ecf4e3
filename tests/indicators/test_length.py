"""Lengths by tokenizer and by words, over turns."""

from __future__ import annotations

from instructmining_core.indicators.surface import compute_length, count_tokens, count_words
from instructmining_core.indicators.turns import read

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": ""},
]


def test_words_and_marks():
    assert count_words(["It's 3.5, no?", "", "你好 world"]) == [9, 0, 2]


def test_mean_over_turns_of_what_was_newly_said():
    columns = compute_length([read(CHAT)])
    # turn 1: "Be brief." 3 + "Hi there" 2 = 5; turn 2: "Bye" 1
    assert columns["len_in"].values.tolist() == [3.0]
    assert columns["len_out"].values.tolist() == [1.0]  # "Hello!" 2, "" 0


def test_tokens_equal_one_call_a_text(tiny_tokenizer):
    texts = ["Return the list", "", "</s> is text here", "naïve 你"]
    slow = [len(tiny_tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids)
            for t in texts if "</s>" not in t]
    fast = count_tokens(texts, tiny_tokenizer)
    assert [n for n, t in zip(fast, texts, strict=True) if "</s>" not in t] == slow
    assert fast[2] > slow[0]  # "</s>" is not one special token
    columns = compute_length([read(CHAT[1:3])], tiny_tokenizer)
    assert columns["len_out"].values[0] == count_tokens(["Hello!"], tiny_tokenizer)[0]


def test_rows_that_cannot_be_read_are_nan():
    column = compute_length([read(None), read(CHAT[:2])])["len_in"]
    assert column.reasons == ["messages is NoneType, not a list", "no assistant turn"]
    assert column.values.tolist() != column.values.tolist()  # NaN
