"""Which rows are in which step, at which learning rate: fixed by seeds, not by what computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .profiles import FinetuneConfig


def row_order(rows: int, epochs: int, batch_size: int, order_seed: int) -> list[list[np.ndarray]]:
    """Row positions of each step of each epoch.

    Every epoch is a new permutation; its last step holds what is left (no row is dropped or
    repeated). The same seed gives the same order for every set of the same size.

    returns : epochs x steps arrays of at most `batch_size` row positions
    """
    plan = []
    for epoch in range(epochs):
        order = np.random.default_rng([order_seed, epoch]).permutation(rows)
        plan.append([order[i : i + batch_size] for i in range(0, rows, batch_size)])
    return plan


def learning_rates(config: FinetuneConfig, steps: int) -> np.ndarray:
    """Learning rate of each step, shape (steps,).

    Linear warm-up over `ceil(warmup_share * steps)` steps, the first of which already moves
    (transformers 5 starts at 0 and so spends a step on nothing: 1 of 24 in a small study), then
    transformers' cosine or line to zero, or a constant.
    """
    warm = math.ceil(config.warmup_share * steps)
    at = np.arange(steps)
    progress = np.clip((at - warm) / max(1, steps - warm), 0, 1)
    factor = {
        "cosine": 0.5 * (1 + np.cos(np.pi * progress)),
        "linear": 1 - progress,
        "constant": np.ones(steps),
    }[config.schedule]
    return config.learning_rate * np.where(at < warm, (at + 1) / max(1, warm), factor)


def micro_batches(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False
) -> list[np.ndarray]:
    """Split rows, in their order, into runs of at most `max_tokens` tokens; a longer row is alone.

    lengths : tokens of each row
    padded : count every row as long as the longest of its run
    returns : arrays of positions in `lengths`, none empty
    """
    batches, current, size = [], [], 0
    for position, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in current)]) if padded else 0
        after = longest * (len(current) + 1) if padded else size + length
        if current and after > max_tokens:
            batches.append(np.array(current))
            current, after = [], length
        current.append(position)
        size = after
    return batches + ([np.array(current)] if current else [])
