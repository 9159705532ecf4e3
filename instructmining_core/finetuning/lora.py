"""K LoRA adapters over one frozen base, trained in one pass; which layers get them; peft's files.

Every row belongs to one adapter; the rows of an adapter lie together. The base multiplies all rows
at once, each adapter only its own. All adapters' values are one float32 matrix, shape (K, numbers
of one adapter), so that clipping, Adam and the schedule are a handful of operations on that matrix
with one learning rate a row, however many layers there are. Method: LoRA (Hu et al. 2021,
arXiv 2106.09685, equation 3); many adapters over one base as in mLoRA and S-LoRA, here for any
Hugging Face causal LM whose linear layers peft can target.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
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
    merged : one adapter's products are in the frozen weights, so there is nothing to add
    """

    blocks: Sequence[tuple[int, int, int | None]] = ((0, 0, None),)
    padded: PaddedRouting | None = None
    merged: bool = False


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
        if self.routing.merged:
            return linear(x, self.layer.weight, self.layer.bias)
        if self.routing.padded is not None:
            return self.layer(x) + _PaddedLoRA.apply(x, self.trigger, self)
        own = None if type(self.layer) is nn.Linear else self.layer(x)
        return _BlockLinear.apply(x, own, self.trigger, self)


def shapes(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: nn.Linear and its kin, or GPT-2's Conv1D."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


class _BlockLinear(torch.autograd.Function):
    """A frozen `nn.Linear` and its adapters: what they add goes into the layer's own output, and
    into the gradient of its input, in place. Each further pass over a batch costs as much as an
    adapter's products. The adapters' gradients go straight to `MultiLoRA`'s.

    own : output of a layer that is none, which autograd goes through; else None
    """

    @staticmethod
    def forward(ctx, x, own, trigger, layer):
        flat = x.reshape(-1, x.shape[-1])
        if own is None:
            out = linear(flat, layer.weight, layer.bias)
        else:
            out = own.reshape(-1, own.shape[-1]).clone()
        blocks, inner = layer.routing.blocks, []
        for k, start, stop in blocks:
            inner.append((flat[start:stop] @ layer.a[k]).mul_(layer.scale))
            out[start:stop].addmm_(inner[-1], layer.b[k])
        ctx.save_for_backward(flat, *inner)
        ctx.layer, ctx.blocks, ctx.plain = layer, blocks, own is None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream):
        flat, *inner = ctx.saved_tensors
        layer, back = ctx.layer, None
        gradient = upstream.reshape(-1, upstream.shape[-1])
        if ctx.needs_input_grad[0]:
            back = linear(gradient, layer.weight.t()) if ctx.plain else torch.zeros_like(flat)
        for (k, start, stop), z in zip(ctx.blocks, inner, strict=True):
            part = gradient[start:stop]
            slope = (part @ layer.b[k].t()).mul_(layer.scale)
            layer.grad_b[k] += z.t() @ part
            layer.grad_a[k] += flat[start:stop].t() @ slope
            if back is not None:
                back[start:stop].addmm_(slope, layer.a[k].t())
        back = None if back is None else back.view(*upstream.shape[:-1], -1)
        return back, None if ctx.plain else upstream, None, None


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


class MultiLoRA:
    """K adapters on a model: values, gradients, optimiser; on it inside `attached`."""

    def __init__(
        self, model: nn.Module, config: FinetuneConfig, init_seeds: Sequence[int]
    ) -> None:
        """config : of all K; init_seeds : one an adapter"""
        self.model, self.config, self.routing = unwrapped(model), config, Routing()
        self.layers = {name: MultiLoRALinear(layer, self.routing, scaling(config))
                       for name, layer in target_layers(self.model, config).items()}
        self.exported = export_config(config, self.model, self.layers)
        sample = next(iter(self.layers.values())).layer.weight
        self.device = sample.device
        self.padded = self.device.type == "cuda"  # a product an adapter would be many launches
        self.dtype = sample.dtype if sample.dtype.is_floating_point else torch.float32
        self._spans, size = [], 0  # first number of each layer's A, first of its B, end
        for layer in self.layers.values():
            d_in, d_out = (width * config.rank for width in shapes(layer.layer))
            self._spans.append((size, size + d_in, size + d_in + d_out))
            size += d_in + d_out
        self.values, self.gradients, self._mean, self._square = torch.zeros(
            4, len(init_seeds), size, device=self.device)
        self._steps = torch.zeros(len(init_seeds), 1, device=self.device)
        for (name, layer), (a, b, _) in zip(self.layers.items(), self._spans, strict=True):
            for k, seed in enumerate(init_seeds):
                first = first_values(name, config.rank, shapes(layer.layer)[0], seed)
                self.values[k, a:b] = first.t().reshape(-1).to(self.device)
        self.work = self.values.to(self.dtype)  # the values themselves in float32
        trigger = torch.zeros((), device=self.device, requires_grad=True)
        for layer, span in zip(self.layers.values(), self._spans, strict=True):
            layer.a, layer.b = self._views(self.work, layer, span)
            layer.grad_a, layer.grad_b = self._views(self.gradients, layer, span)
            layer.trigger = trigger

    def _views(self, matrix: torch.Tensor, layer: MultiLoRALinear, span) -> tuple:
        (d_in, d_out), rank = shapes(layer.layer), self.config.rank
        a, b, end = span
        return matrix[:, a:b].view(-1, d_in, rank), matrix[:, b:end].view(-1, rank, d_out)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The adapters are on the model inside the block; their values stay here after it."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                self.model.set_submodule(name, layer.layer)

    def send(self, owners: Sequence[int], slots: Sequence[int]) -> None:
        """Send each row of a batch to its adapter.

        owners : adapter of each row, those of one adapter together; slots : places a row takes
        """
        ends = np.cumsum(slots)
        starts = ends - slots
        runs = [list(run) for _, run in groupby(range(len(owners)), owners.__getitem__)]
        blocks = [(owners[run[0]], int(starts[run[0]]), int(ends[run[-1]])) for run in runs]
        self.routing.blocks = blocks
        self.routing.padded = padded_routing(blocks, self.device) if self.padded else None

    def use(self, adapter: int) -> None:
        """Send every row to one adapter, for evaluation and generation."""
        self.routing.blocks, self.routing.padded = [(adapter, 0, None)], None

    @contextmanager
    def alone(self, adapter: int) -> Iterator[None]:
        """Every row goes to one adapter inside the block, and nothing is trained.

        In float32 its products are added to the frozen weights there: to rounding the same, and a
        batch is gone through once a layer. In a coarser dtype the sum would be rounded to it.
        """
        self.use(adapter)
        plain = [one for one in self.layers.values() if type(one.layer) is nn.Linear]
        if self.dtype != torch.float32 or len(plain) < len(self.layers):
            yield
            return
        kept = [one.layer.weight.data for one in plain]
        try:
            for one, weight in zip(plain, kept, strict=True):
                products = one.a[adapter] @ one.b[adapter]
                one.layer.weight.data = torch.add(weight, products.t(), alpha=one.scale)
            self.routing.merged = True
            yield
        finally:
            self.routing.merged = False
            for one, weight in zip(plain, kept, strict=True):
                one.layer.weight.data = weight

    def step(self, rates: np.ndarray) -> torch.Tensor:
        """Clip each adapter's gradient, take one AdamW step, clear the gradients.

        rates : shape (K,), learning rate of each adapter; NaN leaves an adapter as it is
        returns : shape (K,), gradient norms before clipping

        As `torch.optim.AdamW` (eps 1e-8) after `clip_grad_norm_`, adapter by adapter.
        """
        gradients = self.gradients
        norms = gradients.norm(dim=1)
        if self.config.clip > 0:
            gradients.mul_((self.config.clip / (norms + 1e-6)).clamp(max=1)[:, None])
        rate = torch.as_tensor(rates, dtype=torch.float32, device=self.device)[:, None]
        active = ~rate.isnan()
        rate = rate.nan_to_num()
        first, second = self.config.betas
        self._steps += active
        self._mean.lerp_(gradients, 1 - first)
        self._square.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        self.values.mul_(1 - rate * self.config.weight_decay)
        ago = self._steps.clamp(min=1)
        size = (self._square / (1 - second**ago)).sqrt_().add_(1e-8)
        self.values.addcdiv_(self._mean * (-rate / (1 - first**ago)), size)
        gradients.zero_()
        if self.work is not self.values:
            self.work.copy_(self.values)
        return norms

    def tensors(self, adapter: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer name -> (A, shape (rank, d_in); B, shape (d_out, rank)) in float32, as peft's."""
        found = {}
        for (name, layer), span in zip(self.layers.items(), self._spans, strict=True):
            a, b = self._views(self.values[adapter : adapter + 1], layer, span)
            found[name] = (a[0].t().clone(), b[0].t().clone())
        return found

    def save(self, adapter: int, folder: Path, base: str) -> None:
        """Write one adapter as peft does; `PeftModel.from_pretrained` loads it."""
        self.exported.base_model_name_or_path = base
        self.exported.save_pretrained(str(folder))
        flat = {f"base_model.model.{name}.lora_{part}.weight": tensor.cpu().contiguous()
                for name, pair in self.tensors(adapter).items()
                for part, tensor in zip("AB", pair, strict=True)}  # fmt: skip
        save_file(flat, folder / "adapter_model.safetensors", metadata={"format": "pt"})


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
    """Names of the layers that peft chooses; its adapter is removed again at once."""
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
    mixed with the layer's name: the same seed is the same adapter for every set, in any company.
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
