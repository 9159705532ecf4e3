"""The loop for parameters that torch optimises; the same steps and loss as `training.train`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from tqdm.auto import tqdm

from . import sharded
from .distributed import Group
from .lm import LM
from .micro_tokens import MicroTokens
from .packed import Body
from .profiles import FinetuneConfig
from .training import Course, Job, Trained, course, loss_scale
from .training_plan import micro_batches


def train_by_torch(
    tuned: LM,
    job: Job,
    config: FinetuneConfig,
    group: Group,
    *,
    on_epoch: Callable[[LM, int], bool | None] | None = None,
    progress: bool = False,
    packed: bool | None = None,
    cut: bool = False,
) -> Trained:
    """Train those of `tuned.model`'s parameters that ask for a gradient.

    on_epoch, progress, packed : as in `finetune`
    cut : the model's layers are cut up among the processes (`sharded.cut`)
    """
    body, plan = Body(tuned, packed=packed), course(job, config)
    parameters = [p for p in tuned.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas,
                                  weight_decay=config.weight_decay)
    losses = torch.zeros(1, len(plan.steps), device=body.device)
    # a layer that is cut up is gathered by all processes at once, so none can go its own way
    micro = MicroTokens(config.micro_tokens, group, halves=not cut)
    _only_adapter_dropout(tuned.model)
    for step in tqdm(range(len(plan.steps)), desc="steps", disable=not progress):
        _gradients(body, plan, step, losses[0], micro, cut, parameters, optimizer)
        if config.clip > 0:
            _clip(parameters, config.clip, group, cut)
        optimizer.param_groups[0]["lr"] = plan.rates[step]
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(losses[0, step]):
            plan.ended, plan.diverged = step + 1, True
        elif plan.epoch_ends(step) and on_epoch is not None:
            if on_epoch(tuned, int(plan.epoch[step]) + 1):
                plan.ended = step + 1
            _only_adapter_dropout(tuned.model)
        if plan.ended is not None:
            break
    tuned.model.eval()
    return Trained([plan], losses.double().cpu().numpy())


def _gradients(body, plan, step, losses, micro, cut, parameters, optimizer) -> None:
    """The step's gradients, summed over the processes; its loss in `losses[step]`."""
    rows = [plan.job.rows[i] for i in plan.steps[step]]
    mine = [rows[i] for i in micro.group.share([len(row) for row in rows])]
    scale = loss_scale(plan.tokens[step], body.lm.dtype)
    spare = min(rows, key=len) if cut else None

    def clear() -> None:
        optimizer.zero_grad()
        losses[step] = 0

    micro.step(
        [len(row) for row in mine],
        lambda tokens: _backward(body, mine, plan, step, losses, scale, micro.group, tokens, spare),
        clear,
    )
    if micro.group.size > 1:
        for parameter in parameters:  # a process without rows has no gradient to add
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    micro.group.add_up(*sharded.whole_gradients(parameters), losses[step : step + 1])
    if scale != 1:
        for parameter in parameters:
            parameter.grad.div_(scale)


def _backward(body, rows, plan: Course, step, losses, scale, group, tokens, spare) -> None:
    """Micro-batches of this process's rows; with `spare`, as many as any process has.

    spare : a row that stands, with weight 0, in the micro-batches that this process lacks
    """
    share = 1 / max(1, plan.tokens[step])
    lengths = [len(row) for row in rows]
    parts = [([rows[i] for i in part], share)
             for part in micro_batches(lengths, tokens, padded=not body.packed)]
    if spare is not None:
        parts += [([spare], 0.0)] * (group.most(len(parts)) - len(parts))
    mixed = body.lm.dtype != next(body.model.parameters()).dtype  # a float32 copy of a bf16 base
    half = torch.autocast(body.device.type, body.lm.dtype) if mixed else nullcontext()
    for part, weight in parts:
        batch = body.batch(part)
        weights = torch.full(batch.labels.shape, weight * scale, device=body.device)
        with half:
            loss, each = body.loss(batch, weights)
        loss.backward()
        losses[step] += (each * weights).sum() / scale


def _clip(parameters, limit: float, group: Group, cut: bool) -> None:
    if cut:
        sharded.clip(parameters, limit, group)
    else:
        nn.utils.clip_grad_norm_(parameters, limit)


def _only_adapter_dropout(model: nn.Module) -> None:
    """Training mode for the adapters' dropout alone: the base's would make the loss random."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
