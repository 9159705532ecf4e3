"""LoRA adapters as plain tensors: which layers they sit on, their first values, peft's files.

A frozen linear layer with K adapters, and which rows go to which of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from ..config import FinetuneConfig


@dataclass(frozen=True)
class PaddedRouting:
    """Blocks side by side, padded to the longest: two products for all adapters, for a GPU.

    which : shape (n,), adapter of each block
    take : shape (n, longest), place of each lane's slots, padding repeating the first
    real : shape (n, longest, 1), 1 where a slot is no padding
    back : shape (places,), lane slot of each place
    """

    which: torch.Tensor
    take: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor


@dataclass
class Routing:
    """Which places of the flattened batch go to which adapter, shared by all layers.

    blocks : (adapter, first place, place after the last), covering all places in order; None
        sends every place to `only`
    lanes : the same blocks for a GPU, where a product a block would be too many launches
    """

    blocks: list[tuple[int, int, int]] | None = None
    only: int = 0
    lanes: PaddedRouting | None = None

    def over(self, places: int) -> list[tuple[int, int, int]]:
        """The blocks of a batch of so many places."""
        return [(self.only, 0, places)] if self.blocks is None else self.blocks


def lanes_of(blocks: list[tuple[int, int, int]], device: torch.device) -> PaddedRouting:
    """Lay blocks out as lanes."""
    which, start, stop = (np.array(x) for x in zip(*blocks, strict=True))
    size, along = stop - start, np.arange((stop - start).max())
    real = along[None] < size[:, None]
    take = np.where(real, start[:, None] + along[None], start[:, None])
    on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return PaddedRouting(on(which), on(take), on(real)[..., None], on(np.flatnonzero(real)))


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with K adapters; stands where the layer stood.

    a : shape (K, d_in, rank); b : shape (K, rank, d_out); views of the stack's matrix in the
    dtype of the computation, with gradients added to grad_a and grad_b (float32).
    """

    def __init__(self, layer: nn.Module, route: Routing, scale: float) -> None:
        super().__init__()
        self.layer, self.route, self.scale = layer, route, scale
        self.a = self.b = self.grad_a = self.grad_b = self.trigger = None

    @property
    def weight(self) -> torch.Tensor:  # some models look at a layer's weight for its dtype
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.layer, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        apply = _Blocks.apply if self.route.lanes is None else _Lanes.apply
        return self.layer(x) + apply(x, self.trigger, self)


def base_layer(layer: nn.Module) -> nn.Module:
    """The frozen layer itself, with or without adapters on it."""
    return layer.layer if isinstance(layer, MultiLoRALinear) else layer


def shapes(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: nn.Linear and its kin, or GPT-2's Conv1D."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


class _Blocks(torch.autograd.Function):
    """The adapters' share of a layer's output; their gradients go straight to the stack's."""

    @staticmethod
    def forward(ctx, x, trigger, layer):
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty((len(flat), layer.b.shape[-1]))
        blocks = layer.route.over(len(flat))
        inner = []
        for k, start, stop in blocks:
            inner.append(flat[start:stop] @ layer.a[k])
            torch.mm(inner[-1], layer.b[k], out=out[start:stop])
        ctx.save_for_backward(flat, *inner)
        ctx.layer, ctx.blocks, ctx.shape = layer, blocks, x.shape
        return out.mul_(layer.scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        flat, *inner = ctx.saved_tensors
        layer = ctx.layer
        gradient = gradient.reshape(-1, gradient.shape[-1]) * layer.scale
        back = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        for (k, start, stop), z in zip(ctx.blocks, inner, strict=True):
            part = gradient[start:stop]
            slope = part @ layer.b[k].t()
            layer.grad_b[k] += z.t() @ part
            layer.grad_a[k] += flat[start:stop].t() @ slope
            if back is not None:
                torch.mm(slope, layer.a[k].t(), out=back[start:stop])
        return (None if back is None else back.view(ctx.shape)), None, None


class _Lanes(torch.autograd.Function):
    """The same by batched products over the route's lanes."""

    @staticmethod
    def forward(ctx, x, trigger, layer):
        lanes = layer.route.lanes
        flat = x.reshape(-1, x.shape[-1])
        lined = flat[lanes.take]
        inner = torch.bmm(lined, layer.a[lanes.which])
        out = torch.bmm(inner, layer.b[lanes.which]).flatten(0, 1)[lanes.back]
        ctx.save_for_backward(lined, inner)
        ctx.layer, ctx.lanes, ctx.shape = layer, lanes, x.shape
        return out.mul_(layer.scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        lined, inner = ctx.saved_tensors
        layer, lanes = ctx.layer, ctx.lanes
        gradient = gradient.reshape(-1, gradient.shape[-1])[lanes.take]
        gradient = gradient * (lanes.real * layer.scale).to(gradient.dtype)
        slope = torch.bmm(gradient, layer.b[lanes.which].transpose(1, 2))
        grad_a = torch.bmm(lined.transpose(1, 2), slope)
        grad_b = torch.bmm(inner.transpose(1, 2), gradient)
        layer.grad_a.index_add_(0, lanes.which, grad_a.to(layer.grad_a.dtype))
        layer.grad_b.index_add_(0, lanes.which, grad_b.to(layer.grad_b.dtype))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        back = torch.bmm(slope, layer.a[lanes.which].transpose(1, 2))
        return back.flatten(0, 1)[lanes.back].view(ctx.shape), None, None


def peft_config(config: FinetuneConfig) -> LoraConfig:
    """peft's own configuration of an adapter: LoRA, rsLoRA or DoRA."""
    targets = config.target_modules
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
    )


def scaling(config: FinetuneConfig) -> float:
    """What an adapter's output is multiplied by: alpha / rank; rsLoRA: alpha / sqrt(rank)."""
    return config.alpha / (math.sqrt(config.rank) if config.method == "rslora" else config.rank)


def target_layers(model: nn.Module, config: FinetuneConfig) -> dict[str, nn.Module]:
    """The layers peft would put an adapter on, by name, in the model's order.

    peft chooses (it knows that "all-linear" leaves out the output layer, and GPT-2's Conv1D); its
    adapter is removed again at once.
    """
    wrapped = get_peft_model(model, peft_config(config))
    names = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    wrapped.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name: model.get_submodule(name) for name in names}


def target_names(model: nn.Module, layers: Collection[str]) -> set[str]:
    """What to call these layers so that peft finds them again, and no others.

    Their last parts, as peft itself writes them; full names where the model has further layers
    that end in the same part.
    """
    short = {name.rsplit(".", 1)[-1] for name in layers}
    reached = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short}
    return short if reached <= set(layers) else set(layers)


def first_values(name: str, rank: int, fan_in: int, init_seed: int) -> torch.Tensor:
    """The first value of a layer's A, float32, shape (rank, fan_in); B starts at zero.

    The distribution is peft's: uniform in +-1/sqrt(fan_in) (Kaiming with a = sqrt 5). The seed is
    mixed with the layer's name, so the values depend neither on the order of layers nor on how
    many adapters are trained together: the same seed is the same adapter for every set.
    """
    digest = hashlib.sha256(f"{init_seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(rank, fan_in).uniform_(-bound, bound, generator=generator)


def set_first_values(wrapped: nn.Module, init_seed: int) -> None:
    """Give every LoRA layer of a PeftModel its `first_values`."""
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.lora_A["default"].weight
            with torch.no_grad():
                weight.copy_(first_values(name, *weight.shape, init_seed))


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: FinetuneConfig,
    targets: set[str],
    base: str,
) -> None:
    """Write an adapter as peft does, for `PeftModel.from_pretrained`.

    tensors : layer name -> A, shape (rank, d_in), and B, shape (d_out, rank)
    targets : peft's `target_modules`; see `target_names`
    base : the base model's name, for peft's `base_model_name_or_path`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for name, (a, b) in tensors.items():
        flat[f"base_model.model.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        flat[f"base_model.model.{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    save_file(flat, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = peft_config(config)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.target_modules = targets
    settings.save_pretrained(str(folder))
