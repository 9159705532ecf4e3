"""How many adapters to train together: what memory holds, and what pays on this processor."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from .adapters import target_layers
from .heads import unwrapped
from .lm import LM
from .profiles import FinetuneConfig

ON_CPU = 1
ON_GPU = 64


def adapters_together(
    lm: LM, config: FinetuneConfig, lengths: Sequence[Sequence[int]]
) -> int:
    """How many of these runs to train in one pass.

    lengths : for each run, tokens of each of its rows
    """
    gpu = str(lm.device).startswith("cuda")
    return max(1, min(len(lengths), ON_GPU if gpu else ON_CPU))
