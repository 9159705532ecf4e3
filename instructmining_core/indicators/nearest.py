"""Exact nearest neighbours by chunked matrix products.

20,000 x 384 takes seconds and 1,000,000 x 384 fits into a few GiB, so nothing approximate and no
index library is needed. Products in float32 only propose; what they cannot tell apart is decided by
differences in float64.
"""

from __future__ import annotations

import numpy as np
import torch

CHUNK_BYTES = 1 << 28  # of one block of products, some queries by the whole reference
_SPARE = 4  # candidates beyond k: the gap to the last of them shows that none is missing
_REFINED = 256  # queries whose candidates are gathered at a time: they stay in the cache
_DIFFERENCES = 1 << 14  # reference rows subtracted at a time where a whole cluster is rescored


def nearest(
    queries: np.ndarray, reference: np.ndarray, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact k nearest neighbours, equal distances ordered by position.

    queries : float32, shape (n, dim); reference : float32, shape (m, dim)
    own : shape (n,), position of the query itself in the reference (left out), -1 for none
    returns : distances, float64, shape (n, k), ascending, NaN where the reference is too small or
        the query has a NaN; positions, int64, shape (n, k), -1 there

    Candidates come from float32 products; their distances are then taken from the differences in
    float64, so that small ones do not drown in cancellation, and ordered by (distance, position).
    Where rounding could have hidden a nearer row (more near copies than candidates), every row
    within the error of the products is taken so: c copies of one text cost c x c differences.
    """
    n, m = len(queries), len(reference)
    distances = np.full((n, k), np.nan)
    positions = np.full((n, k), -1, dtype=np.int64)
    if n == 0 or m == 0:
        return distances, positions
    queries, reference = (np.ascontiguousarray(a, dtype=np.float32) for a in (queries, reference))
    half = _half_norms(reference)
    error = _product_error(queries, reference)
    rows = max(1, min(n, CHUNK_BYTES // (4 * m), 4096))
    # One buffer for all blocks: fresh pages would cost a fifth of the time.
    buffer = np.empty((rows, m), dtype=np.float32)
    own = np.full(n, -1, dtype=np.int64) if own is None else np.asarray(own, dtype=np.int64)
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        part = queries[here]
        scores = _products(part, reference, half, own[here], buffer[: len(part)])
        best, found = _top(torch.from_numpy(scores), k + _SPARE)
        distances[here], positions[here] = _refine(part, reference, found, k)
        least, unsure = _unsure(best, k, 2 * error[here])
        for row in unsure:
            near = np.flatnonzero(scores[row] >= least[row])
            distances[start + row], positions[start + row] = _first(part[row], reference, near, k)
    return distances, positions


def _half_norms(reference: np.ndarray) -> np.ndarray | None:
    """Half the squared length of each row; None where all are equal and change no order."""
    half = np.einsum("ij,ij->i", reference, reference) / 2
    return None if np.ptp(half) < 1e-6 else half


def _product_error(queries: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Most by which a float32 score differs from the exact one, for each query.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5: a product of two rows is
    off by at most dim x 2^-24 x their lengths, in whatever order it is summed. Half a squared
    length is off by less, and by up to 1e-6 where `_half_norms` takes all for equal.
    """
    longest = np.sqrt(np.einsum("ij,ij->i", reference, reference).max(initial=0))
    lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries))
    unit = (queries.shape[1] + 4) * 2.0**-24
    return unit * longest * (lengths.astype(np.float64) + longest) + 1e-6 * (longest > 0)


def _products(
    part: np.ndarray, reference: np.ndarray, half: np.ndarray | None, own: np.ndarray,
    out: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """q . r - |r|^2 / 2 of each pair: the larger, the nearer. The query itself gets -inf.

    The products are NumPy's: on AMD processors its BLAS is a third faster than PyTorch's.
    """
    scores = np.matmul(part, reference.T, out=out)
    if half is not None:
        scores -= half
    inside = np.flatnonzero(own >= 0)
    scores[inside, own[inside]] = -np.inf
    return scores


def _top(scores: torch.Tensor, wanted: int, group: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The largest scores of each row, descending, and their positions, -1 for none.

    The best lie in the `wanted` groups with the largest maxima: one pass for the maxima and a small
    sort is several times faster than a sort of all.
    """
    rows, columns = scores.shape
    whole = columns // group
    if whole <= 2 * wanted:
        values, places = scores.topk(min(wanted, columns), dim=1)
    else:
        grouped = scores[:, : whole * group].unflatten(1, (whole, group))
        chosen = grouped.amax(2).topk(wanted, dim=1, sorted=False).indices
        inside = grouped.gather(1, chosen[:, :, None].expand(-1, -1, group)).flatten(1)
        places = (chosen[:, :, None] * group + torch.arange(group)).flatten(1)
        rest = torch.arange(whole * group, columns).expand(rows, -1)
        inside = torch.cat([inside, scores[:, whole * group :]], 1)
        values, order = inside.topk(wanted, dim=1)
        places = torch.cat([places, rest], 1).gather(1, order)
    return values.numpy(), places.masked_fill(values == -torch.inf, -1).numpy()


def _refine(
    part: np.ndarray, reference: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and positions of the k nearest of each query's candidates."""
    squared = np.empty(found.shape)
    rows, where = torch.from_numpy(reference), torch.from_numpy(found.clip(min=0))
    for start in range(0, len(part), _REFINED):
        some = slice(start, start + _REFINED)
        gathered = rows.index_select(0, where[some].flatten()).double()
        gathered = gathered.view(*where[some].shape, -1)
        gathered -= torch.from_numpy(part[some, None].astype(np.float64))
        squared[some] = torch.linalg.vecdot(gathered, gathered).numpy()
    return _ordered(squared, found, k)


def _unsure(best: np.ndarray, k: int, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least score that a true neighbour can have, and the queries that may lack one.

    best : scores of the candidates, descending; error : most that two scores differ by rounding
    Without a candidate to spare every row of the reference is one.
    """
    if best.shape[1] < k + _SPARE:
        return np.empty(0), np.empty(0, dtype=np.int64)
    least = best[:, k - 1] - error
    return least, np.flatnonzero((best[:, -1] > -np.inf) & ~(best[:, -1] < least))


def _first(
    query: np.ndarray, reference: np.ndarray, near: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and positions of the k nearest among the reference rows `near`."""
    squared = np.empty(len(near))
    for start in range(0, len(near), _DIFFERENCES):
        some = slice(start, start + _DIFFERENCES)
        difference = reference[near[some]].astype(np.float64) - query
        squared[some] = np.einsum("ij,ij->i", difference, difference)
    distances, positions = _ordered(squared[None], near[None], k)
    return distances[0], positions[0]


def _ordered(squared: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest of each row by (distance, position), NaN and -1 where there are fewer."""
    squared = np.where((found < 0) | np.isnan(squared), np.inf, squared)
    order = np.lexsort((found, squared), axis=1)[:, :k]
    distances = np.sqrt(np.take_along_axis(squared, order, 1))
    positions = np.take_along_axis(found, order, 1)
    missing = k - distances.shape[1]
    if missing > 0:
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
        positions = np.pad(positions, ((0, 0), (0, missing)), constant_values=-1)
    none = np.isinf(distances)
    return np.where(none, np.nan, distances), np.where(none, -1, positions)
