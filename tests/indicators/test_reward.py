"""Reward models of the two real architectures against one row a call."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import (
    FLOAT32,
    assert_rounded,
    sample_messages,
    sample_rows,
    save_deberta_reward,
    save_oasst_reward,
    single,
)
from transformers import BertConfig, BertForSequenceClassification

from instructmining.cli import main
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.indicators import reward
from instructmining_core.indicators.bank import FILE
from instructmining_core.indicators.score_table import read_scores
from instructmining_core.indicators.scorer import Scorer
from instructmining_core.indicators.turns import each_turn, read


@pytest.fixture(scope="module")
def oasst(tmp_path_factory):
    folder = save_oasst_reward(tmp_path_factory.mktemp("oasst"))
    return reward.load_reward_model(ModelRef(str(folder), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    folder = save_deberta_reward(tmp_path_factory.mktemp("deberta"))
    with pytest.warns(reward.CoefficientWarning, match="published coefficients do not carry over"):
        return reward.load_reward_model(ModelRef(str(folder), dtype="float32"), device="cpu")


@torch.no_grad()
def slow_oasst(model, turn) -> float:
    marks = {"user": "<|prompter|>", "assistant": "<|assistant|>"}
    text = "".join(f"{marks[m['role']]}{m['content']}<|endoftext|>" for m in turn.context)
    text += f"<|assistant|>{turn.response}<|endoftext|>"
    hidden = model.model.gpt_neox(**model.tokenizer(text, return_tensors="pt")).last_hidden_state
    return model.model.out_proj(hidden[0, -1]).item()


@torch.no_grad()
def slow_pair(model, turn) -> float:
    before = "\n\n".join(m["content"] for m in turn.context)
    return model.model(**model.tokenizer(before, turn.response, return_tensors="pt")).logits.item()


def per_row(rows, slow, model) -> list[float]:
    turns = list(each_turn(rows))
    return [np.mean([slow(model, t) for t in turns if t.row == i]) for i in range(len(rows))]


def test_oasst_form_equals_one_row_a_call(oasst):
    rows = sample_rows(15)
    fast = reward.compute_reward(rows, oasst)["reward"]
    assert_rounded(fast.values, per_row(rows, slow_oasst, oasst))
    assert np.ptp(fast.values) > 0.1 and oasst.note == "input form oasst"


def test_pair_form_on_deberta_equals_one_row_a_call(deberta):
    rows = sample_rows(15)
    fast = reward.compute_reward(rows, deberta)["reward"]
    assert_rounded(fast.values, per_row(rows, slow_pair, deberta))
    assert np.ptp(fast.values) > 10 * FLOAT32 * np.abs(fast.values).max()
    assert deberta.note.startswith("input form pair; another reward scale")


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"padding_side": "left"}])
def test_batches_and_padding_side_do_not_matter(oasst, deberta, change):
    rows = sample_rows(12)
    for model in (oasst, deberta):
        base = reward.compute_reward(rows, model)["reward"].values
        assert_rounded(reward.compute_reward(rows, model, **change)["reward"].values, base)


def test_pair_form_on_the_oasst_model_equals_one_row_a_call(oasst, tmp_path):
    rows = sample_rows(9)
    folder = Path(oasst.resolved.folder)
    ref = ModelRef(str(folder), dtype="float32")
    pair = reward.load_reward_model(ref, device="cpu", form="pair")
    assert pair.note == "input form pair, not the model's own, which is oasst"
    fast = reward.compute_reward(rows, pair)["reward"].values
    assert_rounded(fast, per_row(rows, slow_pair, pair))
    assert np.abs(fast - reward.compute_reward(rows, oasst)["reward"].values).max() > 1e-2
    nothing = reward.compute_reward([read(single("", "")), rows[1]], pair)["reward"]
    assert math.isnan(nothing.values[0]) and nothing.reasons[0] == reward.NO_TOKEN
    assert nothing.values[1] == pytest.approx(fast[1], abs=FLOAT32 * np.abs(fast).max())


def test_the_form_is_in_the_key_and_the_record(oasst, tmp_path):
    table = pd.DataFrame({"messages": sample_messages(4)})
    models = {"reward": ModelRef(str(oasst.resolved.folder), dtype="float32")}
    found, keys = {}, {}
    for form in ("", "oasst", "pair"):
        scorer = Scorer(models, indicators=["reward"], bank=tmp_path / "bank", reward_form=form)
        before = scorer.describe()["reward"]
        found[form] = scorer.score(table)
        known = found[form].attrs["indicators"]["reward"]
        assert known == {**before, **known} and known["note"].startswith("input form ")
        with sqlite3.connect(tmp_path / "bank" / FILE) as file:
            keys[form] = file.execute("SELECT hash FROM keys").fetchall()
    assert found["pair"].attrs["indicators"]["reward"]["form"] == "pair"
    assert len(keys["oasst"]) == 1 and len(keys["pair"]) == 2  # the model's own form has one key
    assert found[""]["reward"].tolist() == found["oasst"]["reward"].tolist()
    assert (found["pair"]["reward"] != found[""]["reward"]).all()


def test_the_command_and_the_profile_choose_the_form(oasst, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    line = {"instruction": "sort the list", "input": "", "output": "in order"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    profile = tmp_path / "pair.yaml"
    profile.write_text(f"extends: smoke\nmodels: {{reward: {{id: {oasst.resolved.folder}, "
                       "dtype: float32}, reward_form: pair}\n")  # fmt: skip
    values = {}
    for name, more in {"pair": [], "oasst": ["--reward-form", "oasst"]}.items():
        out = tmp_path / f"{name}.parquet"
        status = main(["score", str(tmp_path / "rows.jsonl"), "-o", str(out), "--quiet",
                       "--profile", str(profile), "--indicators", "reward", *more])
        table = read_scores(out)
        assert status == 0 and table.attrs["indicators"]["reward"].get("form", "oasst") == name
        values[name] = table["reward"].item()
    row = [read(single("sort the list", "in order"))]
    for name, value in values.items():
        expected = reward.compute_reward(row, replace(oasst, form=name))["reward"].values
        assert_rounded([value], expected)


def test_token_types_are_given_to_models_that_use_them(tmp_path, deberta):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(deberta.tokenizer), hidden_size=32, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=32, num_labels=1,
                        initializer_range=0.5, max_position_embeddings=192)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    deberta.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(reward.CoefficientWarning):
        bert = reward.load_reward_model(ModelRef(str(tmp_path), dtype="float32"), device="cpu")
    rows = sample_rows(6)
    assert_rounded(
        reward.compute_reward(rows, bert)["reward"].values, per_row(rows, slow_pair, bert))


def test_long_rows_lose_first_messages_and_say_so(oasst, deberta):
    chat = read(single("list " * 150, "sum") + single("sort", "value"))
    rest = read(single("sort", "value"))
    for model in (oasst, deberta):
        column = reward.compute_reward([chat], model)["reward"]
        alone = [read(single("list " * 150, "sum"))]
        first = reward.compute_reward(alone, model)["reward"].values[0]
        assert "turn 2:" in column.reasons[0] and "earlier messages cut" in column.reasons[0]
        if model is oasst:
            kept = reward.compute_reward([rest], model)["reward"].values[0]
            assert 2 * column.values[0] - first != pytest.approx(kept)  # "sum" still stands before
    one = reward.compute_reward([read(single("q", "word " * 2000))], deberta)["reward"]
    assert "end of the text cut" in one.reasons[0] and math.isfinite(one.values[0])


def test_empty_response_has_a_value_and_a_note(oasst):
    column = reward.compute_reward([read(single("q", "")), read([])], oasst)["reward"]
    assert math.isfinite(column.values[0]) and column.reasons[0] == "empty response"
    assert math.isnan(column.values[1]) and column.reasons[1] == "no messages"


def test_classifiers_with_several_outputs_and_unknown_forms_are_refused(tmp_path, oasst):
    config = BertConfig(vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    oasst.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InstructMiningError, match="3 numbers a row"):
        reward.load_reward_model(ModelRef(str(tmp_path)), device="cpu")
    with pytest.raises(InstructMiningError, match="input form 'chat'"):
        reward.load_reward_model(ModelRef(str(oasst.resolved.folder)), device="cpu", form="chat")
