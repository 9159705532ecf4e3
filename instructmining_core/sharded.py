"""A model that needs several GPUs: each process keeps a part of every decoder layer's weights.

By torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277): a layer is gathered while it
computes and dropped after. Embeddings, norms, output matrix and adapters stay whole on every
process. FSDP averages gradients over the processes; here they are summed, since the weights of the
targets are already those of the whole step (`distributed`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .distributed import Group


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
