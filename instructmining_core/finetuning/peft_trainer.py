"""The loop for parameters that torch optimises; the same steps and loss as `training.train`.

A model that needs several GPUs: each process keeps a part of every decoder layer's weights.

By torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277): a layer is gathered while it
computes and dropped after. Embeddings, norms, output matrix and adapters stay whole on every
process. FSDP averages gradients over the processes; here they are summed, since the weights of the
targets are already those of the whole step (`distributed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..config import FinetuneConfig
from ..models.causal_lm import LM
from ..models.distributed import Group
from .packing import PackedModel
from .trainer import MicroBatcher, Schedule, Trained, TrainingJob, course, loss_scale, micro_batches


def cut(model: nn.Module, device: str, group: Group) -> None:
    """Cut the weights of each decoder layer up among the processes; the rest goes to `device`.

    model : on the CPU, changed in place; what an adapter adds to a layer is left whole
    """
    mesh = init_device_mesh(torch.device(device).type, (group.size,))
    for layer in decoder_layers(model):
        whole = {p for name, p in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.to(device)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's largest list of modules: its decoder layers, in any Hugging Face causal LM."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def whole_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Gradients that FSDP has not summed already."""
    return [p.grad for p in parameters if not isinstance(p.grad, DTensor)]


def clip(parameters: Iterable[nn.Parameter], limit: float, group: Group) -> None:
    """As `nn.utils.clip_grad_norm_` (norm 2, eps 1e-6), where some gradients are cut up."""
    parts = [p.grad for p in parameters]
    own = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    squares = torch.stack([part.float().square().sum() for part in own])
    cut_up = torch.tensor([isinstance(part, DTensor) for part in parts], device=squares.device)
    others = (squares * cut_up).sum()
    group.add_up(others)
    norm = (others + (squares * ~cut_up).sum()).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    for part in own:
        part.mul_(factor)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with every tensor whole, on the CPU; all processes must ask together."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()
        for name, t in model.state_dict().items()
    }


def train_by_torch(
    tuned: LM,
    job: TrainingJob,
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
    body, plan = PackedModel(tuned, packed=packed), course(job, config)
    parameters = [p for p in tuned.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas,
                                  weight_decay=config.weight_decay)
    losses = torch.zeros(1, len(plan.steps), device=body.device)
    # a layer that is cut up is gathered by all processes at once, so none can go its own way
    micro = MicroBatcher(config.micro_tokens, group, halves=not cut)
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
    micro.group.add_up(*whole_gradients(parameters), losses[step : step + 1])
    if scale != 1:
        for parameter in parameters:
            parameter.grad.div_(scale)


def _backward(body, rows, plan: Schedule, step, losses, scale, group, tokens, spare) -> None:
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
        clip(parameters, limit, group)
    else:
        nn.utils.clip_grad_norm_(parameters, limit)


def _only_adapter_dropout(model: nn.Module) -> None:
    """Training mode for the adapters' dropout alone: the base's would make the loss random."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
