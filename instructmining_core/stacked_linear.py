"""A frozen linear layer with K adapters, and which rows go to which of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Route:
    """Which places of the flattened batch go to which adapter, shared by all layers.

    blocks : (adapter, first place, place after the last); None sends every place to `only`
    """

    blocks: list[tuple[int, int, int]] | None = None
    only: int = 0

    def over(self, places: int) -> list[tuple[int, int, int]]:
        return [(self.only, 0, places)] if self.blocks is None else self.blocks


class StackedLinear(nn.Module):
    """A frozen linear layer with K adapters; stands where the layer stood.

    a : shape (K, d_in, rank); b : shape (K, rank, d_out); views of the stack's matrix in the
    dtype of the computation, with gradients added to grad_a and grad_b (float32).
    """

    def __init__(self, layer: nn.Module, route: Route, scale: float) -> None:
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
        return self.layer(x) + _Adapters.apply(x, self.trigger, self)


def base_layer(layer: nn.Module) -> nn.Module:
    """The frozen layer itself, with or without adapters on it."""
    return layer.layer if isinstance(layer, StackedLinear) else layer


def shapes(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: nn.Linear and its kin, or GPT-2's Conv1D."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


class _Adapters(torch.autograd.Function):
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
