"""Perplexity and IFD of a tiny LLaMA against a slow reference: one row, one turn, full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import FLOAT32, sample_rows, single

from instructmining_core.config import ModelRef
from instructmining_core.indicators.perplexity import compute_perplexity
from instructmining_core.indicators.turns import each_turn, read
from instructmining_core.models import causal_lm as lm_module
from instructmining_core.models.causal_lm import load_lm


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")


def ifd(rows, lm, **options):
    return compute_perplexity(rows, lm, columns=["ifd"], **options)["ifd"]


def slow_ppl(lm, before: str, response: str) -> float:
    """exp of the mean loss over the response's tokens, by the model's own full forward."""
    def ids(text):
        return lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    head, tail = [lm.tokenizer.bos_token_id, *ids(before)], ids(response)
    labels = torch.tensor([[-100] * len(head) + tail])
    with torch.no_grad():
        return math.exp(lm.model(torch.tensor([head + tail]), labels=labels).loss.item())


def written(turn) -> str:
    names = {"user": "User:\n", "assistant": "Assistant:\n"}
    parts = []
    for message in turn.context:
        parts.append(names[message["role"]] + message["content"])
        parts.append("</s>\n\n" if message["role"] == "assistant" else "\n\n")
    return "".join(parts) + "Assistant:\n"


def test_ppl_equals_the_slow_reference(lm):
    rows = [c for c in sample_rows(12) if len(c.ends) == 1]
    fast = compute_perplexity(rows, lm)["ppl"]
    slow = [slow_ppl(lm, written(t), t.response) for t in each_turn(rows)]
    np.testing.assert_allclose(fast.values, slow, rtol=FLOAT32)
    assert fast.reasons == [""] * len(rows)


def test_two_turns_are_the_mean_of_each_with_its_context(lm):
    row = read(single("one", "two three") + single("four", "five"))
    first = compute_perplexity([read(single("one", "two three"))], lm)["ppl"].values[0]
    both = compute_perplexity([row], lm)["ppl"].values[0]
    second = 2 * both - first
    alone = compute_perplexity([read(single("four", "five"))], lm)["ppl"].values[0]
    assert second > 1 and second != pytest.approx(alone, rel=100 * FLOAT32)  # the context is seen


def test_empty_is_nan_and_cuts_are_told(lm):
    rows = [read(single("q", "")), read(single("q " * 300, "r") + single("s", "t " * 20)),
            read(single("q", "word " * 900))]
    column = compute_perplexity(rows, lm)["ppl"]
    assert math.isnan(column.values[0]) and column.reasons[0] == "empty response"
    assert "turn 2: 2 earlier messages cut" in column.reasons[1]
    assert "end of the response cut" in column.reasons[2] and column.values[2] > 1


def test_ifd_is_the_ratio_of_two_slow_perplexities(lm):
    row = read(single("sort the list", "in order of value"))
    turn = next(each_turn([row]))
    with_question = slow_ppl(lm, written(turn), turn.response)
    alone = slow_ppl(lm, "", turn.response)
    column = ifd([row, read(single("q", ""))], lm)
    assert column.values[0] == pytest.approx(with_question / alone, rel=FLOAT32)
    assert math.isnan(column.values[1]) and column.reasons[1] == "empty response"


def test_both_columns_together_are_those_of_each_alone(lm):
    rows = sample_rows(10) + [read(single("q", "")), read([])]
    both = compute_perplexity(rows, lm, columns=["ifd", "ppl"])
    for name, alone in (("ppl", compute_perplexity(rows, lm)["ppl"]), ("ifd", ifd(rows, lm))):
        np.testing.assert_array_equal(both[name].values, alone.values)
        assert both[name].reasons == alone.reasons


def test_a_model_that_ignores_its_context_has_an_ifd_of_one(tiny_lm_folder):
    blind = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")
    # The token before the response differs ("Assistant:\n" or bos), so all embeddings are made one.
    embedding = blind.model.get_input_embeddings().weight
    with torch.no_grad():
        for name, weight in blind.model.named_parameters():
            if "o_proj" in name:  # no token sees another
                weight.zero_()
        embedding[:] = embedding[0]
    found = ifd([c for c in sample_rows(6) if len(c.ends) == 1], blind)
    np.testing.assert_allclose(found.values, 1.0, rtol=FLOAT32)


def test_ifd_of_two_turns_is_a_mean_and_batches_do_not_matter(lm):
    rows = sample_rows(10)
    wide = ifd(rows, lm).values
    np.testing.assert_allclose(wide, ifd(rows, lm, batch_tokens=1).values, rtol=FLOAT32)
    assert np.isfinite(wide).all() and (wide > 0).all()
    assert ifd([read(single("q", "a"))], lm).values[0] != 1.0


@pytest.mark.parametrize("column", ["ppl", "ifd"])
def test_by_default_batches_are_the_fast_ones(lm, monkeypatch, column):
    sizes, real = [], lm_module.token_nll

    def recorded(lm, ids, mask, wanted):
        sizes.append(ids.size)
        return real(lm, ids, mask, wanted)

    monkeypatch.setattr(lm_module, "token_nll", recorded)
    compute_perplexity(sample_rows(60), lm, columns=[column])
    assert max(sizes) <= 2048 < sum(sizes)
