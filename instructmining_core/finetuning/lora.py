"""LoRA layers: a frozen linear layer with K adapters, which layers get them, peft's files."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from ..config import FinetuneConfig, InstructMiningError
from ..models.causal_lm import unwrapped
from ..models.cpu import linear


@dataclass(frozen=True)
class PaddedRouting:
    """Blocks side by side, padded to the longest: two products for all adapters, for a GPU.

    which : shape (n,), adapter of each block
    take : shape (n, longest), place of each slot, padding repeating the block's first
    real : shape (n, longest, 1), 1 where a slot is no padding
    back : shape (places,), slot of each place
    """

    which: torch.Tensor
    take: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor


@dataclass
class Routing:
    """Which places of the flattened batch go to which adapter, shared by all layers.

    blocks : (adapter, first place, place after the last), covering all places in order; the last
        None for all there are
    padded : the same blocks for a GPU, where a product a block would be too many launches
    """

    blocks: Sequence[tuple[int, int, int | None]] = ((0, 0, None),)
    padded: PaddedRouting | None = None


def padded_routing(blocks: list[tuple[int, int, int]], device: torch.device) -> PaddedRouting:
    """Lay blocks out side by side."""
    which, start, stop = (np.array(x) for x in zip(*blocks, strict=True))
    size, along = stop - start, np.arange((stop - start).max())
    real = along[None] < size[:, None]
    take = np.where(real, start[:, None] + along[None], start[:, None])
    on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return PaddedRouting(on(which), on(take), on(real)[..., None], on(np.flatnonzero(real)))


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with K adapters; stands where the layer stood.

    a : shape (K, d_in, rank); b : shape (K, rank, d_out); views of `MultiLoRA`'s matrix in
    the dtype of the computation, with gradients added to grad_a and grad_b (float32).
    """

    def __init__(self, layer: nn.Module, routing: Routing, scale: float) -> None:
        super().__init__()
        self.layer, self.routing, self.scale = layer, routing, scale
        self.a = self.b = self.grad_a = self.grad_b = self.trigger = None

    @property
    def weight(self) -> torch.Tensor:  # some models look at a layer's weight for its dtype
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.layer, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.routing.padded is not None:
            return self.layer(x) + _PaddedLoRA.apply(x, self.trigger, self)
        if type(self.layer) is nn.Linear:
            return _BlockLinear.apply(x, self.trigger, self)
        return self.layer(x) + _BlockLoRA.apply(x, self.trigger, self)


def shapes(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: nn.Linear and its kin, or GPT-2's Conv1D."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


class _BlockLoRA(torch.autograd.Function):
    """The adapters' share of a layer's output; their gradients go straight to `MultiLoRA`'s."""

    @staticmethod
    def forward(ctx, x, trigger, layer):
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty((len(flat), layer.b.shape[-1]))
        blocks = layer.routing.blocks
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


class _BlockLinear(torch.autograd.Function):
    """A frozen `nn.Linear` and its adapters: what they add goes into the layer's own output, and
    into the gradient of its input, in place. Each further pass over a batch costs as much as an
    adapter's products."""

    @staticmethod
    def forward(ctx, x, trigger, layer):
        flat = x.reshape(-1, x.shape[-1])
        out = linear(flat, layer.weight, layer.bias)
        blocks, inner = layer.routing.blocks, []
        for k, start, stop in blocks:
            inner.append((flat[start:stop] @ layer.a[k]).mul_(layer.scale))
            out[start:stop].addmm_(inner[-1], layer.b[k])
        ctx.save_for_backward(flat, *inner)
        ctx.layer, ctx.blocks, ctx.shape = layer, blocks, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        flat, *inner = ctx.saved_tensors
        layer = ctx.layer
        gradient = gradient.reshape(-1, gradient.shape[-1])
        back = linear(gradient, layer.weight.t()) if ctx.needs_input_grad[0] else None
        for (k, start, stop), z in zip(ctx.blocks, inner, strict=True):
            part = gradient[start:stop]
            slope = (part @ layer.b[k].t()).mul_(layer.scale)
            layer.grad_b[k] += z.t() @ part
            layer.grad_a[k] += flat[start:stop].t() @ slope
            if back is not None:
                back[start:stop].addmm_(slope, layer.a[k].t())
        return (None if back is None else back.view(ctx.shape)), None, None


class _PaddedLoRA(torch.autograd.Function):
    """The same by batched products over a `PaddedRouting`."""

    @staticmethod
    def forward(ctx, x, trigger, layer):
        routing = layer.routing.padded
        flat = x.reshape(-1, x.shape[-1])
        lined = flat[routing.take]
        inner = torch.bmm(lined, layer.a[routing.which])
        out = torch.bmm(inner, layer.b[routing.which]).flatten(0, 1)[routing.back]
        ctx.save_for_backward(lined, inner)
        ctx.layer, ctx.routing, ctx.shape = layer, routing, x.shape
        return out.mul_(layer.scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        lined, inner = ctx.saved_tensors
        layer, routing = ctx.layer, ctx.routing
        gradient = gradient.reshape(-1, gradient.shape[-1])[routing.take]
        gradient = gradient * (routing.real * layer.scale).to(gradient.dtype)
        slope = torch.bmm(gradient, layer.b[routing.which].transpose(1, 2))
        grad_a = torch.bmm(lined.transpose(1, 2), slope)
        grad_b = torch.bmm(inner.transpose(1, 2), gradient)
        layer.grad_a.index_add_(0, routing.which, grad_a.to(layer.grad_a.dtype))
        layer.grad_b.index_add_(0, routing.which, grad_b.to(layer.grad_b.dtype))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        back = torch.bmm(slope, layer.a[routing.which].transpose(1, 2))
        return back.flatten(0, 1)[routing.back].view(ctx.shape), None, None


def peft_config(config: FinetuneConfig, model: nn.Module) -> LoraConfig:
    """peft's own configuration of an adapter on `model`: LoRA, rsLoRA or DoRA.

    Raises InstructMiningError where `config.layers` are more than the model has.
    """
    targets = config.target_modules
    found = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
    )
    if config.layers:
        count = unwrapped(model).config.get_text_config().num_hidden_layers
        if config.layers > count:
            raise InstructMiningError(
                f"finetune.layers is {config.layers}; the model has {count} layers.")
        if targets == "all-linear":  # peft takes only names beside numbers of layers
            found.target_modules = {name.rsplit(".", 1)[-1] for name in _adapted(model, found)}
        found.layers_to_transform = list(range(count - config.layers, count))
    return found


def scaling(config: FinetuneConfig) -> float:
    """What an adapter's output is multiplied by: alpha / rank; rsLoRA: alpha / sqrt(rank)."""
    return config.alpha / (math.sqrt(config.rank) if config.method == "rslora" else config.rank)


def target_layers(model: nn.Module, config: FinetuneConfig) -> dict[str, nn.Module]:
    """The layers peft would put an adapter on, by name, in the model's order."""
    names = _adapted(model, peft_config(config, model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name: model.get_submodule(name) for name in names}


def _adapted(model: nn.Module, settings: LoraConfig) -> list[str]:
    """Names of the layers that peft chooses; its adapter is removed again at once.

    It knows that "all-linear" leaves out the output layer, and GPT-2's Conv1D.
    """
    wrapped = get_peft_model(model, copy.deepcopy(settings))
    names = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    wrapped.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return names


def export_config(
    config: FinetuneConfig, model: nn.Module, layers: Collection[str]
) -> LoraConfig:
    """peft's configuration of a trained adapter: it finds these layers again, and no others.

    By their last parts, as peft itself writes them; by full names where the model has further
    layers that end in the same part.
    """
    settings = peft_config(config, model)
    settings.inference_mode = True
    if not config.layers:
        short = {name.rsplit(".", 1)[-1] for name in layers}
        reached = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short}
        settings.target_modules = short if reached <= set(layers) else set(layers)
    return settings


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
    folder: Path, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], settings: LoraConfig
) -> None:
    """Write an adapter as peft does, for `PeftModel.from_pretrained`.

    tensors : layer name -> A, shape (rank, d_in), and B, shape (d_out, rank)
    settings : of `export_config`
    """
    settings.save_pretrained(str(folder))
    flat = {f"base_model.model.{name}.lora_{part}.weight": tensor.cpu().contiguous()
            for name, pair in tensors.items() for part, tensor in zip("AB", pair, strict=True)}
    save_file(flat, folder / "adapter_model.safetensors", metadata={"format": "pt"})
