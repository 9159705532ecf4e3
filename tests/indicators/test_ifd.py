"""IFD: what the ratio must be where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import sample_rows, single

from instructmining_core.config import ModelRef
from instructmining_core.indicators.perplexity import compute_ifd
from instructmining_core.indicators.turns import read
from instructmining_core.models.causal_lm import load_lm


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")


def test_a_model_that_ignores_its_context_gives_one(tiny_lm_folder):
    blind = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")
    with torch.no_grad():
        for name, weight in blind.model.named_parameters():
            if "o_proj" in name:  # no token sees another
                weight.zero_()
    # The token before the response differs ("Assistant: " or bos), so all embeddings are made one.
    embedding = blind.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:] = embedding[0]
    column = compute_ifd([c for c in sample_rows(6) if len(c.ends) == 1], blind)["ifd"]
    np.testing.assert_allclose(column.values, 1.0, rtol=1e-5)


def test_two_turns_are_a_mean_and_batches_do_not_matter(lm):
    rows = sample_rows(10)
    wide = compute_ifd(rows, lm)["ifd"].values
    np.testing.assert_allclose(wide, compute_ifd(rows, lm, batch_tokens=1)["ifd"].values, rtol=1e-5)
    assert np.isfinite(wide).all() and (wide > 0).all()
    assert compute_ifd([read(single("q", "a"))], lm)["ifd"].values[0] != 1.0
