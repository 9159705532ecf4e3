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

    def _parts(self):
        """Each adapted layer with its places among the joined ranks and among the outputs."""
        row = column = 0
        for m, rank, width in zip(self.adapted, self.ranks, self.widths, strict=True):
            if m is not None:
                yield m, slice(row, row + rank), slice(column, column + width)
            row, column = row + rank, column + width

    def forward(self, x: torch.Tensor, blocks) -> tuple[torch.Tensor, tuple]:
        """Output, and what `backward` needs: x, A of all layers and each block's inner values.

        x : shape (tokens, d_in); blocks : (adapter, first, last + 1)
        """
        out = F.linear(x, self.weight, self.bias)
        if not any(self.ranks):
            return out, (x, None, None, blocks)
        known = [m for m in self.adapted if m is not None]
        a = known[0].a if len(known) == 1 else torch.cat([m.a for m in known], dim=2)
        inner = []
        for k, start, stop in blocks:
            z = (x[start:stop] @ a[k]).mul_(self._scale())
            for m, rows, columns in self._parts():
                out[start:stop, columns].addmm_(z[:, rows], m.b[k])
            inner.append(z)
        return out, (x, a, inner, blocks)

    def backward(self, gradient: torch.Tensor, kept: tuple, *, wanted: bool = True):
        """Gradient of x (None unless wanted); adds the adapters' gradients to the stack's."""
        x, a, inner, blocks = kept
        back = gradient @ self.weight if wanted else None
        if a is None:
            return back
        for (k, start, stop), z in zip(blocks, inner, strict=True):
            slopes, part = [], gradient[start:stop]
            for m, rows, columns in self._parts():
                m.grad_b[k] += z[:, rows].t() @ part[:, columns]
                slopes.append(m.b[k] @ part[:, columns].t())
            # shape (ranks, tokens): products with few rows take half the time of few columns
            slope = (slopes[0] if len(slopes) == 1 else torch.cat(slopes)).mul_(self._scale())
            grad_a = slope @ x[start:stop]
            for m, rows, _ in self._parts():
                m.grad_a[k] += grad_a[rows].t()
            if wanted:
                back[start:stop].addmm_(slope.t(), a[k].t())
        return back

    def _scale(self) -> float:
        return next(m.scale for m in self.adapted if m is not None)
