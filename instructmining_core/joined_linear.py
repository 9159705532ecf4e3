"""Linear layers that read the same input, with their adapters, as one product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .stacked_linear import StackedLinear, base_layer


class Joined:
    """Linear layers that read the same input, as one: base weights side by side, adapters too."""

    def __init__(self, layers: list[nn.Module]) -> None:
        bases = [base_layer(layer) for layer in layers]
        self.weight = torch.cat([base.weight for base in bases]) if len(bases) > 1 \
            else bases[0].weight
        biases = [base.bias for base in bases]
        self.bias = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat([torch.zeros_like(base.weight[:, 0]) if bias is None else bias
                                   for base, bias in zip(bases, biases, strict=True)])
        self.widths = [base.weight.shape[0] for base in bases]
        self.adapted = [m if isinstance(m, StackedLinear) else None for m in layers]
        self.ranks = [0 if m is None else m.a.shape[-1] for m in self.adapted]

    def adapters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, shape (K, d_in, ranks), and B, shape (K, ranks, d_outs) with a block a layer."""
        known = [m for m in self.adapted if m is not None]
        if len(self.adapted) == 1:
            return known[0].a, known[0].b
        count = len(known[0].a)
        b = known[0].b.new_zeros(count, sum(self.ranks), sum(self.widths))
        for m, rows, columns in self._blocks():
            b[:, rows, columns] = m.b
        return torch.cat([m.a for m in known], dim=2), b

    def _blocks(self):
        row = column = 0
        for m, rank, width in zip(self.adapted, self.ranks, self.widths, strict=True):
            if m is not None:
                yield m, slice(row, row + rank), slice(column, column + width)
            row, column = row + rank, column + width

    def forward(self, x: torch.Tensor, blocks) -> tuple[torch.Tensor, tuple]:
        """Output, and what `backward` needs: x, A, B and each block's inner values.

        x : shape (tokens, d_in); blocks : (adapter, first, last + 1)
        """
        out = F.linear(x, self.weight, self.bias)
        if not any(self.ranks):
            return out, (x, None, None, None, blocks)
        a, b = self.adapters()
        scale = self._scale()
        inner = []
        for k, start, stop in blocks:
            inner.append((x[start:stop] @ a[k]).mul_(scale))
            out[start:stop].addmm_(inner[-1], b[k])
        return out, (x, a, b, inner, blocks)

    def backward(self, gradient: torch.Tensor, kept: tuple, *, wanted: bool = True):
        """Gradient of x (None unless wanted); adds the adapters' gradients to the stack's."""
        x, a, b, inner, blocks = kept
        back = gradient @ self.weight if wanted else None
        if a is None:
            return back
        scale = self._scale()
        for (k, start, stop), z in zip(blocks, inner, strict=True):
            part = gradient[start:stop]
            slope = (part @ b[k].t()).mul_(scale)
            self._collect(k, x[start:stop].t() @ slope, z.t() @ part)
            if wanted:
                back[start:stop].addmm_(slope, a[k].t())
        return back

    def _collect(self, k: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        for m, rows, columns in self._blocks():
            m.grad_a[k] += grad_a[:, rows]
            m.grad_b[k] += grad_b[rows, columns]

    def _scale(self) -> float:
        return next(m.scale for m in self.adapted if m is not None)
