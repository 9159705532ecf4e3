"""UniEval on tiny T5s (1.0 and 1.1) against three separate full forwards with a softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import FLOAT32, byte_tokenizer, sample_rows, save_t5, single

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.indicators import unieval
from instructmining_core.indicators.turns import each_turn, read

NAMES = ("naturalness", "coherence", "understandability")


@pytest.fixture(scope="module", params=[True, False], ids=["t5-1.0", "t5-1.1"])
def model(request, tmp_path_factory):
    folder = save_t5(tmp_path_factory.mktemp("t5"), tied=request.param)
    return unieval.load_evaluator(ModelRef(str(folder), dtype="float32"), device="cpu")


@torch.no_grad()
def slow(model, name: str, turn) -> float:
    """One row a call, the model's own forward, softmax over the whole vocabulary."""
    response, history = turn.response, "\n".join(m["content"] for m in turn.context)
    text = {
        "naturalness": "question: Is this a natural response in the dialogue? </s> "
        f"response: {response}",
        "understandability": "question: Is this an understandable response in the dialogue? </s> "
        f"response: {response}",
        "coherence": "question: Is this a coherent response given the dialogue history? </s> "
        f"response: {response} </s> dialogue history: {history}",
    }[name]
    inputs = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=1024)
    labels = model.tokenizer("No", return_tensors="pt")["input_ids"][:, :1]
    logits = model.model(**inputs, labels=labels).logits[0, 0]
    shares = logits.softmax(-1)
    yes, no = (model.tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    return (shares[yes] / (shares[yes] + shares[no])).item()


def test_equal_to_the_slow_reference(model):
    rows = [c for c in sample_rows(12) if len(c.ends) == 1]
    fast = unieval.compute_unieval(rows, model)
    assert tuple(fast) == NAMES
    for name in NAMES:
        expected = [slow(model, name, turn) for turn in each_turn(rows)]
        np.testing.assert_allclose(fast[name].values, expected, atol=FLOAT32)
        assert np.ptp(fast[name].values) > 100 * FLOAT32
        assert ((0 <= fast[name].values) & (fast[name].values <= 1)).all()


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"padding_side": "left"}])
def test_batches_do_not_matter(model, change):
    rows = sample_rows(10)
    base = unieval.compute_unieval(rows, model)
    other = unieval.compute_unieval(rows, model, **change)
    for name in NAMES:
        # Left padding moves T5's relative positions of padding only.
        np.testing.assert_allclose(other[name].values, base[name].values, atol=FLOAT32)


def test_two_turns_are_a_mean_and_empty_is_nan(model):
    rows = [read(single("a", "b") + single("c", "")), read(single("a", "b")), read(single("a", ""))]
    found = unieval.compute_unieval(rows, model)["coherence"]
    assert found.values[0] == pytest.approx(found.values[1], abs=FLOAT32)
    assert found.reasons == ["turn 2: empty response", "", "empty response"]
    assert math.isnan(found.values[2])


def test_long_text_is_cut_as_published_and_history_from_the_left(model):
    long = read(single("sort", "list " * 3000))
    turn = next(each_turn([long]))
    found = unieval.compute_unieval([long], model)
    for name in NAMES:
        assert found[name].values[0] == pytest.approx(slow(model, name, turn), abs=FLOAT32)
        assert found[name].reasons == ["end of the text cut to fit the model"]
    chat = read(single("list " * 3000, "ok") + single("sort", "sum"))
    cut = unieval.compute_unieval([chat], model)["coherence"].reasons[0]
    assert "turn 2: 1 earlier messages cut" in cut


def test_a_tokenizer_that_cannot_tell_yes_from_no_is_refused():
    tokenizer = byte_tokenizer(["<unk>"], eos_token="<unk>")
    assert unieval.answer_ids(tokenizer)[0] != unieval.answer_ids(tokenizer)[1]
    with pytest.raises(InstructMiningError, match="same first token"):
        unieval.answer_ids(lambda word: {"input_ids": [7]})
