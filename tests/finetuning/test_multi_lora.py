"""Many adapters in one pass: each as if it were alone, on any model that peft can target."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetuning.test_finetune import by_peft, rows_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from instructmining_core.config import FinetuneConfig, InstructMiningError, ModelRef
from instructmining_core.data.tokenization import Encoded
from instructmining_core.finetuning import packing
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.finetuning.lora import MultiLoRA, set_first_values
from instructmining_core.finetuning.packing import PackedModel
from instructmining_core.finetuning.trainer import TrainingJob, train
from instructmining_core.models.causal_lm import LM, load_lm, response_nll
from instructmining_core.models.hub import Resolved

CONFIG = FinetuneConfig(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=5)
TOLERANCE = 2e-5  # of a step's loss, float32: sums in another order, magnified by training

SMALL = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2,
                             sliding_window=8),
}


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


def family(name: str, tokenizer) -> LM:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # the families' own first values are nearly silent
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return LM(model, tokenizer, Resolved(name, "made", None, True), "cpu", torch.float32)


def jobs_of(count: int) -> list[TrainingJob]:
    return [TrainingJob(rows_of(9 + 4 * k, seed=k), init_seed=k % 2, order_seed=5)
            for k in range(count)]


def together(lm, jobs, config=CONFIG, *, padded=False):
    """Curves and losses on some rows of adapters trained in one pass.

    padded : multiply as on a GPU
    """
    adapters = MultiLoRA(lm.model, config, [job.init_seed for job in jobs])
    adapters.padded = padded
    with adapters.attached():
        trained = train(adapters, PackedModel(lm), jobs)
        after = []
        for k in range(len(jobs)):
            adapters.use(k)
            after.append(seen(lm))
    return [trained[k].curve()["loss"].to_numpy() for k in range(len(jobs))], after, adapters


def seen(lm):
    return response_nll(lm, rows_of(5, seed=99))["nll"].to_numpy()


def alone(lm, job, config=CONFIG):
    """The same of one adapter by peft and transformers."""
    return by_peft(lm, job, config, seen)


@pytest.mark.parametrize("padded", [False, True])
def test_each_of_three_is_its_solo_peft_run(lm, padded):
    """Three sets of other sizes: their steps differ in number, the short ones end early.

    `padded` is how a GPU computes; the arithmetic can be held against peft's anywhere.
    """
    jobs = jobs_of(3)
    curves, after, _ = together(lm, jobs, padded=padded)
    assert [len(curve) for curve in curves] == [4, 6, 8]
    for job, curve, nll in zip(jobs, curves, after, strict=True):
        expected, expected_nll = alone(lm, job)
        assert curve == pytest.approx(expected, rel=TOLERANCE)
        assert nll == pytest.approx(expected_nll, rel=1e-4)


def test_an_adapter_alone_is_merged_and_leaves_the_base_as_it_was(lm):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    jobs = jobs_of(2)
    _, expected, adapters = together(lm, jobs)
    with adapters.attached():
        found = []
        for k in range(2):
            with adapters.alone(k):
                assert adapters.routing.merged
                found.append(seen(lm))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, tiny_tokenizer):
    lm = family(name, tiny_tokenizer)
    assert PackedModel(lm).packed
    jobs = jobs_of(2)
    curves, after, _ = together(lm, jobs)
    assert curves[0][-1] != pytest.approx(curves[0][0], rel=1e-3)  # it does learn
    for job, curve, nll in zip(jobs, curves, after, strict=True):
        expected, expected_nll = alone(lm, job)
        assert curve == pytest.approx(expected, rel=TOLERANCE)
        assert nll == pytest.approx(expected_nll, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_common_beginning_that_is_computed_once_changes_no_number(
    name, tiny_tokenizer, monkeypatch
):
    """Two adapters, whose rows all begin alike; with a window, the beginning leaves it."""
    lm = family(name, tiny_tokenizer)

    def begun(rows):
        return [Encoded((*range(40, 50), *row.ids), (*[False] * 10, *row.targets)) for row in rows]

    jobs = [replace(job, rows=begun(job.rows)) for job in jobs_of(2)]
    assert packing.pack(jobs[0].rows).spans == ((0, 10, 8),)
    curves, after, adapters = together(lm, jobs)
    with packing.packing(lm), adapters.attached():
        adapters.use(1)
        assert lm.packed is not None
        once = response_nll(lm, begun(rows_of(5, seed=99)), batch_tokens=150)["nll"].to_numpy()
    monkeypatch.setattr(packing, "_ALIKE", 1000)
    plain, plain_after, _ = together(lm, jobs)
    for ours, theirs in zip(curves, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)
    for ours, theirs in zip(after, plain_after, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert lm.packed is None
    with adapters.attached():
        adapters.use(1)
        padded = response_nll(lm, begun(rows_of(5, seed=99)))["nll"].to_numpy()
    assert once == pytest.approx(padded, rel=1e-5)


def test_company_does_not_change_a_run(lm, monkeypatch):
    """The same job beside different others, at any place."""
    first, second, third = jobs_of(3)
    expected = together(lm, [first])[0][0]
    assert together(lm, [third, first])[0][1] == pytest.approx(expected, rel=TOLERANCE)
    monkeypatch.setattr(packing, "_takes_packed_rows", lambda model: False)
    assert together(lm, [first, second, third])[0][0] == pytest.approx(expected, rel=TOLERANCE)


def test_a_diverging_neighbour_does_no_harm(lm):
    first, second = jobs_of(2)
    adapters = MultiLoRA(lm.model, CONFIG, [0, 1])
    adapters.values[1].fill_(float("inf"))
    adapters.work.copy_(adapters.values)
    with adapters.attached():
        trained = train(adapters, PackedModel(lm), [first, second])
    assert trained[1].diverged and trained[1].ended == 1
    assert not trained[0].diverged
    expected = alone(lm, first)[0]
    assert trained[0].curve()["loss"].to_numpy() == pytest.approx(expected, rel=TOLERANCE)


def test_steps_are_torch_s_adamw_with_its_clipping(lm):
    config = replace(CONFIG, weight_decay=0.1, clip=0.5, betas=(0.8, 0.9))
    adapters = MultiLoRA(lm.model, config, [0, 1])
    generator = torch.Generator().manual_seed(0)
    rates = [(0.01, 0.02), (0.03, float("nan")), (0.005, float("nan"))]
    gradients = [torch.randn(adapters.values.shape, generator=generator) for _ in rates]
    copies = [torch.nn.Parameter(row.clone()) for row in adapters.values]
    optimizers = [torch.optim.AdamW([p], betas=config.betas, weight_decay=0.1) for p in copies]
    for rate, gradient in zip(rates, gradients, strict=True):
        adapters.gradients.copy_(gradient)
        norms = adapters.step(np.array(rate))
        assert norms.tolist() == pytest.approx(gradient.norm(dim=1).tolist())
        for k, (parameter, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            if np.isnan(rate[k]):
                continue
            parameter.grad = gradient[k].clone()
            torch.nn.utils.clip_grad_norm_([parameter], config.clip)
            optimizer.param_groups[0]["lr"] = rate[k]
            optimizer.step()
    for row, parameter in zip(adapters.values, copies, strict=True):
        assert torch.allclose(row, parameter, atol=1e-6)
    assert not adapters.gradients.any()


def test_the_same_seed_is_the_same_adapter_for_any_set(lm):
    adapters = MultiLoRA(lm.model, CONFIG, [4, 4, 5])
    assert (adapters.values[0] == adapters.values[1]).all()
    assert (adapters.values[0] != adapters.values[2]).any()
    a, b = adapters.tensors(0)["model.layers.0.mlp.down_proj"]
    assert a.shape == (4, 64) and b.shape == (32, 4) and not b.any()
    assert a.abs().max() <= 1 / 8 and a.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.15)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_is_exported_as_an_adapter_of_peft(name, lm, tiny_tokenizer, tmp_path):
    lm = lm if name == "llama" else family(name, tiny_tokenizer)
    _, after, adapters = together(lm, jobs_of(2))
    for k in range(2):
        adapters.save(k, tmp_path / str(k), "base")
        model = PeftModel.from_pretrained(lm.model, tmp_path / str(k)).eval()
        loaded = LM(model, lm.tokenizer, lm.resolved, "cpu", torch.float32)
        nll = response_nll(loaded, rows_of(5, seed=99))["nll"].to_numpy()
        model.unload()
        assert nll == pytest.approx(after[k], rel=1e-5)


def test_an_export_of_some_layers_stays_on_those(lm, tmp_path):
    """`down_proj` of one layer only: the last part of its name would reach the other's too."""
    config = replace(CONFIG, target_modules=r".*layers\.1\.mlp\.down_proj")
    _, after, adapters = together(lm, jobs_of(1), config)
    adapters.save(0, tmp_path, "base")
    model = PeftModel.from_pretrained(lm.model, tmp_path).eval()
    names = [n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    nll = response_nll(LM(model, lm.tokenizer, lm.resolved, "cpu", torch.float32),
                       rows_of(5, seed=99))["nll"].to_numpy()
    model.unload()
    assert names == ["model.layers.1.mlp.down_proj"]
    assert nll == pytest.approx(after[0], rel=1e-5)


def test_an_export_of_all_layers_has_peft_s_short_names(lm):
    assert MultiLoRA(lm.model, CONFIG, [0]).exported.target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_neox"])
def test_adapters_on_the_top_layers_are_peft_s(name, tiny_tokenizer, tmp_path):
    """Against peft asked in its own words: loss, gradients, and the adapter that it loads."""
    lm, config = family(name, tiny_tokenizer), replace(CONFIG, layers=1, batch_size=9, epochs=1)
    job, (curve,), after, ours = jobs_of(1)[0], *top_layer_run(lm, jobs_of(1), config)
    names = sorted({n.rsplit(".", 1)[-1] for n in ours.layers})
    assert all(re.search(r"\.1\.", n) for n in ours.layers) and len(names) >= 3
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=names, layers_to_transform=[1])
    model = get_peft_model(copy.deepcopy(lm.model), settings)
    set_first_values(model, job.init_seed)
    theirs = [n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    assert theirs == list(ours.layers)

    model_of = replace(lm, model=model)
    packed = PackedModel(model_of)
    batch = packed.batch(job.rows)
    loss, _ = packed.loss(batch, torch.full(batch.labels.shape, 1 / len(batch.labels)))
    loss.backward()
    assert curve[0] == pytest.approx(loss.item(), rel=1e-5)
    for layer, (_, gradient) in ours.first_gradients.items():
        expected = model.get_base_model().get_submodule(layer).lora_B["default"].weight.grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()

    ours.save(0, tmp_path, "base")
    loaded = PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path).eval()
    assert seen(replace(lm, model=loaded)) == pytest.approx(after[0], rel=1e-5)
    assert by_peft(lm, job, config, seen)[1] == pytest.approx(after[0], rel=1e-5)


def top_layer_run(lm, jobs, config):
    """As `together`, with the first step's gradients of each layer's A and B."""
    real = MultiLoRA.step

    def step(self, rates):
        if not hasattr(self, "first_gradients"):
            values, self.values = self.values, self.gradients.clone()
            self.first_gradients, self.values = self.tensors(0), values
        return real(self, rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiLoRA, "step", step)
        return together(lm, jobs, config)


def test_more_layers_than_there_are_is_said(lm):
    with pytest.raises(InstructMiningError, match="has 2 layers"):
        MultiLoRA(lm.model, replace(CONFIG, layers=3), [0])


def test_padded_rows_are_sorted_within_a_step_and_nothing_else_changes(lm, monkeypatch):
    config, seen, real = replace(CONFIG, batch_size=12, micro_tokens=120), [], PackedModel.batch

    def spy(self, rows, owners):
        seen.append([len(row) for row in rows])
        return real(self, rows, owners)

    jobs = jobs_of(2)
    whole = together(lm, jobs, replace(config, micro_tokens=10_000))[0]
    monkeypatch.setattr(PackedModel, "batch", spy)
    monkeypatch.setattr(packing, "_takes_packed_rows", lambda model: False)
    for curve, expected in zip(together(lm, jobs, config)[0], whole, strict=True):
        assert curve == pytest.approx(expected, rel=TOLERANCE)
    lengths = [n for batch in seen for n in batch]
    falls = sum(a > b for a, b in zip(lengths, lengths[1:], strict=False))
    # ascending within an adapter's rows of a step: it falls only where an adapter or step begins
    steps = len(whole[0]) + len(whole[1])
    assert len(seen) > steps and falls < steps


def test_a_capped_head_in_chunks_is_the_model_s_own_loss(tiny_tokenizer, monkeypatch):
    """Gemma 2 caps its logits, so autograd goes through the head; two rows are many chunks here."""
    torch.manual_seed(3)
    config = Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0,
        final_logit_softcapping=3.0, attn_logit_softcapping=None, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm = LM(model, tiny_tokenizer, Resolved("gemma2", "made", None, True), "cpu",
            torch.float32)
    assert lm.head.way == "softcap"
    body, rows = PackedModel(lm), rows_of(6, seed=4)
    body.packed = False
    batch = body.batch(rows)
    weights = torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(packing, "KEPT_LOGITS", 1)
    assert len(batch.labels) > 3 * 16  # so four chunks at least
    total, each = body.loss(batch, weights)
    total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits[batch.predict].float(), batch.labels,
                                                 reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(each, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-4, atol=1e-5), name


def test_only_the_named_layers_are_trained(lm):
    config = replace(CONFIG, target_modules=("q_proj", "down_proj"))
    jobs = jobs_of(1)
    curves, _, adapters = together(lm, jobs, config)
    assert {name.rsplit(".", 1)[-1] for name in adapters.layers} == {"q_proj", "down_proj"}
    assert curves[0] == pytest.approx(alone(lm, jobs[0], config)[0], rel=TOLERANCE)


def test_generation_goes_through_the_adapter(lm):
    """With a cache, one token at a time."""
    job = jobs_of(1)[0]
    ids = torch.tensor([job.rows[0].ids[:5]])
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    tuned = finetune(lm, job.rows, CONFIG, init_seed=0, order_seed=5)
    ours = tuned.lm.model.generate(ids, **options)
    tuned.close()
    _, theirs = by_peft(lm, job, CONFIG, lambda lm: lm.model.generate(input_ids=ids, **options))
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_numbers_that_are_none_stay_with_their_adapter(lm, padded):
    """The broken adapter has the first rows, which padding must not take to the others."""
    jobs = jobs_of(3)
    adapters = MultiLoRA(lm.model, CONFIG, [0, 1, 0])
    adapters.padded = padded
    adapters.values[0].fill_(float("nan"))
    adapters.work.copy_(adapters.values)
    with adapters.attached():
        trained = train(adapters, PackedModel(lm), jobs)
    assert [c.diverged for c in trained] == [True, False, False]
    assert trained[0].ended == 1
    for k in (1, 2):
        expected = alone(lm, jobs[k])[0]
        assert trained[k].curve()["loss"].to_numpy() == pytest.approx(expected, rel=TOLERANCE)


def test_an_epoch_s_end_can_end_one_of_three(lm):
    jobs, seen = jobs_of(3), []
    adapters = MultiLoRA(lm.model, CONFIG, [job.init_seed for job in jobs])
    with adapters.attached():
        trained = train(adapters, PackedModel(lm), jobs,
                        on_epoch=lambda k, epoch: seen.append((k, epoch)) or k == 1)
    assert sorted(seen) == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]
    assert [len(trained[k].curve()) for k in range(3)] == [4, 3, 8]
    for k, job in enumerate(jobs):
        expected = alone(lm, job)[0][: 3 if k == 1 else None]
        assert trained[k].curve()["loss"].to_numpy() == pytest.approx(expected, rel=TOLERANCE)
