"""The loss against a plain, slow loop with Hugging Face's own `labels`, for several families."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
import torch
import transformers as tf

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import Encoded
from instructmining_core.models import batching, cpu
from instructmining_core.models import causal_lm as lm_module
from instructmining_core.models.batching import fitting_tokens, free_bytes
from instructmining_core.models.causal_lm import (
    LM,
    find_head,
    load_lm,
    response_nll,
    token_nll,
)
from instructmining_core.models.hub import HubError, Resolved

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # relative, of a row's summed loss
EOS = 2
LLAMA_LIKE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(**LLAMA_LIKE, num_key_value_heads=2)
IDS = dict(vocab_size=300, bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
FAMILIES = {  # name -> (configuration, how its head must be found)
    "llama": (lambda: tf.LlamaConfig(**GROUPED, **IDS), "direct"),
    "gpt2": (lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS),
             "direct"),
    "gpt_neox": (lambda: tf.GPTNeoXConfig(**LLAMA_LIKE, **IDS), "direct"),
    "qwen2": (lambda: tf.Qwen2Config(**GROUPED, **IDS), "direct"),
    "gemma2": (lambda: tf.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0, **IDS),
               "softcap"),
    "cohere": (lambda: tf.CohereConfig(**GROUPED, logit_scale=0.3, **IDS), "scale"),
    "granite": (lambda: tf.GraniteConfig(**GROUPED, logits_scaling=3.0, **IDS), "divide"),
}


class Added(tf.LlamaForCausalLM):
    """A head that no candidate matches: the projection, and then a bias of its own."""

    def forward(self, *args, labels=None, logits_to_keep=0, **kwargs):
        out = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = out.logits + torch.linspace(0, 3, out.logits.shape[-1])
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


def wrapped(model) -> LM:
    tokenizer = types.SimpleNamespace(eos_token_id=EOS, pad_token_id=None)
    where = Resolved("test", "seed 0", None, True)
    return LM(model.eval(), tokenizer, where, "cpu", next(model.parameters()).dtype)


def build(config, cls=None):
    torch.manual_seed(0)
    # Wide weights: with the usual 0.02 every prediction is uniform and no error would show.
    config.initializer_range = 0.3
    return cls(config) if cls else tf.AutoModelForCausalLM.from_config(config)


def some_rows(n=24, longest=90, seed=0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(4, longest, n):
        ids = rng.integers(3, 300, length)
        ids[-1] = EOS
        start = int(rng.integers(1, length))
        rows.append(Encoded(tuple(ids.tolist()), (False,) * start + (True,) * int(length - start)))
    rows[3] = Encoded(rows[3].ids, tuple(i % 3 == 1 for i in range(len(rows[3].ids))))  # many turns
    return rows


def slow_loop(model, rows) -> np.ndarray:
    """Summed loss of each row: one call a row, full logits, the model's own loss."""
    found = []
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.where(torch.tensor([row.targets]), ids, -100)
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss.item()
        found.append(mean * sum(row.targets))
    return np.array(found)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_slow_loop_at_any_batch_size_order_and_side(family, dtype):
    config, way = FAMILIES[family]
    lm = wrapped(build(config()).to(dtype))
    rows = some_rows()
    expected = slow_loop(lm.model, rows)
    assert lm.head.way == way
    order = np.random.default_rng(1).permutation(len(rows))
    for options in ({"batch_tokens": 1}, {"batch_tokens": 300}, {"batch_tokens": 10**6},
                    {"batch_tokens": 500, "padding_side": "left"}):
        frame = response_nll(lm, rows, **options)
        np.testing.assert_allclose(frame["nll"], expected, rtol=TOLERANCE[dtype], err_msg=options)
    shuffled = response_nll(lm, [rows[i] for i in order], batch_tokens=400)
    np.testing.assert_allclose(shuffled["nll"], expected[order], rtol=TOLERANCE[dtype])
    assert frame["tokens"].tolist() == [sum(row.targets) for row in rows]


def test_unknown_head_takes_the_models_own_forward():
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS), Added))
    rows = some_rows()
    assert lm.head.way == "forward"
    np.testing.assert_allclose(response_nll(lm, rows, batch_tokens=300)["nll"],
                               slow_loop(lm.model, rows), rtol=1e-5)


def test_through_a_peft_model():
    from peft import LoraConfig, get_peft_model

    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    rows = some_rows()
    before = response_nll(lm, rows)["nll"]
    peft = get_peft_model(lm.model, LoraConfig(r=4, target_modules="all-linear",
                                               init_lora_weights=False))
    lm.model = peft
    after = response_nll(lm, rows, batch_tokens=200)["nll"]
    np.testing.assert_allclose(after, slow_loop(peft, rows), rtol=1e-5)
    assert (np.abs(after - before) > 1e-3).all()
    with peft.disable_adapter():
        np.testing.assert_allclose(response_nll(lm, rows)["nll"], before, rtol=1e-5)


def test_head_is_projected_at_target_positions_only():
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    assert lm.head.way == "direct"
    rows, seen = some_rows(), []
    lm.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    response_nll(lm, rows)
    assert sum(seen) == sum(sum(row.targets) for row in rows)


def test_chunks_of_the_projection_do_not_change_the_loss(monkeypatch):
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    whole = response_nll(lm, some_rows())["nll"]
    monkeypatch.setattr(lm_module, "_CHUNK", {"cpu": 7 * 300})
    np.testing.assert_allclose(response_nll(lm, some_rows())["nll"], whole, rtol=1e-6)


def test_log_softmax_is_float32_where_weights_are_not():
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)).to(torch.bfloat16))
    row = some_rows()[0]
    ids = np.array([row.ids])
    wanted = np.array([row.targets])
    nll = token_nll(lm, ids, np.ones_like(ids), wanted)
    with torch.no_grad():
        logits = lm.model(torch.tensor(ids)).logits[0, :-1].double()
    exact = -logits.log_softmax(-1)[range(len(row.ids) - 1), row.ids[1:]]
    exact = exact[torch.tensor(row.targets[1:])]
    assert nll.dtype == torch.float32
    np.testing.assert_allclose(nll.numpy(), exact.numpy(), rtol=1e-5, atol=1e-5)


def test_uniform_model_gives_the_logarithm_of_the_vocabulary():
    model = build(tf.LlamaConfig(**GROUPED, **IDS))
    model.lm_head.weight.data.zero_()
    frame = response_nll(wrapped(model), [Encoded((1, 9, 9, EOS), (False, False, True, True))])
    assert frame["nll"][0] == pytest.approx(2 * math.log(300))
    assert (frame["nll_eos"][0], frame["tokens_eos"][0]) == (pytest.approx(math.log(300)), 1)


def test_columns_of_a_long_row_and_of_turns():
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    long = Encoded((1, *[5 + i for i in range(100)]), (False, *[True] * 100))  # cut: no eos
    turns = Encoded((1, 7, 8, EOS, 9, 8, EOS, EOS), (False, False, *[True] * 2, False, *[True] * 3))
    frame = response_nll(lm, [long, turns])
    ids, mask = np.array([long.ids]), np.ones((1, 101), dtype=np.int64)
    each = token_nll(lm, ids, mask, np.array([long.targets])).double().numpy()
    assert frame["nll"][0] == pytest.approx(each.sum())
    assert frame["nll_first64"][0] == pytest.approx(each[:64].sum())
    assert frame["tokens_first64"].tolist() == [64, 5]
    assert np.isnan(frame["nll_eos"][0]) and frame["tokens_eos"].tolist() == [0, 2]
    assert frame["nll_first"][0] == pytest.approx(each[0])
    assert frame["tokens_first"].tolist() == [1, 2], "one of each response"
    # Of the last two ids, both eos, only the closing one ends a response; the other is its text.
    assert frame["nll_first64"][1] == frame["nll"][1]


def test_row_without_target_is_nan_with_a_reason():
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    rows = [Encoded((1, 5), (False, False)), Encoded((1, 5), (False, False), truncated=True),
            Encoded((), ()), some_rows()[0]]
    frame = response_nll(lm, rows)
    assert frame["nll"].isna().tolist() == [True, True, True, False]
    assert frame["reason"].tolist() == [
        "no response token", "no response token within max_tokens", "no response token", ""]
    assert response_nll(lm, []).columns.tolist() == list(lm_module.COLUMNS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_row_longer_than_the_models_positions_is_nan_with_a_reason(family):
    config = FAMILIES[family][0]()
    config.max_position_embeddings = 64
    lm = wrapped(build(config))
    rows = [Encoded((1,) * n, (False,) + (True,) * (n - 1)) for n in (65, 64)]
    frame = response_nll(lm, rows)
    assert np.isnan(frame["nll"][0]) and frame["nll"][1] > 0
    assert frame["reason"][0] == "65 tokens are more than the model's 64 positions"


def test_nan_of_one_row_is_said_and_stays_there():
    model = build(tf.LlamaConfig(**GROUPED, **IDS))
    lm = wrapped(model)
    rows = [Encoded((1, 6, 7, EOS), (False, True, True, True)),
            Encoded((1, 5, 7, EOS), (False, True, True, True))]
    healthy = response_nll(lm, rows)["nll"][0]
    model.model.embed_tokens.weight.data[5] = float("nan")
    frame = response_nll(lm, rows)
    assert frame["nll"][0] == pytest.approx(healthy) and np.isnan(frame["nll"][1])
    assert frame["reason"].tolist() == ["", "the model's loss is not finite on this row"]


def test_broken_weights_are_an_error():
    model = build(tf.LlamaConfig(**GROUPED, **IDS))
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(InstructMiningError, match="not finite"):
        find_head(model)


def test_finding_the_head_leaves_training_mode_alone():
    model = build(tf.LlamaConfig(**GROUPED, **IDS)).train()
    find_head(model)
    assert model.training


def test_out_of_memory_halves_and_one_row_too_large_is_nan(monkeypatch):
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    rows = some_rows()
    expected, real = response_nll(lm, rows)["nll"], token_nll
    largest = int(np.argmax([len(row.ids) for row in rows]))

    def small(lm, ids, mask, wanted):
        if ids.size > 150 or ids.shape[1] == len(rows[largest].ids):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(lm, ids, mask, wanted)

    monkeypatch.setattr(lm_module, "token_nll", small)
    frame = response_nll(lm, rows, batch_tokens=2000)
    others = frame.index != largest
    np.testing.assert_allclose(frame["nll"][others], expected[others], rtol=1e-5)
    assert np.isnan(frame["nll"][largest]) and "out of memory" in frame["reason"][largest]


def padded_sizes(monkeypatch, most=10**9) -> list[int]:
    """Padded tokens of each batch that is tried; above `most` memory is out."""
    sizes = []

    def recorded(lm, ids, mask, wanted):
        sizes.append(ids.size)
        if ids.size > most:
            raise RuntimeError("CUDA out of memory")
        return token_nll(lm, ids, mask, wanted)

    monkeypatch.setattr(lm_module, "token_nll", recorded)
    return sizes


def test_the_halved_batch_is_remembered_by_the_model(monkeypatch):
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    rows = some_rows(60)
    expected = response_nll(lm, rows)["nll"]
    sizes = padded_sizes(monkeypatch, most=300)
    np.testing.assert_allclose(response_nll(lm, rows)["nll"], expected, rtol=1e-5)
    assert sizes[0] > 600 and 100 <= lm.batch_limit <= 300
    sizes.clear()
    np.testing.assert_allclose(response_nll(lm, rows)["nll"], expected, rtol=1e-5)
    assert 0 < max(sizes) <= 300, "the second call did not try more than memory held"


def test_the_first_batch_is_no_larger_than_free_memory(monkeypatch):
    lm = wrapped(build(tf.LlamaConfig(**GROUPED, **IDS)))
    rows = some_rows(60)
    sizes = padded_sizes(monkeypatch)
    expected = response_nll(lm, rows)["nll"]
    assert 600 < max(sizes) <= LM.batch_tokens["cpu"]
    # By hand: 4 bytes x (8 x 32 hidden + 3 x 64 MLP) + 4 x 32, and 12 bytes x 300 logits.
    monkeypatch.setattr(batching, "free_bytes", lambda device: 2 * 200 * (1792 + 128 + 3600))
    sizes.clear()
    np.testing.assert_allclose(response_nll(lm, rows)["nll"], expected, rtol=1e-5)
    assert 100 < max(sizes) <= 200 and lm.batch_limit == 0
    sizes.clear()
    response_nll(lm, rows, batch_tokens=1000)
    assert max(sizes) > 300, "what is asked for is tried"


def test_tokens_that_fit():
    config = tf.LlamaConfig(**GROUPED, **IDS)
    assert fitting_tokens(config, 4, 1920 * 500 + 3600 * 100, 100) == 500  # 100 rows of logits
    assert fitting_tokens(config, 4, (1920 + 3600) * 70, 100) == 70
    assert fitting_tokens(config, 2, 0, 100) == 1
    assert free_bytes("cpu") > 0


def test_load_from_a_folder(tiny_lm_folder):
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")
    assert lm.dtype == torch.float32 == next(lm.model.parameters()).dtype
    assert lm.model.config._attn_implementation == "sdpa" and not lm.model.training
    assert lm.resolved.revision.startswith("sha256:") and lm.pad_id == 0


def test_model_that_needs_its_own_code_is_refused(tiny_lm_folder, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "made_up"}
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="its own code, which is never run|not known"):
        load_lm(ModelRef(str(folder)), device="cpu")


def test_code_in_a_model_folder_is_never_run(tiny_lm_folder, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    lm = load_lm(ModelRef(str(folder), dtype="float32"), device="cpu")
    assert type(lm.model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped heads"])
def test_short_rows_attend_by_plain_products_with_the_same_loss(monkeypatch, heads):
    config = tf.LlamaConfig(**GROUPED | {"num_key_value_heads": heads}, **IDS)
    lm, rows = wrapped(build(config)), some_rows(40, longest=120)
    calls, plain = [], cpu.ShortAttention.apply
    monkeypatch.setattr(cpu.ShortAttention, "apply", lambda *a: calls.append(1) or plain(*a))
    found = response_nll(lm, rows)
    assert bool(calls) == (heads == config.num_attention_heads), "grouped heads go to sdpa"
    assert lm.model.config._attn_implementation == "sdpa", "as it was"
    monkeypatch.setattr(cpu, "LONGEST", 0)
    calls.clear()
    np.testing.assert_allclose(found["nll"], response_nll(lm, rows)["nll"], rtol=2e-6)
    assert not calls
