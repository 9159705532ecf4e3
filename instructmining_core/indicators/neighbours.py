"""Exact nearest neighbours by chunked matrix products.

20,000 x 384 takes seconds and 1,000,000 x 384 fits into a few GiB, so nothing approximate and no
index library is needed.
"""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm

_COLUMNS = 1 << 14  # reference rows of one block of products


def nearest(
    queries: np.ndarray,
    reference: np.ndarray,
    k: int,
    own: np.ndarray | None = None,
    *,
    chunk_bytes: int = 1 << 28,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact k nearest neighbours by chunked float32 matrix products.

    queries : float32, shape (n, dim); reference : float32, shape (m, dim)
    own : shape (n,), position of the query itself in the reference (left out), -1 for none
    chunk_bytes : most memory of one block of products; 1,000,000 x 384 rows need the two arrays
        and this
    returns : distances, float64, shape (n, k), ascending, NaN where the reference is too small;
        positions, int64, shape (n, k), -1 there

    Candidates come from the products; their distances are then taken from the differences, so that
    small ones do not drown in cancellation, and ordered by (distance, position).
    """
    n, m = len(queries), len(reference)
    distances = np.full((n, k), np.nan)
    positions = np.full((n, k), -1, dtype=np.int64)
    if n == 0 or m == 0:
        return distances, positions
    queries, reference = (np.ascontiguousarray(a, dtype=np.float32) for a in (queries, reference))
    half = _half_norms(reference)
    columns = min(m, _COLUMNS)
    rows = max(1, min(n, chunk_bytes // (4 * columns), 4096))
    # One buffer for all blocks: fresh pages would cost a fifth of the time.
    buffer = np.empty(rows * columns, dtype=np.float32)
    own = np.full(n, -1, dtype=np.int64) if own is None else np.asarray(own, dtype=np.int64)
    with tqdm(total=n, desc="neighbours", unit="row", disable=not progress) as bar:
        for start in range(0, n, rows):
            part, mine = queries[start : start + rows], own[start : start + rows]
            found = _candidates(part, reference, half, mine, k + 4, columns, buffer)
            stop = start + len(part)
            distances[start:stop], positions[start:stop] = _refine(part, reference, found, k)
            bar.update(len(part))
    return distances, positions


def _half_norms(reference: np.ndarray) -> np.ndarray | None:
    """Half the squared length of each row; None where all are equal and change no order."""
    half = np.einsum("ij,ij->i", reference, reference) / 2
    return None if np.ptp(half) < 1e-6 else half


def _candidates(
    part: np.ndarray, reference: np.ndarray, half, own: np.ndarray, wanted: int, columns: int,
    buffer: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Positions of the `wanted` best products of each query, -1 where there are none.

    The products are NumPy's: on AMD processors its BLAS is a third faster than PyTorch's.
    """
    best, where = [], []
    for first in range(0, len(reference), columns):
        block = reference[first : first + columns]
        scores = buffer[: len(part) * len(block)].reshape(len(part), len(block))
        np.matmul(part, block.T, out=scores)
        if half is not None:
            scores -= half[first : first + columns]
        inside = np.flatnonzero((own >= first) & (own < first + len(block)))
        scores[inside, own[inside] - first] = -np.inf
        values, places = _top(torch.from_numpy(scores), wanted)
        best.append(values)
        where.append(places + first)
    values, places = torch.cat(best, 1), torch.cat(where, 1)
    if values.shape[1] > wanted:
        values, order = values.topk(wanted, dim=1)
        places = places.gather(1, order)
    return places.masked_fill(values == -torch.inf, -1).numpy()


def _top(scores: torch.Tensor, wanted: int, group: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores of each row: the best lie in the `wanted` groups with the largest maxima.

    One pass for the maxima of groups and a small sort is several times faster than a sort of all.
    """
    rows, columns = scores.shape
    whole = columns // group
    if whole <= 2 * wanted:
        return scores.topk(min(wanted, columns), dim=1)
    grouped = scores[:, : whole * group].unflatten(1, (whole, group))
    chosen = grouped.amax(2).topk(wanted, dim=1, sorted=False).indices
    inside = grouped.gather(1, chosen[:, :, None].expand(-1, -1, group)).flatten(1)
    places = (chosen[:, :, None] * group + torch.arange(group)).flatten(1)
    rest = torch.arange(whole * group, columns).expand(rows, -1)
    inside = torch.cat([inside, scores[:, whole * group :]], 1)
    places = torch.cat([places, rest], 1)
    values, order = inside.topk(wanted, dim=1)
    return values, places.gather(1, order)


def _refine(
    part: np.ndarray, reference: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    squared = np.empty(found.shape, dtype=np.float32)
    for column in range(found.shape[1]):
        difference = reference[found[:, column].clip(min=0)] - part
        squared[:, column] = np.einsum("ij,ij->i", difference, difference)
    distances = np.sqrt(squared.astype(np.float64))
    distances[found < 0] = np.inf
    order = np.lexsort((found, distances), axis=1)[:, :k]
    distances = np.take_along_axis(distances, order, 1)
    positions = np.take_along_axis(found, order, 1)
    missing = k - distances.shape[1]
    if missing > 0:
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
        positions = np.pad(positions, ((0, 0), (0, missing)), constant_values=-1)
    return np.where(np.isinf(distances), np.nan, distances), positions
