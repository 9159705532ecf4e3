"""Memory: what is free, how many tokens fit, how running out of it looks, and freed memory kept.

What fits is a first guess: attention's own buffers and the allocator's waste are not counted, so a
batch may still run out of memory, and is then halved (`batching.map_batches`).
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

import psutil

SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the free memory that a batch may take
_HIDDEN = 8  # tensors of hidden size alive at once: residual, norm, q, k, v, attention, projections
_MLP = 3  # tensors of the MLP's size: gate, up, their product
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "defaultcpuallo",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed",  # a library found no workspace
)  # fmt: skip


def free_bytes(device: str) -> int:
    """Bytes of memory that can be had now, with what PyTorch's own cache on a GPU holds unused."""
    if not str(device).startswith("cuda"):
        return psutil.virtual_memory().available
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitting_tokens(config, itemsize: int, free: float, logit_rows: float) -> int:
    """Padded tokens of a batch that `free` bytes hold, at least 1.

    config : of the decoder, with `vocab_size`; `hidden_size` is taken for 4,096 where it is unnamed
    itemsize : bytes of one weight
    logit_rows : tokens whose logits are made at once; infinite where a batch's are made together

    Each token takes hidden states and MLP activations, and as long as the tokens are fewer than
    `logit_rows` a row of logits, of their float32 copy and of its log-softmax.
    """
    hidden = getattr(config, "hidden_size", None) or 4096
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inside = itemsize * (_HIDDEN * hidden + _MLP * mlp) + 4 * hidden  # a norm is float32
    logits = config.vocab_size * (itemsize + 4 + 4)
    tokens = free / (inside + logits)
    if tokens > logit_rows:
        tokens = (free - logit_rows * logits) / inside
    return max(1, int(tokens))


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
