"""A frozen linear layer with K adapters, and which rows go to which of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Lanes:
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
class Route:
    """Which places of the flattened batch go to which adapter, shared by all layers.

    blocks : (adapter, first place, place after the last), covering all places in order; None
        sends every place to `only`
    lanes : the same blocks for a GPU, where a product a block would be too many launches
    """

    blocks: list[tuple[int, int, int]] | None = None
    only: int = 0
    lanes: Lanes | None = None

    def over(self, places: int) -> list[tuple[int, int, int]]:
        """The blocks of a batch of so many places."""
        return [(self.only, 0, places)] if self.blocks is None else self.blocks


def lanes_of(blocks: list[tuple[int, int, int]], device: torch.device) -> Lanes:
    """Lay blocks out as lanes."""
    which, start, stop = (np.array(x) for x in zip(*blocks, strict=True))
    size, along = stop - start, np.arange((stop - start).max())
    real = along[None] < size[:, None]
    take = np.where(real, start[:, None] + along[None], start[:, None])
    on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return Lanes(on(which), on(take), on(real)[..., None], on(np.flatnonzero(real)))


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
        apply = _Blocks.apply if self.route.lanes is None else _Lanes.apply
        return self.layer(x) + apply(x, self.trigger, self)


def base_layer(layer: nn.Module) -> nn.Module:
    """The frozen layer itself, with or without adapters on it."""
    return layer.layer if isinstance(layer, StackedLinear) else layer


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
