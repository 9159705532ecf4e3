"""The loss of a step, the order of rows, and that nothing but the specification moves them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from instructmining_core.config import FinetuneConfig, InstructMiningError, ModelRef
from instructmining_core.data.tokenization import Encoded
from instructmining_core.finetuning import packing
from instructmining_core.finetuning.finetune import (
    finetune,
    in_order,
    release,
    train_by_trainer,
)
from instructmining_core.finetuning.packing import pack, pad_right, weighted_nll
from instructmining_core.finetuning.trainer import (
    TrainingJob,
    learning_rates,
    micro_batches,
    row_order,
    schedule,
)
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


def losses(lm, config=CONFIG, rows=None) -> np.ndarray:
    tuned = finetune(lm, rows or rows_of(13), config, init_seed=1, order_seed=2)
    tuned.close()
    return tuned.curve["loss"].to_numpy()


def by_peft(lm, job, config=CONFIG, look=lambda lm: None):
    """Losses of the steps by peft and transformers alone, and what `look` sees of the model."""
    tuned, trained, _ = train_by_trainer(lm, job, config)
    seen = look(tuned)
    release(tuned.model)
    return trained.curve()["loss"].to_numpy(), seen


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
    assert batch.labels.tolist() == [8, 9, 5]
    assert batch.row_of.tolist() == [0, 0, 1]
    padded = pad_right(rows)
    assert padded.ids.tolist() == [[7, 8, 9], [4, 5, 0]]
    assert padded.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded.predict.tolist() == [0, 1, 3]


def test_what_rows_of_one_owner_begin_with_is_laid_out_once():
    head = tuple(range(20, 29))
    rows = [Encoded((*head, *rest), (*[False] * 9, *[True] * len(rest)))
            for rest in ((1, 2), (3,), (4,))]  # fmt: skip
    batch = pack(rows, owners=[0, 0, 1])
    assert batch.ids[0, :22].tolist() == [*head, 1, 2, 3, *head, 4]
    assert batch.positions[0, :22].tolist() == [*range(11), 9, *range(10)]
    assert batch.elsewhere.tolist() == [0, 9, 0] and batch.slots.tolist() == [11, 1, 10 + 42]
    assert batch.predict.tolist() == [8, 9, 8, 20]  # before 1, 2, 3 and 4
    assert batch.labels.tolist() == [1, 2, 3, 4] and batch.row_of.tolist() == [0, 0, 1, 2]
    assert batch.spans == ((0, 9, 1),)
    assert batch.take[batch.copies].tolist() == list(range(9))
    assert batch.take[batch.back].tolist() == list(range(64))
    assert pack(rows).spans == ((0, 9, 2),)
    short = [replace(row, ids=row.ids[2:], targets=row.targets[2:]) for row in rows]
    assert pack(short).spans == ()  # seven tokens are not worth it


@pytest.mark.parametrize("targets", [1, 64, 65, 200])
def test_a_batch_has_one_of_few_shapes(targets):
    row = Encoded(tuple(range(targets + 40)), (*[False] * 40, *[True] * targets))
    batch = pack([row])
    tokens = len(batch.ids[0])
    assert tokens % 64 == 0 and 0 <= tokens - len(row) < 64 and batch.slots.sum() == tokens
    assert len(batch.predict) == targets
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
def test_loss_does_not_depend_on_micro_batches_or_packing(lm, monkeypatch, micro_tokens, packed):
    expected = losses(lm)
    monkeypatch.setattr(packing, "_takes_packed_rows", lambda model: packed)
    config = replace(CONFIG, micro_tokens=micro_tokens)
    assert losses(lm, config) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("micro_tokens", [40, 8192])
def test_our_loop_and_peft_by_the_trainer_give_the_same_run(lm, micro_tokens):
    rows, config = rows_of(13), replace(CONFIG, micro_tokens=micro_tokens, weight_decay=0.1)
    ours = finetune(lm, rows, config, init_seed=1, order_seed=2)
    ours_nll = response_nll(ours.lm, rows)["nll"].to_numpy()
    ours.close()
    theirs, theirs_nll = by_peft(lm, TrainingJob(rows, 1, 2), config,
                                 lambda lm: response_nll(lm, rows)["nll"].to_numpy())
    assert ours.curve["loss"].to_numpy() == pytest.approx(theirs, rel=TOLERANCE)
    assert ours_nll == pytest.approx(theirs_nll, rel=1e-4)


def test_a_full_step_is_torch_s_own_on_the_mean_over_its_targets(lm):
    """By hand: float64 loss of all rows in one batch, clipped, AdamW; two steps."""
    rows, config = rows_of(8), replace(CONFIG, method="full", learning_rate=2e-3, batch_size=4,
                                       epochs=1, micro_tokens=40, weight_decay=0.1)
    plan = schedule(TrainingJob(rows, 0, 3), config)
    tuned = finetune(lm, rows, config, init_seed=0, order_seed=3)
    model = copy.deepcopy(lm.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=0.1)
    expected = []
    for step, rate in zip(plan.steps, plan.rates, strict=True):
        total, count = 0.0, 0
        for row in (rows[i] for i in step):
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double()
            wanted = torch.tensor(row.targets[1:])
            total += nn.functional.cross_entropy(
                logits[wanted], torch.tensor(row.ids[1:])[wanted], reduction="sum")
            count += int(wanted.sum())
        expected.append(total.item() / count)
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    # the second loss follows a step of Adam, which makes a gradient of rounding size a large one
    assert tuned.curve["loss"].to_numpy() == pytest.approx(expected, rel=TOLERANCE)
    ours, first = dict(tuned.lm.model.named_parameters()), dict(lm.model.named_parameters())
    for name, parameter in model.named_parameters():
        moved = (parameter - first[name]).norm()
        # for the same reason single numbers may differ
        assert moved > 0 and (ours[name] - parameter).norm() < 0.01 * moved, name


def test_steps_lie_end_to_end_and_are_filled_up():
    rows = rows_of(7)
    plan = schedule(TrainingJob(rows, 0, 0), replace(CONFIG, batch_size=4, epochs=2))
    laid = in_order(plan, 6)
    assert len(laid) == 4 * 6
    for number, step in enumerate(plan.steps):
        part = laid[6 * number : 6 * number + 6]
        assert [len(row) for row in part] == sorted(len(row) for row in part)
        assert sorted(row.ids for row in part if any(row.targets)) == sorted(
            rows[i].ids for i in step)


def test_adapter_dropout_acts_and_the_seed_repeats_it(lm):
    config = replace(CONFIG, dropout=0.5)
    first = losses(lm, config)
    assert (losses(lm, config) == first).all()
    assert first[0] == pytest.approx(losses(lm)[0], rel=1e-6)  # B = 0: nothing to drop yet
    assert abs(first[-1] / losses(lm)[-1] - 1) > 1e-4


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
    assert not hasattr(lm.model, "peft_config")


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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_divergence_is_told_and_ends(lm, method):
    config = replace(CONFIG, method=method, learning_rate=1e30, clip=0)
    tuned = finetune(lm, rows_of(13), config, init_seed=0, order_seed=0)
    tuned.close()
    assert tuned.diverged and len(tuned.curve) < 6


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_on_epoch_sees_the_model_and_can_end_training(lm, method):
    seen, config = [], replace(CONFIG, method=method, epochs=3)

    def look(tuned, epoch):
        seen.append((epoch, response_nll(tuned, rows_of(3))["nll"].sum()))
        return epoch == 2

    tuned = finetune(lm, rows_of(13), config, init_seed=0, order_seed=0, on_epoch=look)
    after = response_nll(tuned.lm, rows_of(3))["nll"].sum()
    tuned.close()
    assert [epoch for epoch, _ in seen] == [1, 2] and len(tuned.curve) == 6
    assert seen[1][1] == pytest.approx(after, rel=1e-6) and seen[0][1] != pytest.approx(after)


def test_a_set_without_targets_is_refused(lm):
    with pytest.raises(InstructMiningError, match="target token"):
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
    found = micro_batches([4, 5, 2, 20, 1], 9, padded=False)
    assert [list(b) for b in found] == [[0, 1], [2], [3], [4]]
    assert [list(b) for b in micro_batches([4, 5, 2], 9, padded=True)] == [[0], [1], [2]]
