"""A rule that the package brings along, and the reference rows that come with it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from instructmining import book
from instructmining.cli.score import reference_of
from instructmining_core.config import InstructMiningError
from instructmining_core.indicators.neighbours import Reference
from instructmining_core.regression import rule_card


@pytest.fixture
def reference():
    vectors = np.random.default_rng(0).normal(size=(40, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Reference(tuple(f"{i:032x}" for i in range(40)), vectors, "m", "r", "float32")


@pytest.fixture
def shipped(tmp_path, monkeypatch, reference):
    """Ships a study's rule into a folder of its own; its argument: the hash on the card."""
    for module in (book, rule_card):
        monkeypatch.setattr(module, "RULES", tmp_path / "rules")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rule.json").write_text("the card")

    def ship(hash_on_card):
        card = SimpleNamespace(knn_reference=hash_on_card and SimpleNamespace(hash=hash_on_card))
        study = SimpleNamespace(name="mine", find=lambda name: tmp_path / name,
                                scorer=lambda: SimpleNamespace(reference=reference))
        monkeypatch.setattr(book, "load_rule", lambda path: card)
        monkeypatch.setattr("instructmining.study.Study.open", lambda name: study)
        book.ship("mine")
        return tmp_path / "rules"

    return ship


def test_a_profile_whose_rule_is_shipped_needs_no_data(shipped, reference, monkeypatch):
    folder = shipped(reference.hash)
    assert rule_card.presets() == ["mine"] and (folder / "mine.json").read_text() == "the card"
    monkeypatch.setattr("instructmining.cli.score.opened_study",
                        lambda name: pytest.fail("the study's data were asked for"))
    scorer = SimpleNamespace(reference=None)
    reference_of(scorer, None, None, "mine", show=False)
    found = scorer.reference
    assert (found.row_hashes, found.hash) == (reference.row_hashes, reference.hash)
    assert found.embeddings.dtype == np.float32
    np.testing.assert_allclose(found.embeddings, reference.embeddings, atol=5e-4)
    whole = folder / "whole.npz"
    reference.save(whole)
    assert (folder / "mine.npz").stat().st_size < 0.75 * whole.stat().st_size


def test_a_rule_without_neighbours_brings_no_reference(shipped):
    shipped(None)
    assert rule_card.shipped_reference("mine") is None and rule_card.presets() == ["mine"]


def test_other_reference_rows_than_the_card_s_are_refused(shipped):
    with pytest.raises(InstructMiningError, match="other reference rows"):
        shipped("another")
    assert rule_card.presets() == []
