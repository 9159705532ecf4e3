"""Nearest neighbours against `faiss.IndexFlatL2`, and the memory of a million rows.

The peer is called as its manual says: `add`, then one `search` of all rows for 7 neighbours (the
row itself among them) with as many threads; ours leaves the row itself out and finds 6. Both are
held against float64 differences on some rows: exact means that no distance is wrong by more than
float32 rounds. (faiss takes distances from products, so its small ones round more coarsely.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import data
from .pairs import in_turn, largest_difference, limit_row, row
from .peak import measured

LIMIT_GIB = 24.0  # peak memory of neighbours among 1,000,000 x 384
EXACT = 1e-6  # our distances from float64's
SQUARES = 1e-5  # squared distances, ours from faiss's, which takes them from products
CHECKED = 64  # rows against float64


def vs_faiss(sizes: tuple[int, ...] = (20_000, 52_000, 100_000)) -> list[dict]:
    """All rows against all rows; the largest once, the others thrice."""
    return [once(size, 3 if size < 100_000 else 1) for size in sizes]


def once(size: int, repeats: int) -> dict:
    """One size. Raises Disagreement where a distance is wrong."""
    import faiss
    import torch

    from instructmining_core.indicators.nearest import nearest

    (rows, told), own = data.embeddings(size), np.arange(size)
    faiss.omp_set_num_threads(torch.get_num_threads())

    def flat() -> np.ndarray:
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(rows)
        return index.search(rows, 7)[0]

    sides = {"ours": lambda: nearest(rows, rows, 6, own)[0], "theirs": flat}
    seconds, values, repeats = in_turn(sides, repeats)
    some = np.random.default_rng(1).choice(size, min(CHECKED, size), replace=False)
    exact = largest_difference(values["ours"][some], in_float64(rows, some, 6), EXACT,
                               "distances, ours from float64's,")
    # The row itself is at distance 0 and any copy of it too, so dropping one 0 drops either.
    squares = largest_difference(values["ours"] ** 2, np.maximum(values["theirs"], 0)[:, 1:],
                                 SQUARES, "squared distances")
    return row(
        "knn_vs_faiss", f"faiss {faiss.__version__} IndexFlatL2, add and one search of all rows",
        size / seconds["ours"], size / seconds["theirs"], "rows/s", on=f"{size:,} x 384",
        data=told, dtype="float32, both",
        note=f"medians of {repeats} in turn, {torch.get_num_threads()} threads each; distances of "
             f"{len(some)} rows within {exact:.0e} of float64's; squares within {squares:.0e} of "
             "faiss's on all rows",
    )  # fmt: skip


def in_float64(rows: np.ndarray, some: np.ndarray, k: int) -> np.ndarray:
    """Distances of some rows to their k nearest other rows, by float64 differences."""
    wide, found = rows.astype(np.float64), []
    for position in some:
        difference = wide - wide[position]
        squares = np.einsum("ij,ij->i", difference, difference)
        squares[position] = np.inf
        found.append(np.sqrt(np.sort(np.partition(squares, k)[:k])))
    return np.array(found)


def memory(rows: int = 1_000_000, first: int = 4096) -> list[dict]:
    """Peak memory of a process that finds the neighbours of the first rows among a million."""
    code = (
        "import sys, numpy as np;"
        "from bench.data import embeddings;"
        "from instructmining_core.indicators.nearest import nearest;"
        "rows, first = map(int, sys.argv[1:]);"
        "found = embeddings(rows)[0];"
        "nearest(found[:first], found, 6, np.arange(first))"
    )
    _, peak = measured("-c", code, rows, first)
    return [limit_row(
        "knn_memory_1m", f"limit {LIMIT_GIB} GiB", peak, LIMIT_GIB, "GiB",
        on=f"{rows:,} x 384", data=f"{rows:,} random unit rows", dtype="float32",
        note=f"peak of a process, making the rows included; neighbours of the first {first:,} "
             "rows, one chunk; later chunks use the same buffers",
    )]  # fmt: skip


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "knn_vs_faiss": vs_faiss,
    "knn_memory_1m": memory,
}
