"""Training and evaluating above kept states: the numbers of the whole model, each row once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from finetuning.test_finetune import rows_of
from finetuning.test_multi_lora import FAMILIES, family

from instructmining_core.config import FinetuneConfig
from instructmining_core.finetuning import packing
from instructmining_core.finetuning.lora import MultiLoRA
from instructmining_core.finetuning.packing import PackedModel
from instructmining_core.finetuning.trainer import TrainingJob, train
from instructmining_core.models import trunk as trunk_module
from instructmining_core.models.causal_lm import response_nll
from instructmining_core.models.trunk import Trunk, on_trunk, open_trunk

CONFIG = FinetuneConfig(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=5, layers=1)
# float32, sums over at most 64 numbers in another order (padded or packed), through two epochs
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))


def trained(lm, jobs, evaluated):
    """Loss curves, first gradients and losses on rows of adapters on the top layer."""
    adapters = MultiLoRA(lm.model, CONFIG, [job.init_seed for job in jobs])
    gradients, step = [], MultiLoRA.step

    def spy(self, rates):
        gradients.append(self.gradients.clone())
        return step(self, rates)

    with adapters.attached(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiLoRA, "step", spy)
        done = train(adapters, PackedModel(lm), jobs)
        losses = []
        for k in range(len(jobs)):
            adapters.use(k)
            losses.append(response_nll(lm, evaluated)["nll"].to_numpy())
    curves = [done[k].curve()["loss"].to_numpy() for k in range(len(jobs))]
    return curves, gradients[0], losses


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_the_whole_model_s(name, packed, tiny_tokenizer, monkeypatch):
    if not packed:
        monkeypatch.setattr(packing, "_takes_packed_rows", lambda model: False)
    lm = family(name, tiny_tokenizer)
    jobs = [TrainingJob(rows_of(9 + 4 * k, seed=k), init_seed=k, order_seed=5) for k in range(2)]
    evaluated = rows_of(6, seed=99)
    whole = trained(lm, jobs, evaluated)
    with on_trunk(lm, 1, [*jobs[0].rows, *jobs[1].rows, *evaluated]):
        assert lm.trunk is not None
        above = trained(lm, jobs, evaluated)
    assert lm.trunk is None
    for ours, theirs in zip(above[0] + above[2], whole[0] + whole[2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    assert (above[1] - whole[1]).norm() <= TOLERANCE * whole[1].norm()


def test_a_row_is_computed_once_and_kept_for_the_next_process(tiny_tokenizer, monkeypatch):
    lm, rows = family("qwen2", tiny_tokenizer), rows_of(7)
    assert Trunk(lm, 1).fill([*rows, *rows[:3]]) == len({row.ids for row in rows})
    again = Trunk(lm, 1)
    assert again.fill(rows) == 0
    assert [one.shape for one in again.states(rows)] == [(len(row), 32) for row in rows]
    other = replace(lm, resolved=replace(lm.resolved, revision="mended tokenizer"))
    assert Trunk(other, 1).fill(rows[:2]) == 2, "another identity has states of its own"


def test_the_layers_below_do_not_run(tiny_tokenizer):
    lm, rows = family("qwen2", tiny_tokenizer), rows_of(4)
    calls = []
    layer = lm.model.model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: calls.append("below"))
    with on_trunk(lm, 1, rows):
        calls.clear()
        response_nll(lm, rows)
        assert calls == []
    response_nll(lm, rows)
    assert calls


def test_bfloat16_states_come_back_bit_for_bit(tiny_tokenizer):
    lm, rows = family("qwen2", tiny_tokenizer), rows_of(3)
    lm = replace(lm, model=lm.model.bfloat16(), dtype=torch.bfloat16)
    trunk = Trunk(lm, 1)
    trunk.fill(rows)
    with torch.no_grad(), trunk_module.entering(trunk.layers[1]) as seen:
        lm.model.model(input_ids=torch.tensor([rows[0].ids]), use_cache=False)
    kept = trunk.states(rows)[0]
    assert kept.dtype == torch.bfloat16
    # one row alone and in a batch: products in another order, rounded to 8 bits
    assert (kept.float() - seen[0][0].float()).abs().max() <= 0.02 * kept.float().abs().max()


def test_a_model_that_cannot_be_cut_is_computed_whole_and_said(tiny_tokenizer):
    lm = family("qwen2", tiny_tokenizer)
    first, last = lm.model.model.layers
    plain, inside = type(last).forward, []

    def uses_what_lies_below(self, hidden_states, *args, **kwargs):
        return plain(self, hidden_states, *args, **kwargs) + sum(inside)

    lm.model.model.register_forward_pre_hook(lambda *_: inside.clear())
    first.mlp.register_forward_hook(lambda _, __, out: inside.append(out.mean()))
    last.forward = uses_what_lies_below.__get__(last)
    with pytest.warns(UserWarning, match="cannot be cut below its top 1 layers"):
        assert open_trunk(lm, 1) is None
    assert open_trunk(lm, 0) is None and open_trunk(lm, 2) is None


def test_the_first_pass_over_a_base_may_be_an_evaluation_above_kept_states(tiny_tokenizer):
    """All is kept and the batch size given, so nothing asks before; a head is tried on 8 tokens."""
    lm, rows = family("qwen2", tiny_tokenizer), rows_of(4)
    Trunk(family("qwen2", tiny_tokenizer), 1).fill(rows)
    with on_trunk(lm, 1, rows):
        above = response_nll(lm, rows, batch_tokens=64)["nll"]
    whole = response_nll(family("qwen2", tiny_tokenizer), rows)["nll"]
    np.testing.assert_allclose(above, whole, rtol=TOLERANCE)


def test_losses_above_kept_states_are_computed_on_packed_rows_too(tiny_tokenizer):
    """Rows that begin alike, whose common beginning the states hold once for each."""
    lm, head = family("qwen2", tiny_tokenizer), tuple(range(40, 50))
    rows = [replace(row, ids=(*head, *row.ids), targets=(*[False] * 10, *row.targets))
            for row in rows_of(6)]  # fmt: skip
    whole = response_nll(lm, rows)["nll"]
    with on_trunk(lm, 1, rows), packing.packing(lm) as model:
        assert len(model.batch(rows).spans) == 1
        above = response_nll(lm, rows, batch_tokens=120)["nll"]
    np.testing.assert_allclose(above, whole, rtol=TOLERANCE)
