"""Diversity: the nearest neighbour inside a selection, and the Vendi score of a set.

Friedman & Dieng 2022, "The Vendi Score" (arXiv 2210.02410): the exponential of the entropy of the
eigenvalues of K / n, with K the cosine kernel; the effective number of different rows in a set. The
column is pool-relative like `knn_6`: make the reference of the selection to get the distance to the
nearest other row inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from instructmining_core.indicators import encoder
from instructmining_core.indicators.knn import distance_column
from instructmining_core.indicators.neighbours import nearest
from instructmining_core.indicators.opened import Opened, identity
from instructmining_core.indicators.reference import Reference
from instructmining_core.indicators.text import Column, Conversation


def compute_diversity(
    conversations: Sequence[Conversation],
    model: Opened,
    *,
    reference: Reference,
    row_hashes: Sequence[str],
    progress: bool = False,
    batch_tokens: int | None = None,
) -> dict[str, Column]:
    """Euclidean distance of each row to the nearest other row of the reference."""
    column = distance_column(
        conversations, model, 1, reference, row_hashes, progress, batch_tokens
    )
    return {"diversity": column}


def of_set(
    conversations: Sequence[Conversation], model: Opened, *, progress: bool = False
) -> dict[str, Any]:
    """How diverse a set of rows is, in plain types.

    returns : rows (embedded ones), vendi_score, nearest_inside (mean, "1 %", median and "99 %" of
        the distances to the nearest other row; None for fewer than two rows), encoder
    """
    texts, _ = encoder.texts_of(model, [c for c in conversations if not c.problem])
    vectors = encoder.embed(model, texts, progress=progress)
    vectors = vectors[~np.isnan(vectors).any(axis=1)]
    spread = None
    if len(vectors) > 1:
        inside = nearest_inside(vectors)
        low, middle, high = np.percentile(inside, (1, 50, 99)).tolist()
        spread = {"mean": float(inside.mean()), "1 %": low, "median": middle, "99 %": high}
    return {
        "rows": len(vectors), "vendi_score": vendi_score(vectors) if len(vectors) else None,
        "nearest_inside": spread, "encoder": identity(model),
    }  # fmt: skip


def nearest_inside(embeddings: np.ndarray) -> np.ndarray:
    """Distance of each row of a selection to the nearest other row of it.

    embeddings : float32, shape (n, dim), unit rows
    returns : float64, shape (n,); copies have 0, a single row has NaN
    """
    return nearest(embeddings, embeddings, 1, np.arange(len(embeddings)))[0][:, 0]


def vendi_score(embeddings: np.ndarray) -> float:
    """Effective number of different rows, 1 (all equal) to n (all orthogonal).

    embeddings : shape (n, dim), unit rows; n = 0 gives NaN. The eigenvalues of K / n are those of
    the smaller of the n x n and the dim x dim matrix.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if len(x) == 0:
        return float("nan")
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    shares = np.linalg.eigvalsh(gram / len(x))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))
