"""A LLaMA-shaped decoder layer with stacked adapters as one step of the gradient's graph.

On a CPU a small model spends most of a step not in matrix products but between them. Here query,
key and value are one product, gate and up another, their adapters likewise, and forward and
backward are written out, so that nothing is computed or kept twice. It stands where the layer
stood, does plain causal rows (packed, or of equal length) itself and hands everything else
(masks, caches, long rows) to the layer. Of packed rows the last layer does what comes after its
attention only where its output is read (`Batch.read`).

Linear layers that read the same input, with their adapters, as one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..models import attention as row_attention
from .lora import MultiLoRALinear, Routing, base_layer


class FusedLinear:
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
        self.adapted = [m if isinstance(m, MultiLoRALinear) else None for m in layers]
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


_LARGEST = 200_000_000  # parameters; above, products rule the time and joined weights the memory
_SHAPES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


def lean_blocks(model: nn.Module, route: Routing) -> dict[str, FusedDecoderLayer]:
    """A block for each decoder layer that fits, by the layer's name.

    model : with the adapters on; route : of the adapters
    """
    if sum(p.numel() for p in model.parameters()) > _LARGEST:
        return {}
    shared: dict = {}
    layers = {name: layer for name, layer in model.named_modules()
              if type(layer).__name__ in _SHAPES}
    last = next(reversed(layers), None)
    return {name: FusedDecoderLayer(layer, route, shared, last=name == last)
            for name, layer in layers.items() if fits(layer, model.config)}


def fits(layer: nn.Module, config) -> bool:
    """Whether a decoder layer has this shape: RMS norms, rotary positions, SiLU gate, a CPU."""
    return (
        type(layer).__name__ in _SHAPES
        and config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and layer.mlp.down_proj.weight.device.type == "cpu"
        and all(type(base_layer(m)) is nn.Linear for m in _linears(layer))
    )


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class FusedDecoderLayer(nn.Module):
    """Stands where a decoder layer stood; `layer` is that layer."""

    def __init__(self, layer: nn.Module, route: Routing, shared: dict, *, last: bool) -> None:
        """shared : one dict for all blocks of a model; last : no layer reads this one's output."""
        super().__init__()
        self.layer, self.route, self.shared, self.last = layer, route, shared, last
        attention, mlp = layer.self_attn, layer.mlp
        self.read = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = FusedLinear([attention.o_proj])
        self.gate = FusedLinear([mlp.gate_proj, mlp.up_proj])
        self.down = FusedLinear([mlp.down_proj])
        self.dim, self.scale = attention.head_dim, attention.scaling
        self.key_heads = self.read.widths[1] // self.dim
        self.heads = self.read.widths[0] // self.dim
        self.half = _half_turn(self.dim, self.out.weight.dtype)
        linears = [m for m in _linears(layer) if isinstance(m, MultiLoRALinear)]
        self.trigger = linears[0].trigger if linears else None

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None,
                past_key_values=None, packed_rows=None, **kwargs):
        rows, longest = hidden_states.shape[:2]
        groups = ((rows, longest),) if packed_rows is None else packed_rows.groups
        if (attention_mask is not None or past_key_values is not None
                or max(g[1] for g in groups) > row_attention.LONGEST):
            return self.layer(
                hidden_states, attention_mask=attention_mask, packed_rows=packed_rows,
                position_embeddings=position_embeddings, past_key_values=past_key_values, **kwargs,
            )
        flat = hidden_states.flatten(0, 1)
        ways = self._ways(position_embeddings, rows, len(flat), groups, packed_rows)
        return _Block.apply(flat, self.trigger, self, ways).view_as(hidden_states)

    def _ways(self, position_embeddings, rows, tokens, groups, packed_rows) -> Rotations:
        """Made by the first layer of a pass, used by all: they are given the same tensors."""
        cos, sin = position_embeddings
        if self.shared.get("cos") is not cos or self.shared["groups"] is not groups:
            turned = self.heads + self.key_heads
            wide = [x.expand(rows, -1, -1).reshape(tokens, -1).repeat(1, turned)
                    for x in (cos, sin)]
            places = (None, None, None) if packed_rows is None else (
                packed_rows.take, packed_rows.back, packed_rows.read)
            self.shared.update(cos=cos, groups=groups, ways=Rotations(*wide, groups, *places))
        return self.shared["ways"]


@dataclass
class Rotations:
    """Rotation of each query and key number, shape (tokens, heads x dim); where rows lie.

    read : int64, ascending: the places that are read after the last layer; None for all of them
    """

    cos: torch.Tensor
    sin: torch.Tensor
    groups: tuple[tuple[int, int], ...]
    take: torch.Tensor | None
    back: torch.Tensor | None
    read: torch.Tensor | None


def _narrowed(blocks: list[tuple[int, int, int]], read: torch.Tensor) -> list:
    """The blocks of a batch of which only the places `read` are left."""
    bounds = torch.searchsorted(read, torch.tensor([block[1:] for block in blocks])).tolist()
    return [(k, *bound) for (k, _, _), bound in zip(blocks, bounds, strict=True)]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trigger, block, ways):
        blocks = block.route.over(len(x))
        h1, r1 = _norm(x, block.layer.input_layernorm)
        joined, read = block.read.forward(h1, blocks)
        _turn(joined[:, : ways.cos.shape[1]], ways.cos, ways.sin, block.half)
        joined = joined.view(len(x), -1, block.dim)
        mixed, shares = _mix(block, joined, ways)
        read_after, passed = ways.read if block.last else None, x
        if read_after is not None:
            blocks = _narrowed(blocks, read_after)
            mixed, passed = mixed.index_select(0, read_after), x.index_select(0, read_after)
        y, out = block.out.forward(mixed, blocks)
        middle = y.add_(passed)
        h2, r2 = _norm(middle, block.layer.post_attention_layernorm)
        both, gate = block.gate.forward(h2, blocks)
        g, u = both.chunk(2, dim=1)
        active = F.silu(g)
        y, down = block.down.forward(active * u, blocks)
        ctx.kept = (x, r1, read, joined, shares, out, middle, r2, gate, both, active, down)
        ctx.block, ctx.ways, ctx.read = block, ways, read_after
        y.add_(middle)
        return y if read_after is None else x.index_copy(0, read_after, y)

    @staticmethod
    def backward(ctx, gradient):
        x, r1, read, joined, shares, out, middle, r2, gate, both, active, down = ctx.kept
        block, ways, read_after, ctx.kept = ctx.block, ctx.ways, ctx.read, None
        if read_after is not None:
            gradient = gradient.index_select(0, read_after)
        g, u = both.chunk(2, dim=1)
        slope = block.down.backward(gradient, down)
        both_slope = torch.empty_like(both)
        torch.mul(slope, active, out=both_slope[:, g.shape[1]:])
        both_slope[:, : g.shape[1]] = torch.ops.aten.silu_backward(slope.mul_(u), g)
        slope = block.gate.backward(both_slope, gate)
        middle_slope = _norm_back(slope, middle, r2, block.layer.post_attention_layernorm)
        middle_slope.add_(gradient)
        slope = block.out.backward(middle_slope, out)
        if read_after is not None:
            slope = slope.new_zeros(len(x), slope.shape[1]).index_copy_(0, read_after, slope)
        joined_slope = _unmix(block, slope, joined, shares, ways).flatten(1)
        _turn(joined_slope[:, : ways.cos.shape[1]], ways.cos, ways.sin, -block.half)
        wanted = ctx.needs_input_grad[0]
        slope = block.read.backward(joined_slope, read, wanted=wanted)
        if not wanted:
            return None, None, None, None
        slope = _norm_back(slope, x, r1, block.layer.input_layernorm)
        if read_after is not None:  # not index_add_, which goes row by row on a CPU
            middle_slope = torch.zeros_like(slope).index_copy_(0, read_after, middle_slope)
        return slope.add_(middle_slope), None, None, None


def _norm(x: torch.Tensor, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm; the output, and 1 / root mean square, float32, shape (tokens, 1)."""
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = inverse.div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    wide = wide.mul_(inverse) if wide is not x else wide * inverse
    return wide.to(x.dtype).mul_(norm.weight), inverse


def _norm_back(gradient, x, inverse, norm) -> torch.Tensor:
    """Gradient of the input: r (g - n mean(g n)), with n = x r and g the gradient times weight."""
    g = (gradient * norm.weight).float()
    n = x.float() * inverse
    mean = (g * n).sum(-1, keepdim=True).div_(x.shape[-1])
    return g.addcmul_(n, mean, value=-1).mul_(inverse).to(x.dtype)


def _turn(numbers: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: torch.Tensor) -> None:
    """Rotary positions, in place; the negative sine turns back.

    numbers : shape (tokens, heads x dim); half : shape (dim, dim), `_half_turn`
    A product with a permutation is three times as fast as moving halves of 16 numbers.
    """
    turned = (numbers.reshape(-1, len(half)) @ half).view(numbers.shape).mul_(sin)
    numbers.copy_(turned.addcmul_(numbers, cos))


def _half_turn(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix H with x H = (-second half of x, first half of x)."""
    eye = torch.eye(dim // 2, dtype=dtype)
    zero = torch.zeros_like(eye)
    return torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])


def _mix(block, joined, ways) -> tuple[torch.Tensor, list]:
    """Attention of every row; output of shape (tokens, heads x dim), and kept pieces."""
    slots = joined.transpose(0, 1).contiguous()
    results, kept = [], []
    for start, rows, longest in row_attention.chunks(ways.groups, block.heads):
        parts = _gather(block, slots, ways, start, rows, longest)
        result, share = row_attention.forward(*parts, block.scale)
        results.append(result.view(block.heads, rows * longest, block.dim))
        kept.append((share, parts))
    mixed = torch.cat(results, dim=1) if len(results) > 1 else results[0]
    mixed = mixed.transpose(0, 1)
    mixed = mixed if ways.back is None else mixed.index_select(0, ways.back)
    return mixed.reshape(len(joined), -1), kept


def _gather(block, slots, ways, start, rows, longest) -> list[torch.Tensor]:
    """Query, key and value of some rows, each of shape (heads x rows, longest, dim)."""
    stop = start + rows * longest
    if ways.take is None:
        some = slots[:, start:stop]
    else:
        some = slots.index_select(1, ways.take[start:stop])
    query, key, value = some.split([block.heads, block.key_heads, block.key_heads])
    if block.key_heads != block.heads:
        each = block.heads // block.key_heads
        key, value = key.repeat_interleave(each, 0), value.repeat_interleave(each, 0)
    return [part.reshape(-1, longest, block.dim) for part in (query, key, value)]


def _unmix(block, slope, joined, kept, ways) -> torch.Tensor:
    """Gradient of `joined` from that of the attention's output."""
    tokens = len(joined)
    slope = slope.view(tokens, block.heads, block.dim).transpose(0, 1)
    if ways.back is not None:
        spread = slope.new_zeros(block.heads, len(ways.take), block.dim)
        slope = spread.index_copy_(1, ways.back, slope)
    parts = []
    plan = row_attention.chunks(ways.groups, block.heads)
    for (start, rows, longest), (share, qkv) in zip(plan, kept, strict=True):
        some = slope[:, start : start + rows * longest].reshape(-1, longest, block.dim)
        slopes = row_attention.backward(some, share, *qkv, block.scale)
        parts.append(torch.cat([_heads(block, s, i, rows * longest)
                                for i, s in enumerate(slopes)]))
    together = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    together = together.transpose(0, 1)
    if ways.back is not None:
        return together.index_select(0, ways.back)
    return together.contiguous()


def _heads(block, slope, which, slots) -> torch.Tensor:
    """A gradient as (heads, slots, dim); keys and values add up over the queries they serve."""
    slope = slope.view(block.heads, slots, block.dim)
    if which == 0 or block.key_heads == block.heads:
        return slope
    return slope.view(block.key_heads, -1, slots, block.dim).sum(1)
