"""Batches by token budget: longest rows first, hardly any padding, halved when memory runs out.

On 9,229 Alpaca rows, batches in file order cost 2.3 to 3.9 times the real tokens (batch 8 to 64).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..config import InstructMiningError
from .memory import free_gpu_cache, is_out_of_memory

_WASTE = 32  # a batch ends where its padding would pass this part of the budget


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
    order of their numbers. A batch ends early once its padding is 1/32 of the budget: few rows with
    a large budget would otherwise be mostly padding.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if max_tokens < 1:
        raise InstructMiningError(f"max_tokens={max_tokens}; it must be at least 1.")
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
    if side not in ("left", "right"):
        raise InstructMiningError(f"side={side!r}; it must be 'left' or 'right'.")
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
    progress : a bar in tokens, with tokens a second and time left.

    When memory runs out (GPU or CPU) the batch is cut in two and every later one keeps to the
    smaller size. A row that does not fit alone gives `Failed(reason)`; the others go on.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    waiting = deque(token_budget_batches(lengths, max_tokens))
    results: list[Any] = [None] * len(lengths)
    with tqdm(total=int(lengths.sum()), desc=desc, unit="token", unit_scale=True,
              disable=not progress) as bar:
        while waiting:
            batch = waiting.popleft()
            done, reason = _attempt(fn, batch)
            if reason and len(batch) > 1:
                budget = max(1, len(batch) * int(lengths[batch].max()) // 2)
                rows = np.concatenate([batch, *waiting])
                waiting = deque(rows[b] for b in token_budget_batches(lengths[rows], budget))
                if on_halved is not None:
                    on_halved(budget)
                continue
            if reason:
                done = [Failed(f"out of memory on one row of {lengths[batch[0]]} tokens: {reason}")]
            if len(done) != len(batch):
                raise InstructMiningError(f"{len(done)} results for {len(batch)} rows.")
            for row, result in zip(batch, done, strict=True):
                results[row] = result
            if on_batch is not None:
                on_batch(batch, done)
            bar.update(int(lengths[batch].sum()))
    return results


def _attempt(fn: Callable, batch: np.ndarray) -> tuple[Sequence[Any] | None, str]:
    try:
        return fn(batch), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Only the text leaves this block: the error's traceback holds the batch's tensors.
        reason = (str(error) or type(error).__name__).splitlines()[0]
    free_gpu_cache()
    return None, reason
