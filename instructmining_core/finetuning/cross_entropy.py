"""Negative log-likelihood of target tokens from hidden states, with a gradient, in small chunks.

The logits of a whole batch are the largest tensor of a step. Here they live for one chunk at a
time, in float32, and the gradient of the hidden states is taken at once, as the output matrix is
frozen. Where it is trained, or the head caps or scales its logits, autograd takes the gradient, and
a large batch's chunks are computed twice.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..models.causal_lm import Head
from ..models.cpu import linear

CHUNK_LOGITS = 1 << 19  # logits of one chunk: 2 MiB in float32, so that they stay in the cache
_TARGETS = 128  # of one chunk at least: with fewer, time goes into reading a large output matrix
CHUNK_LOGITS_GPU = 1 << 26
_ROWS = 32  # multiple that the rows of a CPU's chunk are filled up to
KEPT_LOGITS = 1 << 25  # beyond so many at once they are computed a second time for the gradient


def weighted_nll(
    hidden: torch.Tensor, head: Head, output: nn.Module, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the targets' nll, a scalar with gradient; and each nll, nats, detached.

    hidden : shape (targets, dim), below the output matrix
    head : how logits come from hidden states (`LM.head`); output : the output matrix, which it uses
    labels : int64, shape (targets,); weights : float32, shape (targets,)
    """
    if head.way == "direct" and not output.weight.requires_grad:
        return _FrozenHead.apply(hidden, output.weight, output.bias, labels, weights)
    return _in_chunks(head, hidden, labels, weights, max(16, KEPT_LOGITS // output.weight.shape[0]))


def _in_chunks(head, hidden, labels, weights, size) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_nll` of a head that autograd goes through, `size` targets at a time.

    Autograd would keep every chunk's logits, so they are computed again for the gradient.
    """
    def chunk(part_hidden, part_labels, part_weights):
        return plain_nll(head.project(part_hidden), part_labels, part_weights)

    if len(labels) <= size:
        return chunk(hidden, labels, weights)
    parts = zip(*(x.split(size) for x in (hidden, labels, weights)), strict=True)
    sums, each = zip(*(checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
                       for part in parts), strict=True)
    return torch.stack(sums).sum(), torch.cat(each)


def plain_nll(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from logits, shape (targets, vocabulary)."""
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (each * weights).sum(), each.detach()


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """On a CPU, zeros below until their number is a multiple: few shapes to build code for."""
    missing = 0 if rows.is_cuda else -len(rows) % _ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, weights):
        each = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        limit = CHUNK_LOGITS_GPU if hidden.is_cuda else CHUNK_LOGITS
        size = max(_TARGETS, limit // weight.shape[0])
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            label = labels[part, None]
            logits = linear(_filled_up(hidden[part]), weight, bias)[: len(label)].float()
            slope = logits.softmax(dim=1)
            # the largest share is at least 1 / vocabulary, so its logarithm is safe, and one
            # softmax serves both the loss and its gradient: exp is what costs here
            log_sum = logits.amax(dim=1) - slope.amax(dim=1).log()
            each[part] = log_sum - logits.gather(1, label)[:, 0]
            if gradient is not None:
                share = weights[part, None]
                slope.mul_(share).scatter_add_(1, label, -share)
                product = linear(_filled_up(slope.to(weight.dtype)), weight.t())
                gradient[part] = product[: len(label)]
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None
