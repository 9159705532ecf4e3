"""The registered reward class: names of weights, pooling on both padding sides, round trip."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from instructmining_core.models.reward_model import GPTNeoXRewardConfig, GPTNeoXRewardModel, pool


def tiny(pooling: str = "last") -> GPTNeoXRewardModel:
    torch.manual_seed(0)
    config = GPTNeoXRewardConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, pooling=pooling,
    )
    return GPTNeoXRewardModel(config).eval()


def test_weight_names_are_those_of_the_published_checkpoint(tmp_path):
    tiny().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {"gpt_neox.embed_in.weight", "out_proj.weight", "out_proj.bias"} <= names
    assert all(name.startswith(("gpt_neox.", "out_proj.")) for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt_neox_reward_model"
    assert config["pooling"] == "last"


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_auto_class_loads_what_was_saved(tmp_path, pooling):
    model = tiny(pooling)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is GPTNeoXRewardModel and again.config.pooling == pooling
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_equal_on_both_padding_sides_and_to_a_plain_reference(pooling):
    model = tiny(pooling)
    row = torch.tensor([[11, 12, 13, 14, 15]])
    fill = torch.tensor([[0, 0, 0]])
    with torch.no_grad():
        hidden = model.gpt_neox(row).last_hidden_state[0]
        vector = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        reference = (model.out_proj.weight[0] * vector).sum() + model.out_proj.bias[0]
        mask = torch.ones_like(row)
        right = model(torch.cat([row, fill], 1), torch.cat([mask, 0 * fill], 1)).logits[0, 0]
        left = model(torch.cat([fill, row], 1), torch.cat([0 * fill, mask], 1)).logits[0, 0]
    assert torch.allclose(right, reference, atol=1e-5)
    assert torch.allclose(left, reference, atol=1e-5)


def test_pool_on_literal_tensors():
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[9.0], [3.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "last").tolist() == [[2.0], [5.0]]
    assert pool(hidden, mask, "mean").tolist() == [[1.5], [4.0]]


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling 'max'"):
        tiny("max")
