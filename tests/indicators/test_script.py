"""Scripts by the names of letters."""

from __future__ import annotations

import math

import pytest
from tiny_models import single

from instructmining_core.indicators.surface import (
    compute_script,
    count_scripts,
    dominant,
    latin_share,
)
from instructmining_core.indicators.turns import read


@pytest.mark.parametrize("text, script", [
    ("plain English", "LATIN"), ("naïve Übung", "LATIN"), ("Привет", "CYRILLIC"),
    ("γειά σου", "GREEK"), ("你好", "CJK"), ("こんにちは", "HIRAGANA"), ("שלום", "HEBREW"),
    ("안녕하세요", "HANGUL"), ("नमस्ते", "DEVANAGARI"), ("ｆｕｌｌ", "LATIN"), ("123 !?", ""),
])
def test_dominant(text, script):
    assert dominant(text) == script


def test_share_counts_letters_only():
    assert latin_share("ab 12 你好") == 0.5
    assert count_scripts("aab я") == {"LATIN": 3, "CYRILLIC": 1}
    assert latin_share("abc!") == 1.0 and math.isnan(latin_share("12\x00"))


def test_column_has_a_reason_without_letters():
    column = compute_script([read(single("q", "42")), read(single("q", "да yes"))])["script"]
    assert column.reasons == ["no letter in the response", ""]
    assert column.values[1] == pytest.approx(0.6)
