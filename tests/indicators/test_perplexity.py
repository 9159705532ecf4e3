"""Perplexity and IFD of a tiny LLaMA against a slow reference: one row, one turn, full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import sample_rows, single

from instructmining_core.config import ModelRef
from instructmining_core.indicators import perplexity
from instructmining_core.indicators.turns import each_turn, read
from instructmining_core.models import causal_lm as lm_module
from instructmining_core.models.causal_lm import load_lm


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")


def slow_ppl(lm, before: str, response: str) -> float:
    """exp of the mean loss over the response's tokens, by the model's own full forward."""
    def ids(text):
        return lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    head, tail = [lm.tokenizer.bos_token_id, *ids(before)], ids(response)
    labels = torch.tensor([[-100] * len(head) + tail])
    with torch.no_grad():
        return math.exp(lm.model(torch.tensor([head + tail]), labels=labels).loss.item())


def written(turn) -> str:
    names = {"user": "User: ", "assistant": "Assistant: "}
    parts = []
    for message in turn.context:
        parts.append(names[message["role"]] + message["content"])
        parts.append("</s>\n\n" if message["role"] == "assistant" else "\n\n")
    return "".join(parts) + "Assistant: "


def test_ppl_equals_the_slow_reference(lm):
    rows = [c for c in sample_rows(12) if len(c.ends) == 1]
    fast = perplexity.compute_perplexity(rows, lm)["ppl"]
    slow = [slow_ppl(lm, written(t), t.response) for t in each_turn(rows)]
    np.testing.assert_allclose(fast.values, slow, rtol=1e-4)
    assert fast.reasons == [""] * len(rows)


def test_two_turns_are_the_mean_of_each_with_its_context(lm):
    row = read(single("one", "two three") + single("four", "five"))
    first = perplexity.compute_perplexity([read(single("one", "two three"))], lm)["ppl"].values[0]
    both = perplexity.compute_perplexity([row], lm)["ppl"].values[0]
    second = 2 * both - first
    alone = perplexity.compute_perplexity([read(single("four", "five"))], lm)["ppl"].values[0]
    assert second > 1 and second != pytest.approx(alone)  # the context is seen


def test_empty_is_nan_and_cuts_are_told(lm):
    rows = [read(single("q", "")), read(single("q " * 300, "r") + single("s", "t " * 20)),
            read(single("q", "word " * 900))]
    column = perplexity.compute_perplexity(rows, lm)["ppl"]
    assert math.isnan(column.values[0]) and column.reasons[0] == "empty response"
    assert "turn 2: 2 earlier messages cut" in column.reasons[1]
    assert "end of the response cut" in column.reasons[2] and column.values[2] > 1


def test_ifd_is_the_ratio_of_two_slow_perplexities(lm):
    row = read(single("sort the list", "in order of value"))
    turn = next(each_turn([row]))
    with_question = slow_ppl(lm, written(turn), turn.response)
    alone = slow_ppl(lm, "", turn.response)
    column = perplexity.compute_ifd([row, read(single("q", ""))], lm)["ifd"]
    assert column.values[0] == pytest.approx(with_question / alone, rel=1e-4)
    assert math.isnan(column.values[1]) and column.reasons[1] == "empty response"


@pytest.mark.parametrize("compute", [perplexity.compute_perplexity, perplexity.compute_ifd])
def test_by_default_batches_are_the_fast_ones(lm, monkeypatch, compute):
    sizes, real = [], lm_module.token_nll

    def recorded(lm, ids, mask, wanted):
        sizes.append(ids.size)
        return real(lm, ids, mask, wanted)

    monkeypatch.setattr(lm_module, "token_nll", recorded)
    compute(sample_rows(60), lm)
    assert max(sizes) <= lm_module.BATCH_TOKENS["cpu"] == 2048 < sum(sizes)
