"""K LoRA adapters over one frozen base, trained in one pass.

Every row belongs to one adapter; the rows of an adapter lie together. The base multiplies all rows
at once, each adapter only its own. All adapters' values are one float32 matrix, shape (K, numbers
of one adapter), so that clipping, Adam and the schedule are a handful of operations on that matrix
with one learning rate a row, however many layers there are. Method: LoRA (Hu et al. 2021,
arXiv 2106.09685, equation 3); many adapters over one base as in mLoRA and S-LoRA, here for any
Hugging Face causal LM whose linear layers peft can target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import FinetuneConfig
from ..models.causal_lm import unwrapped
from .lora import (
    MultiLoRALinear,
    Routing,
    export_config,
    first_values,
    padded_routing,
    save_adapter,
    scaling,
    shapes,
    target_layers,
)


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
        self._spans = _spans(self.layers, config.rank)
        size = self._spans[-1][-1]
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

    def save(self, adapter: int, folder: str | Path, base: str) -> None:
        """Write one adapter as peft does; `PeftModel.from_pretrained` loads it."""
        self.exported.base_model_name_or_path = base
        save_adapter(Path(folder), self.tensors(adapter), self.exported)


def _spans(layers: dict[str, MultiLoRALinear], rank: int) -> list[tuple[int, int, int]]:
    """Where each layer's A and B lie in a row of the matrix: first of A, first of B, end."""
    spans, at = [], 0
    for layer in layers.values():
        d_in, d_out = shapes(layer.layer)
        spans.append((at, at + d_in * rank, at + (d_in + d_out) * rank))
        at = spans[-1][-1]
    return spans
