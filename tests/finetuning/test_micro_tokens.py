"""Where memory or a short number type runs out: smaller pieces, scaled gradients, the same run."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetuning.test_finetune import CONFIG, TOLERANCE, by_peft, losses, rows_of

from instructmining_core.config import ModelRef
from instructmining_core.finetuning import finetune, packing, trainer
from instructmining_core.finetuning.lora import MultiLoRA
from instructmining_core.finetuning.packing import PackedModel
from instructmining_core.finetuning.trainer import (
    MicroBatcher,
    TrainingJob,
    adapters_per_pass,
    loss_scale,
    train,
)
from instructmining_core.models.batching import trainable_tokens
from instructmining_core.models.causal_lm import LM, load_lm


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


def short_of_memory(monkeypatch, limit: int) -> list[int]:
    """Let a micro-batch of more than `limit` tokens fail after its backward pass; sizes tried."""
    real, sizes = PackedModel.loss, []
    monkeypatch.setattr(packing, "_TOKENS", 1)  # no filling: the batch's tokens are the rows' own

    def loss(self, batch, weights):
        total, each = real(self, batch, weights)
        sizes.append(batch.ids.numel())
        if batch.ids.numel() > limit:
            total.backward()  # what it adds to the gradients must be taken back
            raise RuntimeError("CUDA out of memory")
        return total, each

    monkeypatch.setattr(PackedModel, "loss", loss)
    return sizes


def test_a_step_that_does_not_fit_is_done_in_halves_with_the_same_numbers(lm, monkeypatch):
    config = replace(CONFIG, micro_tokens=64)
    expected = losses(lm, config)
    sizes = short_of_memory(monkeypatch, 40)
    assert losses(lm, config) == pytest.approx(expected, rel=TOLERANCE)
    over = [size for size in sizes if size > 40]
    assert len(over) == 1 and max(sizes[sizes.index(over[0]) + 1 :]) <= 32


def test_a_micro_batch_is_no_larger_than_memory_holds(lm, monkeypatch):
    """A CPU gives no error to go by: two processes of 13 GB each were killed at 8,192 tokens."""
    config = replace(CONFIG, micro_tokens=64)
    expected, sizes = losses(lm, config), []
    real = PackedModel.batch
    monkeypatch.setattr(PackedModel, "batch", lambda self, rows, *more: sizes.append(
        sum(map(len, rows))) or real(self, rows, *more))
    token = trainable_tokens(lm.config, 4, 1, 1e12)  # of one layer in a terabyte
    layers = lm.config.num_hidden_layers
    monkeypatch.setattr(trainer, "free_bytes", lambda device: 40 * layers * 1e12 / token / 0.35)
    assert losses(lm, config) == pytest.approx(expected, rel=TOLERANCE)
    assert 20 < max(sizes) <= 41


def test_a_token_s_activations_are_as_measured_on_smollm2():
    shape = SimpleNamespace(hidden_size=576, intermediate_size=1536)
    assert 8e9 / trainable_tokens(shape, 4, 30, 8e9) == pytest.approx(2.72e6, rel=0.01)
    assert trainable_tokens(shape, 2, 6, 1e9) == pytest.approx(10 * 8e9 / 2.72e6 / 8, rel=0.01)


def test_the_trainer_begins_anew_with_half_the_rows_at_once(lm, monkeypatch):
    job, config = TrainingJob(rows_of(13), 1, 2), replace(CONFIG, method="dora")
    expected, sizes, real = by_peft(lm, job, config)[0], [], finetune._loss

    def loss(outputs, labels, num_items_in_batch):
        sizes.append(len(labels))
        if len(sizes) == 3 or len(labels) > 2:
            raise RuntimeError("CUDA out of memory")
        return real(outputs, labels, num_items_in_batch)

    monkeypatch.setattr(finetune, "_loss", loss)
    assert by_peft(lm, job, config)[0] == pytest.approx(expected, rel=TOLERANCE)
    assert sizes[:5] == [5, 2, 2, 1, 1] and set(sizes[4:]) == {1}
    sizes.clear()
    monkeypatch.setattr(finetune, "_loss", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        by_peft(lm, job, config)
    assert np.isfinite(losses(lm)).all()  # the base was given back


def test_a_row_that_does_not_fit_alone_is_an_error(lm, monkeypatch):
    short_of_memory(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        losses(lm)
    monkeypatch.undo()
    assert np.isfinite(losses(lm)).all()  # the base was given back


def test_halving_goes_from_what_was_tried_down_to_the_longest_row():
    def attempt(limit, lengths=(30, 10, 10, 10), tokens=1000):
        micro, tried = MicroBatcher(tokens), []

        def backward(size):
            tried.append(size)
            if size > limit:
                raise MemoryError

        try:
            micro.step(lengths, backward, lambda: None)
        except MemoryError:
            tried.append("error")
        return tried

    assert attempt(2000) == [1000]
    assert attempt(35) == [1000, 30]  # half of the 60 tokens there are
    assert attempt(20) == [1000, 30, "error"]
    assert attempt(25, lengths=(20, 20, 20, 20, 20)) == [1000, 50, 25]


def test_other_errors_are_not_tried_again():
    calls = []
    with pytest.raises(RuntimeError, match="shape"):
        MicroBatcher(9).step([5, 4], lambda size: calls.append(size) or fail("shape"), fail)
    assert calls == [9]


def fail(text="cleared"):
    raise RuntimeError(text)


def test_loss_scale_is_a_power_of_two_near_the_number_of_tokens():
    assert [loss_scale(n, torch.float16) for n in (0, 1, 3, 4, 5000)] == [1, 1, 2, 4, 4096]
    assert loss_scale(5000, torch.bfloat16) == loss_scale(5000, torch.float32) == 1


@pytest.fixture(scope="module")
def pair(lm) -> tuple[LM, LM]:
    """A float32 and a float16 base of the same numbers, with an output matrix as small as that of
    a large model."""
    half = copy.deepcopy(lm.model)
    half.get_output_embeddings().weight.data.div_(1024)
    half = half.half()
    return (replace(lm, model=copy.deepcopy(half).float()),
            replace(lm, model=half, dtype=torch.float16))


def gradients_of_adapters(lm: LM) -> torch.Tensor:
    adapters = MultiLoRA(lm.model, replace(CONFIG, batch_size=60, epochs=1), [0, 1])
    adapters.values.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapters.work.copy_(adapters.values)
    found = []
    adapters.step = lambda rates: found.append(adapters.gradients.clone())
    with adapters.attached():
        train(adapters, PackedModel(lm),
              [TrainingJob(rows_of(60), 0, 0), TrainingJob(rows_of(9, seed=1), 1, 0)])
    return found[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_float16_gradients_are_those_of_float32(pair, monkeypatch):
    whole, half = (gradients_of_adapters(lm) for lm in pair)
    for k in range(2):
        assert error(half[k], whole[k]) < 0.02
    monkeypatch.setattr(trainer, "loss_scale", lambda tokens, dtype: 1.0)
    assert error(gradients_of_adapters(pair[1])[0], whole[0]) > 0.1  # what the scale is for


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_float16_base_is_trained_in_float32_by_torch(pair, method):
    job, config = TrainingJob(rows_of(13), 1, 2), replace(CONFIG, method=method, learning_rate=2e-3)
    whole, half = (by_peft(lm, job, config)[0] for lm in pair)
    assert half == pytest.approx(whole, rel=TOLERANCE)


def test_width_is_a_quarter_of_the_free_memory(lm, monkeypatch):
    # two layers of rank 4: q, o 32 + 32; k, v 32 + 16; gate, up 32 + 64; down 64 + 32
    gpu, free = replace(lm, device="cuda:0"), [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**12))
    bytes_each = 22 * 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    for amount, expected in [(0, 1), (40 * bytes_each, 10), (40 * bytes_each - 4, 9),
                             (10**12, 64)]:
        free[0] = amount
        assert adapters_per_pass(gpu, CONFIG) == expected
    assert adapters_per_pass(lm, CONFIG) == 1
