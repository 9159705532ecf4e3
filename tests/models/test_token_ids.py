"""Token ids that lie outside a model's embeddings, and tokenizers without an end of text."""

from __future__ import annotations

import shutil

import pytest

from instructmining_core.config import ModelRef
from instructmining_core.data.tokenization import encode_many
from instructmining_core.models.causal_lm import load_lm, response_nll
from instructmining_core.models.hub import HubError

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}]


def losses(lm, talks):
    return response_nll(lm, encode_many(lm.tokenizer, talks, max_tokens=100))


def changed(tiny_lm_folder, tmp_path, change):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return ModelRef(str(folder), dtype="float32")


def test_a_pad_token_without_an_embedding_changes_no_loss(tiny_lm_folder, tmp_path):
    def add_pad(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    talks = [TALK, [*TALK, *TALK]]
    sound = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")
    lm = load_lm(changed(tiny_lm_folder, tmp_path, add_pad), device="cpu")
    assert losses(lm, talks)["nll"].tolist() == losses(sound, talks)["nll"].tolist()


def test_an_eos_token_without_an_embedding_is_refused(tiny_lm_folder, tmp_path):
    def add_eos(tokenizer):
        tokenizer.add_special_tokens({"eos_token": "[EOS]"})

    ref = changed(tiny_lm_folder, tmp_path, add_eos)
    with pytest.raises(HubError, match=r"token \d+ of the tokenizer \(eos\) is outside"):
        load_lm(ref, device="cpu")


def test_a_tokenizer_without_eos_ends_texts_by_another_token(tiny_lm_folder, tmp_path):
    def drop_eos(tokenizer):
        tokenizer.eos_token = None

    lm = load_lm(changed(tiny_lm_folder, tmp_path, drop_eos), device="cpu")
    assert lm.tokenizer.eos_token == "<pad>"
    assert losses(lm, [TALK])["tokens_eos"].tolist() == [1]
