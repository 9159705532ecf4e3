"""Diversity: the nearest neighbour inside a selection, and the Vendi score of a set.

Friedman & Dieng 2022, "The Vendi Score" (arXiv 2210.02410): the exponential of the entropy of the
eigenvalues of K / n, with K the cosine kernel; the effective number of different rows in a set. The
column is pool-relative like `knn_6`: make the reference of the selection to get the distance to the
nearest other row inside it.

The rows that neighbours are looked for in: drawn by seed, embedded once, named by a hash.

A neighbour's distance shrinks as the pool grows, so pool-relative indicators are taken against a
sample of fixed size, the same at fitting and at use. It can be kept as a file of numbers.

KNN_i: Euclidean distance to the i-th nearest neighbour in embedding space, i = 6.

InstructMining v3, Table 1, finds neighbours approximately (NN-Descent, Dong et al. 2011); ours is
exact. The distance is taken against a `reference.Reference`.

A reference holds distinct rows. A row is not its own neighbour: the reference row with its hash is
left out, so an exact copy is no neighbour either. A nearly equal row is, with a distance near 0.
Equal distances are ordered by position in the reference; the i-th distance does not depend on it.

A conversation that is longer than the encoder reads loses whole messages from the left, and the
reasons say so (`encoder.texts_of`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import REFERENCE_ROWS
from ..files import being_written
from ..models.loading import LoadedModel, identity
from . import embedding
from .nearest import nearest
from .turns import CheckedConversation, Column

_TEXTS = "texts-2"  # which text of a row was embedded; raised with the version of `knn`


class ReferenceMismatch(ValueError):
    """A reference that does not fit the encoder, or cannot be made."""


@dataclass(frozen=True)
class Reference:
    """The rows that neighbours are looked for in.

    row_hashes : distinct, in ascending order
    embeddings : float32, shape (n, dim), unit rows in the order of `row_hashes`
    model, revision, dtype : of the encoder
    """

    row_hashes: tuple[str, ...]
    embeddings: np.ndarray
    model: str
    revision: str
    dtype: str

    @property
    def hash(self) -> str:
        """First 16 hex of the sha256 of the row hashes."""
        return reference_hash(self.row_hashes)

    def describe(self) -> dict:
        """Hash and size, as they go into keys and cards."""
        return {"hash": self.hash, "size": len(self.row_hashes)}

    def save(self, path: Path) -> None:
        """Write numbers and hashes (no text) as `.npz`, atomically."""
        with being_written(path) as partial, partial.open("wb") as stream:
            np.savez(
                stream, row_hashes=np.array(self.row_hashes, dtype="U32"),
                embeddings=self.embeddings,
                encoder=np.array([self.model, self.revision, self.dtype, _TEXTS]),
            )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote. Raises ReferenceMismatch for a file of an earlier version."""
        with np.load(path, allow_pickle=False) as found:
            hashes = tuple(str(h) for h in found["row_hashes"])
            *embedding, texts = map(str, found["encoder"])
            if texts != _TEXTS:
                raise ReferenceMismatch(
                    f"{path} was made by a version that cut long conversations otherwise: make it "
                    "again from the same pool"
                )
            return cls(hashes, found["embeddings"], *embedding)


def reference_hash(row_hashes: Sequence[str]) -> str:
    """First 16 hex of the sha256 of row hashes in ascending order, one a line."""
    return hashlib.sha256("\n".join(sorted(row_hashes)).encode()).hexdigest()[:16]


def sample_reference(row_hashes: Sequence[str], size: int = REFERENCE_ROWS, seed: int = 0) -> list:
    """Positions of a seeded sample of distinct rows; it does not depend on the rows' order."""
    first = {}
    for position, name in enumerate(row_hashes):
        first.setdefault(name, position)
    names = sorted(first)
    if len(names) > size:
        chosen = np.random.default_rng(seed).choice(len(names), size, replace=False)
        names = [names[i] for i in sorted(chosen)]
    return [first[name] for name in names]


def make_reference(
    model: LoadedModel,
    conversations: Sequence[CheckedConversation],
    row_hashes: Sequence[str],
    *,
    size: int = REFERENCE_ROWS,
    seed: int = 0,
    progress: bool = False,
) -> Reference:
    """Draw and embed a reference of at most `size` distinct readable rows."""
    readable = [i for i, c in enumerate(conversations) if not c.problem]
    if not readable:
        raise ReferenceMismatch("no readable row to draw a reference from")
    chosen = [readable[i] for i in sample_reference([row_hashes[i] for i in readable], size, seed)]
    from . import embedding  # torch only when it is needed

    texts, _ = embedding.texts_of(model, [conversations[i] for i in chosen])
    vectors = embedding.embed(model, texts, progress=progress)
    if np.isnan(vectors).any():
        raise ReferenceMismatch("out of memory while embedding the reference; free some and retry")
    who = identity(model)
    return Reference(
        tuple(row_hashes[i] for i in chosen), vectors,
        who["model"], who["revision"], who["dtype"],
    )  # fmt: skip


def check_encoder(reference: Reference, model: LoadedModel) -> None:
    """Raise ReferenceMismatch if the reference was embedded by another model than `model`."""
    who = identity(model)
    ours = (who["revision"], who["dtype"])
    theirs = (reference.revision, reference.dtype)
    if ours != theirs:
        raise ReferenceMismatch(
            f"the reference was embedded by {reference.model} {' '.join(theirs)}, the rows would "
            f"be by {who['model']} {' '.join(ours)}: use the same encoder, or a new reference"
        )


NEIGHBOUR = 6
OUT_OF_MEMORY = "out of memory on this row alone"


def compute_knn(
    conversations: Sequence[CheckedConversation],
    model: LoadedModel,
    *,
    reference: Reference,
    row_hashes: Sequence[str],
    progress: bool = False,
    batch_tokens: int | None = None,
) -> dict[str, Column]:
    """Distance of each row to its 6th nearest neighbour in the reference; a row is one point."""
    column = distance_column(
        conversations, model, NEIGHBOUR, reference, row_hashes, progress, batch_tokens
    )
    return {"knn_6": column}


def distance_column(
    conversations, model, neighbour, reference, row_hashes, progress, batch_tokens=None
) -> Column:
    """Distance to the `neighbour`-th nearest reference row, NaN with a reason where there is none.

    Raises ReferenceMismatch if the reference was embedded by another model.
    """
    check_encoder(reference, model)
    readable = np.array([not c.problem for c in conversations], dtype=bool)
    texts, cut = embedding.texts_of(model, [c for c in conversations if not c.problem])
    vectors = embedding.embed(model, texts, batch_tokens=batch_tokens, progress=progress)
    where = {name: i for i, name in enumerate(reference.row_hashes)}
    own = np.array([where.get(name, -1) for name in row_hashes], dtype=np.int64)[readable]
    distances, _ = nearest(vectors, reference.embeddings, neighbour, own, progress=progress)
    values = np.full(len(conversations), np.nan)
    values[readable] = distances[:, -1]
    lost = np.zeros(len(conversations), dtype=bool)
    lost[readable] = np.isnan(vectors).any(axis=1)
    values[lost] = np.nan
    few = f"the reference has fewer than {neighbour} other rows"
    notes = np.full(len(conversations), "", dtype=object)
    notes[readable] = cut
    reasons = [
        c.problem or (OUT_OF_MEMORY if gone else few if np.isnan(value) else note)
        for c, gone, value, note in zip(conversations, lost, values, notes, strict=True)
    ]
    return Column(values, reasons)


def compute_diversity(
    conversations: Sequence[CheckedConversation],
    model: LoadedModel,
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
    conversations: Sequence[CheckedConversation], model: LoadedModel, *, progress: bool = False
) -> dict[str, Any]:
    """How diverse a set of rows is, in plain types.

    returns : rows (embedded ones), vendi_score, nearest_inside (mean, "1 %", median and "99 %" of
        the distances to the nearest other row; None for fewer than two rows), encoder
    """
    texts, _ = embedding.texts_of(model, [c for c in conversations if not c.problem])
    vectors = embedding.embed(model, texts, progress=progress)
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
