"""Batches by token budget: longest rows first, hardly any padding, halved when memory runs out.

On 9,229 Alpaca rows, batches in file order cost 2.3 to 3.9 times the real tokens (batch 8 to 64).
What memory holds is a first guess: attention's own buffers and the allocator's waste are not
counted.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from tqdm.auto import tqdm

SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the free memory that a batch may take
_WASTE = 32  # a batch ends where its padding would pass this part of the budget
_HIDDEN = 8  # tensors of hidden size alive at once: residual, norm, q, k, v, attention, projections
_MLP = 3  # tensors of the MLP's size: gate, up, their product
_KEPT_HIDDEN, _KEPT_MLP = 18, 8  # the same that a layer keeps for its gradient
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "defaultcpuallo",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed",  # a library found no workspace
)  # fmt: skip


@dataclass(frozen=True)
class Failed:
    """Stands in the results of `map_batches` for a row that does not fit into memory alone."""

    reason: str


def token_budget_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int
) -> list[np.ndarray]:
    """Row numbers in batches whose padded size stays within a budget, longest first.

    lengths : shape (n,), tokens of each row.
    max_tokens : padded tokens of a batch (rows times longest row); one longer row is alone.

    Longest first, so that memory runs out in the first batch or not at all; equal lengths in the
    order of their numbers. A batch ends early once its padding is 1/32 of the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    total = np.concatenate([[0], np.cumsum(lengths[order])])
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        rows = min(max(1, max_tokens // longest), len(order) - start)
        real = total[start + 1 : start + rows + 1] - total[start]
        padding = longest * np.arange(1, rows + 1) - real
        rows = max(1, int(np.searchsorted(padding, max_tokens // _WASTE, side="right")))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array, and the mask of real tokens.

    Returns ids, attention_mask : each shape (rows, longest), int64.

    >>> pad([[5, 6], [7]], 0, "left")[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask


def map_batches(
    fn: Callable[[np.ndarray], Sequence[Any]], lengths: Sequence[int] | np.ndarray,
    max_tokens: int, progress: bool = False, desc: str = "", *,
    on_batch: Callable[[np.ndarray, Sequence[Any]], None] | None = None,
    on_halved: Callable[[int], None] | None = None,
) -> list[Any]:  # fmt: skip
    """Call `fn` on batches of row numbers; the results in the rows' own order.

    fn : row numbers, shape (batch,) -> one result a row.
    lengths, max_tokens : as in `token_budget_batches`.
    on_batch : called with the row numbers and results of each finished batch.
    on_halved : called with the new budget whenever memory ran out.

    When memory runs out (GPU or CPU) the batch is cut in two and every later one keeps to the
    smaller size. A row that does not fit alone gives `Failed(reason)`; the others go on.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    waiting = deque(token_budget_batches(lengths, max_tokens))
    results: list[Any] = [None] * len(lengths)
    with tqdm(total=int(lengths.sum()), desc=desc, unit="token", unit_scale=True,
              disable=not progress) as bar:
        while waiting:
            batch, reason = waiting.popleft(), ""
            try:
                done = fn(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # only the text leaves this block: the traceback holds the batch's tensors
                reason = (str(error) or type(error).__name__).splitlines()[0]
            if reason:
                free_gpu_cache()
            if reason and len(batch) > 1:
                budget = max(1, len(batch) * int(lengths[batch].max()) // 2)
                rows = np.concatenate([batch, *waiting])
                waiting = deque(rows[b] for b in token_budget_batches(lengths[rows], budget))
                if on_halved is not None:
                    on_halved(budget)
                continue
            if reason:
                done = [Failed(f"out of memory on one row of {lengths[batch[0]]} tokens: {reason}")]
            for row, result in zip(batch, done, strict=True):
                results[row] = result
            if on_batch is not None:
                on_batch(batch, done)
            bar.update(int(lengths[batch].sum()))
    return results


def free_bytes(device: str) -> int:
    """Bytes of memory that can be had now, with what PyTorch's own cache on a GPU holds unused."""
    if not str(device).startswith("cuda"):
        return psutil.virtual_memory().available
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitting_tokens(config, itemsize: int, free: float, logit_rows: float) -> int:
    """Padded tokens of a batch that `free` bytes hold, at least 1.

    config : of the decoder; itemsize : bytes of one weight; logit_rows : tokens whose logits are
    made at once. Each token takes hidden states and MLP activations, and as long as the tokens are
    fewer than `logit_rows` a row of logits, of their float32 copy and of its log-softmax.
    """
    hidden = getattr(config, "hidden_size", None) or 4096
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inside = itemsize * (_HIDDEN * hidden + _MLP * mlp) + 4 * hidden  # a norm is float32
    logits = config.vocab_size * (itemsize + 4 + 4)
    tokens = free / (inside + logits)
    if tokens > logit_rows:
        tokens = (free - logit_rows * logits) / inside
    return max(1, int(tokens))


def trainable_tokens(config, itemsize: int, layers: int, free: float) -> int:
    """Tokens of a training step whose activations `free` bytes hold, at least 1.

    layers : that the gradient goes back through. What each keeps was measured on a LLaMA of 30
    layers: 90 KB a token in float32.
    """
    hidden = getattr(config, "hidden_size", None) or 4096
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    return max(1, int(free / (layers * itemsize * (_KEPT_HIDDEN * hidden + _KEPT_MLP * mlp))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: on a GPU, or the CPU's allocator."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)
    )


def free_gpu_cache() -> None:
    """Hand back what PyTorch's cache on a GPU holds unused, where one computes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names of glibc's malloc.h
_KEPT = 2**31 - 1  # bytes of freed memory at the heap's end that are not handed back
_GROWN = 64 * 2**20  # bytes by which the heap grows


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep what a training step frees for its next step; whether it does.

    glibc gives every large tensor fresh pages from the kernel and hands them back when it is freed,
    so each step of a small model spends a fifth of its time on page faults (0.29 s, with this
    0.23 s, one thread). Elsewhere (macOS, musl) nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    asked = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWN))
    return all([libc.mallopt(name, value) == 1 for name, value in asked])
