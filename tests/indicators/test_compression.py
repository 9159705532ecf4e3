"""Compression ratio on known texts."""

from __future__ import annotations

import math
import zlib

from tiny_models import single

from instructmining_core.indicators.surface import compute_compression, ratio
from instructmining_core.indicators.turns import read


def test_repetition_compresses_and_the_ratio_is_bytes_over_bytes():
    text = "naïve " * 100
    assert ratio(text) == len(text.encode()) / len(zlib.compress(text.encode(), 6))
    assert ratio(text) > 20 > 2 > ratio("The quick brown fox jumps over the lazy dog.")


def test_empty_is_nan_with_a_reason():
    column = compute_compression([read(single("q", "")), read(single("q", "abc"))])["compression"]
    assert math.isnan(column.values[0]) and column.reasons == ["empty response", ""]
    assert column.values[1] == 3 / len(zlib.compress(b"abc", 6))
