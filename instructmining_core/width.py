"""How many adapters to train in one pass: what memory holds, where it pays."""

from __future__ import annotations

import torch

from .adapters import target_layers
from .distributed import join
from .heads import unwrapped
from .lm import LM
from .profiles import FinetuneConfig
from .stacked_linear import shapes

ON_CPU = 1  # measured: 4 adapters do 1.03 to 1.08 times its tokens a second, in thrice its memory
ON_GPU = 64  # at most
_BYTES = 22  # of one adapter's number: value, gradient, two moments, all float32, and work copies
_SHARE = 0.25  # of the free memory, for adapters; a micro-batch's size does not hang on K


def adapters_together(lm: LM, config: FinetuneConfig) -> int:
    """How many runs of this configuration to train in one pass over the base.

    On a CPU one. On a GPU as many as fit into a quarter of the free memory, at most 64: the tokens
    of a micro-batch are bounded by `config.micro_tokens`, so more adapters only cost their own
    numbers. Processes that share a run take the least of theirs.
    """
    if not str(lm.device).startswith("cuda"):
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(torch.device(lm.device))
    fitting = int(free * _SHARE / (_BYTES * adapter_size(lm, config)))
    return join().least(max(1, min(ON_GPU, fitting)))


def adapter_size(lm: LM, config: FinetuneConfig) -> int:
    """Numbers in one adapter."""
    layers = target_layers(unwrapped(lm.model), config).values()
    return sum(config.rank * sum(shapes(layer)) for layer in layers)
