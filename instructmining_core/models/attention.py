"""Causal attention of short rows on a CPU by plain products, forward and backward by hand.

torch's flash kernel takes 18 ms forward and backward for 16 rows of 110 tokens in bfloat16 (4 heads
of 32, one core of an EPYC with AVX512-BF16); matrix products and a float32 softmax over a few rows
at a time, whose scores stay in the cache, take 4. Scoring 16 to 48 rows of 40 to 170 tokens takes
0.4 to 0.6 of its time. All other rows go to transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

LONGEST = 512  # beyond it the scores, kept for the backward pass, cost too much memory
_SCORES = 1 << 20  # numbers in one product's scores
_NAME = "instructmining_short"  # of `attend_short_rows`, in transformers


def chunks(groups: Sequence[tuple[int, int]], heads: int) -> list[tuple[int, int, int]]:
    """(first slot, rows, longest) of each product.

    groups : (rows, longest) that follow each other in the slots
    """
    found, start = [], 0
    for rows, longest in groups:
        step = max(1, _SCORES // (heads * longest * longest))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            found.append((start + first * longest, count, longest))
        start += rows * longest
    return found


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query key' * scale, causal) value.

    query, key, value : shape (n, tokens, dim), n = heads x rows
    returns : output, the same shape; and the probabilities, shape (n, tokens, tokens)
    """
    scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    scores += _future(scores)
    share = scores.softmax(-1).to(query.dtype)
    return torch.bmm(share, value), share


def backward(
    gradient: torch.Tensor,
    share: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; `share` are the probabilities of `forward`."""
    slope = torch.bmm(gradient, value.transpose(1, 2))
    slope = torch._softmax_backward_data(slope, share, -1, share.dtype).mul_(scale)
    return (
        torch.bmm(slope, key),
        torch.bmm(slope.transpose(1, 2), query),
        torch.bmm(share.transpose(1, 2), gradient),
    )


def _future(scores: torch.Tensor) -> torch.Tensor:
    """-inf above the diagonal, zero elsewhere, shape (tokens, tokens)."""
    tokens = scores.shape[-1]
    return scores.new_full((tokens, tokens), float("-inf")).triu_(1)


def attend_short_rows(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function given to transformers; arguments and result as in its own `sdpa`."""
    rows, heads, tokens, dim = query.shape
    plain = attention_mask is None and key.shape == query.shape == value.shape
    odd = [kwargs.get(name) for name in ("softcap", "position_bias", "cache")]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (
        not plain or not causal or tokens > LONGEST or torch.is_grad_enabled()
        or any(one is not None for one in odd)
    ):  # fmt: skip
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = dim**-0.5 if scaling is None else scaling
    found = query.new_empty((rows, tokens, heads, dim))
    for first, count, _ in chunks([(rows, tokens)], heads):
        part = slice(first // tokens, first // tokens + count)
        out, _ = forward(
            *(x[part].flatten(0, 1) for x in (query, key, value)), scale)
        found[part] = out.unflatten(0, (count, heads)).transpose(1, 2)
    return found, None


@contextmanager
def using(model: nn.Module, name: str, function) -> Iterator[None]:
    """Have a model attend by a function of this package inside the block.

    name : under which transformers knows it. A function gets no mask, padding included, unless its
        name has one registered in `AttentionMaskInterface`.
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
    """Attend to short rows by plain products inside the block where sdpa is used on a CPU."""
    implementation = getattr(model.config, "_attn_implementation", None)
    if torch.device(device).type != "cpu" or implementation != "sdpa":
        yield
        return
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    with using(model, _NAME, attend_short_rows):
        yield
