"""The loss of a step, the order of rows, and that nothing but the specification moves them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from instructmining_core.config import FinetuneConfig, ModelRef
from instructmining_core.data.tokenization import Encoded
from instructmining_core.finetuning.cross_entropy import weighted_nll
from instructmining_core.finetuning.finetune import FinetuneError, finetune
from instructmining_core.finetuning.packing import PackedModel, pack, pad_right
from instructmining_core.finetuning.trainer import learning_rates, micro_batches, row_order
from instructmining_core.models.causal_lm import Head, load_lm, response_nll

CONFIG = FinetuneConfig(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=5)
# float32 sums in another order; the first steps' losses agree far better than the last ones'
TOLERANCE = 2e-5


def rows_of(count: int, seed: int = 0, vocabulary: int = 300) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(6, 30))
        start = int(rng.integers(1, length - 2))
        ids = tuple(int(i) for i in rng.integers(3, vocabulary, length))
        rows.append(Encoded(ids, tuple(i >= start for i in range(length))))
    return rows


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


def losses(lm, config=CONFIG, rows=None, **options) -> np.ndarray:
    tuned = finetune(lm, rows or rows_of(13), config, init_seed=1, order_seed=2, **options)
    tuned.close()
    return tuned.curve["loss"].to_numpy()


def test_weighted_nll_is_the_hand_computed_sum_with_its_gradient():
    head = nn.Linear(2, 3, bias=False)
    head.weight = nn.Parameter(torch.tensor([[1.0, 0], [0, 1.0], [0, 0]]), requires_grad=False)
    hidden = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]], requires_grad=True)
    weights = torch.tensor([0.25, 0.5])
    total, each = weighted_nll(hidden, Head("direct", head), head, torch.tensor([0, 1]), weights)
    # first row: shares (2, 1, 1)/4; second: thirds
    assert each.tolist() == pytest.approx([math.log(2), math.log(3)], abs=1e-6)
    assert total.item() == pytest.approx(0.25 * math.log(2) + 0.5 * math.log(3), abs=1e-6)
    total.backward()
    expected = [[0.25 * (0.5 - 1), 0.25 * 0.25], [0.5 / 3, 0.5 * (1 / 3 - 1)]]
    assert torch.allclose(hidden.grad, torch.tensor(expected), atol=1e-6)


def test_packing_is_the_literal_layout():
    rows = [Encoded((7, 8, 9), (False, True, True)), Encoded((4, 5), (False, True))]
    batch = pack(rows)
    assert batch.ids.tolist() == [[7, 8, 9, 4, 5, *[0] * 59]]  # filled up to 64
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, *range(59)]]
    assert batch.slots.tolist() == [3, 61]  # the filling goes where the last row goes
    assert batch.groups == ((1, 64), (2, 16))
    assert batch.predict.tolist() == [0, 1, 3]
    assert batch.read.tolist() == list(range(64))  # three targets, filled up with other places
    assert batch.labels.tolist() == [8, 9, 5]
    assert batch.row_of.tolist() == [0, 0, 1]
    padded = pad_right(rows)
    assert padded.ids.tolist() == [[7, 8, 9], [4, 5, 0]]
    assert padded.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded.predict.tolist() == [0, 1, 3]


@pytest.mark.parametrize("targets", [1, 64, 65, 200])
def test_a_batch_has_one_of_few_shapes_and_reads_every_target(targets):
    row = Encoded(tuple(range(targets + 40)), (*[False] * 40, *[True] * targets))
    batch = pack([row])
    tokens = len(batch.ids[0])
    assert tokens % 64 == 0 and 0 <= tokens - len(row) < 64 and batch.slots.sum() == tokens
    assert len(batch.read) % 64 == 0 and len(batch.read) - targets < 64
    assert batch.read.tolist() == sorted(set(batch.read.tolist()) | set(batch.predict.tolist()))
    assert all(longest % 16 == 0 for _, longest in batch.groups)


def test_the_first_token_of_a_row_is_never_a_target():
    batch = pack([Encoded((7, 8), (True, True))])
    assert batch.labels.tolist() == [8]


def test_step_loss_against_a_naive_loop(lm):
    rows = rows_of(13)
    first = row_order(13, 2, 5, order_seed=2)[0][0]
    total, count = 0.0, 0
    for i in first:
        logits = lm.model(input_ids=torch.tensor([rows[i].ids])).logits[0].double()
        for place in range(1, len(rows[i].ids)):
            if rows[i].targets[place]:
                total -= logits[place - 1].log_softmax(-1)[rows[i].ids[place]].item()
                count += 1
    assert losses(lm, rows=rows)[0] == pytest.approx(total / count, rel=1e-6)


def test_a_mean_of_means_would_be_another_number(lm):
    """The rows differ enough in length that the wrong average would be seen."""
    frame = response_nll(lm, [rows_of(13)[i] for i in row_order(13, 2, 5, 2)[0][0]])
    of_means = (frame["nll"] / frame["tokens"]).mean()
    assert abs(losses(lm)[0] - of_means) > 1e-3


@pytest.mark.parametrize("micro_tokens", [1, 40, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_does_not_depend_on_micro_batches_or_packing(lm, micro_tokens, packed):
    config = replace(CONFIG, micro_tokens=micro_tokens)
    assert losses(lm, config, packed=packed) == pytest.approx(losses(lm), rel=TOLERANCE)


def test_stack_and_peft_give_the_same_run(lm):
    rows = rows_of(13)
    ours = finetune(lm, rows, CONFIG, init_seed=1, order_seed=2, engine="stacked")
    ours_nll = response_nll(ours.lm, rows)["nll"].to_numpy()
    ours.close()
    theirs = finetune(lm, rows, CONFIG, init_seed=1, order_seed=2, engine="peft")
    theirs_nll = response_nll(theirs.lm, rows)["nll"].to_numpy()
    theirs.close()
    assert ours.curve["loss"].to_numpy() == pytest.approx(theirs.curve["loss"], rel=TOLERANCE)
    assert ours_nll == pytest.approx(theirs_nll, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_every_method_learns_and_gives_the_base_back(lm, method):
    rows = rows_of(8)
    rate = 2e-3 if method == "full" else 1e-2
    config = replace(CONFIG, method=method, epochs=6, learning_rate=rate)
    before = response_nll(lm, rows)["nll"].to_numpy()
    tuned = finetune(lm, rows, config, init_seed=0, order_seed=0)
    after = response_nll(tuned.lm, rows)["nll"].to_numpy()
    tuned.close()
    assert after.sum() < 0.97 * before.sum()
    assert (response_nll(lm, rows)["nll"].to_numpy() == before).all()
    assert not [n for n, _ in lm.model.named_parameters() if "lora" in n or "layer.layer" in n]


def test_rslora_scales_by_the_root_of_the_rank(lm):
    """At rank 4, alpha 8 as rsLoRA is alpha 16 as LoRA."""
    plain = losses(lm, replace(CONFIG, alpha=16))
    assert losses(lm, replace(CONFIG, method="rslora")) == pytest.approx(plain, rel=TOLERANCE)


def test_saved_adapter_is_peft_s(lm, tmp_path, tiny_lm_folder):
    from peft import PeftModel

    rows = rows_of(6)
    tuned = finetune(lm, rows, CONFIG, init_seed=0, order_seed=0)
    expected = response_nll(tuned.lm, rows)["nll"].to_numpy()
    tuned.save(tmp_path / "adapter")
    tuned.close()
    fresh = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")
    fresh.model = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter").eval()
    assert response_nll(fresh, rows)["nll"].to_numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_saved_by_the_libraries_and_loaded_by_them(lm, tmp_path, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows, rate = rows_of(6), 2e-3 if method == "full" else 1e-2
    tuned = finetune(lm, rows, replace(CONFIG, method=method, learning_rate=rate),
                     init_seed=0, order_seed=0)
    expected = response_nll(tuned.lm, rows)["nll"].to_numpy()
    tuned.save(tmp_path)
    tuned.close()
    source = tmp_path if method == "full" else lm.resolved.folder
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if method == "dora":
        model = PeftModel.from_pretrained(model, tmp_path)
    found = response_nll(replace(lm, model=model.eval()), rows)["nll"].to_numpy()
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(response_nll(lm, rows)["nll"].to_numpy(), rel=1e-2)


def test_seeds(lm):
    """The same seeds give the same run; each seed alone changes it."""
    def run(init, order):
        tuned = finetune(lm, rows_of(13), CONFIG, init_seed=init, order_seed=order)
        tuned.close()
        return tuned.curve["loss"].to_numpy()

    assert (run(1, 2) == run(1, 2)).all()
    assert run(1, 3)[0] != run(1, 2)[0]  # other rows in the first step
    other = run(5, 2)
    assert other[0] == pytest.approx(run(1, 2)[0], rel=1e-6)  # B = 0: the base's loss
    assert other[-1] != run(1, 2)[-1]


def test_divergence_is_told_and_ends(lm):
    tuned = finetune(lm, rows_of(13), replace(CONFIG, learning_rate=1e30, clip=0),
                     init_seed=0, order_seed=0)
    tuned.close()
    assert tuned.diverged and len(tuned.curve) < 6


def test_on_epoch_can_end_training(lm):
    seen = []
    tuned = finetune(lm, rows_of(13), CONFIG, init_seed=0, order_seed=0,
                     on_epoch=lambda model, epoch: seen.append(epoch) or True)
    tuned.close()
    assert seen == [1] and len(tuned.curve) == 3


def test_a_set_without_targets_is_refused(lm):
    with pytest.raises(FinetuneError, match="target token"):
        finetune(lm, [Encoded((3, 4), (False, False))], CONFIG, init_seed=0, order_seed=0)


def test_row_order_takes_every_row_once_an_epoch():
    plan = row_order(13, 2, 5, order_seed=3)
    assert [len(step) for step in plan[0]] == [5, 5, 3]
    for epoch in plan:
        assert sorted(np.concatenate(epoch)) == list(range(13))
    assert (np.concatenate(plan[0]) != np.concatenate(plan[1])).any()


def test_learning_rates_are_the_published_schedules():
    cosine = replace(CONFIG, learning_rate=1.0, schedule="cosine", warmup_share=0.2)
    assert learning_rates(cosine, 10) == pytest.approx(
        [0.5, 1, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))])
    linear = replace(CONFIG, learning_rate=2.0, schedule="linear", warmup_share=0)
    assert learning_rates(linear, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_micro_batches_keep_the_order_and_the_budget():
    assert [list(b) for b in micro_batches([4, 5, 2, 20, 1], 9)] == [[0, 1], [2], [3], [4]]
    assert [list(b) for b in micro_batches([4, 5, 2], 9, padded=True)] == [[0], [1], [2]]


def test_body_asks_the_model(lm):
    assert PackedModel(lm).packed
