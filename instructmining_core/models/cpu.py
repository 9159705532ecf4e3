"""What torch leaves lying on a CPU: attention of short rows, and float32 products on an AMD.

Attention: torch's flash kernel takes 18 ms forward and backward for 16 rows of 110 tokens in
bfloat16 (4 heads of 32, one core of an EPYC with AVX512-BF16); matrix products and a float32
softmax over a few rows at a time, whose scores stay in the cache, take 4. All other rows go to
transformers' sdpa.

Products: torch asks MKL, which keeps AVX512 for Intel's processors: on one core of an AMD EPYC
(Zen 5) 2,048 rows by 576 x 576 take 31 ms by MKL and 10 by oneDNN, which torch carries too. The
sums are the same in another order. Which is taken hangs on the processor alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

LONGEST = 512  # beyond it the scores, kept for the backward pass, cost too much memory
_SCORES = 1 << 20  # numbers in one product's scores
_NAME = "instructmining_short"  # of `attend_short_rows`, in transformers


class ShortAttention(torch.autograd.Function):
    """softmax(query key' * scale, causal) value, a few rows at a time.

    query, key, value, output : shape (rows, heads, tokens, dim)
    """

    @staticmethod
    def forward(ctx, query, key, value, scale):
        rows, heads, tokens, _ = query.shape
        step = max(1, _SCORES // (heads * tokens * tokens))
        parts = [slice(first, first + step) for first in range(0, rows, step)]
        output, shares = torch.empty_like(query), []
        for part in parts:
            one, two, three = (x[part].flatten(0, 1) for x in (query, key, value))
            scores = torch.bmm(one, two.transpose(1, 2)).float().mul_(scale)
            scores += scores.new_full((tokens, tokens), float("-inf")).triu_(1)
            share = scores.softmax(-1).to(query.dtype)
            output[part] = torch.bmm(share, three).unflatten(0, (-1, heads))
            if any(ctx.needs_input_grad):
                shares.append(share)
        ctx.save_for_backward(query, key, value, *shares)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *shares = ctx.saved_tensors
        slopes = [torch.empty_like(x) for x in (query, key, value)]
        for part, share in zip(ctx.parts, shares, strict=True):
            out, one, two, three = (x[part].flatten(0, 1) for x in (gradient, query, key, value))
            slope = torch.bmm(out, three.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, share, -1, share.dtype).mul_(ctx.scale)
            found = (torch.bmm(slope, two), torch.bmm(slope.transpose(1, 2), one),
                     torch.bmm(share.transpose(1, 2), out))
            for into, values in zip(slopes, found, strict=True):
                into[part] = values.unflatten(0, (-1, query.shape[1]))
        return *slopes, None


def attend_short_rows(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function given to transformers; arguments and result as in its own `sdpa`."""
    plain = attention_mask is None and key.shape == query.shape == value.shape
    odd = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    short = query.shape[2] <= LONGEST
    if not plain or odd or not causal or not short or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1]**-0.5 if scaling is None else scaling
    return ShortAttention.apply(query, key, value, scale).transpose(1, 2), None


@contextmanager
def using(model: nn.Module, name: str, function) -> Iterator[None]:
    """Have a model attend by a function of this package inside the block.

    name : under which transformers knows it; the function gets no mask unless the name has one
        registered in `AttentionMaskInterface`
    """
    AttentionInterface.register(name, function)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


@contextmanager
def quickest(model: nn.Module, device: str) -> Iterator[None]:
    """Inside the block what is computed on a CPU without a gradient takes the ways of this file."""
    with ExitStack() as stack:
        if torch.device(device).type == "cpu":
            if _by_onednn() and next(model.parameters()).dtype == torch.float32:
                stack.enter_context(_QuickLinear())
            if getattr(model.config, "_attn_implementation", None) == "sdpa":
                AttentionMaskInterface.register(_NAME, sdpa_mask)
                stack.enter_context(using(model, _NAME, attend_short_rows))
        yield


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, without a gradient: x weight' + bias. weight : shape (out, in)"""
    plain = x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and x.numel()
    if not plain or not _by_onednn():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _QuickLinear(TorchFunctionMode):

    def __torch_function__(self, func, types, args=(), kwargs=None):
        quick = func is F.linear and not torch.is_grad_enabled()
        return (linear if quick else func)(*args, **(kwargs or {}))


@functools.cache
def _by_onednn() -> bool:
    """Whether oneDNN is there, and this is a processor with AVX512 whose maker is not Intel."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpuinfo = Path("/proc/cpuinfo")
    if not there or not torch.backends.mkl.is_available() or not cpuinfo.is_file():
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and " avx512f " in text
