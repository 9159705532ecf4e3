"""float32 products with a frozen matrix on a CPU, by the library that is quickest there.

torch asks MKL, which keeps AVX512 for Intel's processors: on one core of an AMD EPYC (Zen 5) 2,048
rows by 576 x 576 take 31 ms by MKL and 10 by oneDNN, which torch carries too. The sums are the
same in another order. Which is taken hangs on the processor alone, so all processes of a machine
give the same numbers.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, without a gradient: x weight' + bias. weight : shape (out, in)"""
    plain = x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and x.numel()
    if not plain or not _by_onednn():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def quick_layers(model: nn.Module) -> AbstractContextManager:
    """Inside the block linear layers multiply by `linear` where no gradient is asked."""
    gains = _by_onednn() and next(model.parameters()).dtype == torch.float32
    return _QuickLinear() if gains else nullcontext()


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
