"""Turns are counted; a row without one is NaN."""

from __future__ import annotations

import math

from tiny_models import single

from instructmining_core.indicators.surface import compute_turns
from instructmining_core.indicators.turns import read


def test_turns():
    column = compute_turns([read(single("q", "a") * 3), read(single("q", "")), read([])])["turns"]
    assert column.values[:2].tolist() == [3.0, 1.0] and math.isnan(column.values[2])
    assert column.reasons == ["", "", "no messages"]
