"""What is read off the text: lengths, compression, script and turns, on texts with known values."""

from __future__ import annotations

import math
import zlib

import pytest
from tiny_models import single

from instructmining_core.indicators.surface import (
    compute_compression,
    compute_length,
    compute_script,
    compute_turns,
    count_scripts,
    count_tokens,
    count_words,
    latin_share,
    ratio,
)
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
    options = {"add_special_tokens": False, "split_special_tokens": True}
    fast = count_tokens(texts, tiny_tokenizer, **options)
    assert [n for n, t in zip(fast, texts, strict=True) if "</s>" not in t] == slow
    assert fast[2] > slow[0]  # "</s>" is not one special token
    columns = compute_length([read(CHAT[1:3])], tiny_tokenizer)
    assert columns["len_out"].values[0] == count_tokens(
        ["Hello!"], tiny_tokenizer, **options)[0]


def test_rows_that_cannot_be_read_are_nan():
    column = compute_length([read(None), read(CHAT[:2])])["len_in"]
    assert column.reasons == ["messages is NoneType, not a list", "no assistant turn"]
    assert column.values.tolist() != column.values.tolist()  # NaN


def test_repetition_compresses_and_the_ratio_is_bytes_over_bytes():
    text = "naïve " * 100
    assert ratio(text) == len(text.encode()) / len(zlib.compress(text.encode(), 6))
    assert ratio(text) > 20 > 2 > ratio("The quick brown fox jumps over the lazy dog.")


def test_the_compression_of_nothing_is_nan_with_a_reason():
    column = compute_compression([read(single("q", "")), read(single("q", "abc"))])["compression"]
    assert math.isnan(column.values[0]) and column.reasons == ["empty response", ""]
    assert column.values[1] == 3 / len(zlib.compress(b"abc", 6))


@pytest.mark.parametrize("text, script", [
    ("plain English", "LATIN"), ("naïve Übung", "LATIN"), ("Привет", "CYRILLIC"),
    ("γειά σου", "GREEK"), ("你好", "CJK"), ("こんにちは", "HIRAGANA"), ("שלום", "HEBREW"),
    ("안녕하세요", "HANGUL"), ("नमस्ते", "DEVANAGARI"), ("ｆｕｌｌ", "LATIN"), ("123 !?", ""),
])
def test_the_script_of_letters(text, script):
    assert [name for name, _ in count_scripts(text).most_common(1)] == [script] * bool(script)


def test_share_counts_letters_only():
    assert latin_share("ab 12 你好") == 0.5
    assert count_scripts("aab я") == {"LATIN": 3, "CYRILLIC": 1}
    assert latin_share("abc!") == 1.0 and math.isnan(latin_share("12\x00"))


def test_column_has_a_reason_without_letters():
    column = compute_script([read(single("q", "42")), read(single("q", "да yes"))])["script"]
    assert column.reasons == ["no letter in the response", ""]
    assert column.values[1] == pytest.approx(0.6)


def test_turns_are_counted():
    column = compute_turns([read(single("q", "a") * 3), read(single("q", "")), read([])])["turns"]
    assert column.values[:2].tolist() == [3.0, 1.0] and math.isnan(column.values[2])
    assert column.reasons == ["", "", "no messages"]
