"""Distances to other rows in embedding space: knn_6, diversity, and the reference they need.

knn_6 is the Euclidean distance to the 6th nearest neighbour (InstructMining v3, Table 1: KNN_i),
diversity that to the nearest. The paper finds neighbours approximately (NN-Descent, Dong et al.
2011); ours are exact. A neighbour's distance shrinks as the pool grows, so both are taken against a
`Reference`: a sample of fixed size, the same at fitting and at use. With the selection itself as
reference, diversity is the distance to the nearest other row inside it; `vendi_score` (Friedman &
Dieng 2022, arXiv 2210.02410) counts the different rows of a set.

A reference holds distinct rows. A row is not its own neighbour: the reference row with its hash is
left out, so an exact copy is no neighbour either. A nearly equal row is, with a distance near 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InstructMiningError
from ..files import being_written
from ..models.loading import LoadedModel, identity
from . import embedding
from .nearest import nearest
from .turns import CheckedConversation, Column

_TEXTS = "texts-2"  # which text of a row was embedded; raised with the version of `knn`


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

    def save(self, path: Path, *, half: bool = False) -> None:
        """Write numbers and hashes (no text) as `.npz`, atomically.

        half : embeddings in float16, half the size; distances then differ by some 1e-4
        """
        kept = self.embeddings.astype(np.float16) if half else self.embeddings
        with being_written(path) as partial, partial.open("wb") as stream:
            np.savez(
                stream, row_hashes=np.array(self.row_hashes, dtype="U32"),
                embeddings=kept,
                encoder=np.array([self.model, self.revision, self.dtype, _TEXTS]),
            )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote. Raises InstructMiningError for a file of an earlier version."""
        with np.load(path, allow_pickle=False) as found:
            hashes = tuple(str(h) for h in found["row_hashes"])
            *embedding, texts = map(str, found["encoder"])
            if texts != _TEXTS:
                raise InstructMiningError(
                    f"{path} was made by a version that cut long conversations otherwise: make it "
                    "again from the same pool"
                )
            return cls(hashes, found["embeddings"].astype(np.float32), *embedding)


def reference_hash(row_hashes: Sequence[str]) -> str:
    """First 16 hex of the sha256 of row hashes in ascending order, one a line."""
    return hashlib.sha256("\n".join(sorted(row_hashes)).encode()).hexdigest()[:16]


def sample_reference(row_hashes: Sequence[str], size: int, seed: int) -> list[int]:
    """Positions of a seeded sample of at most `size` distinct rows, in ascending order of hash.

    It does not depend on the rows' order.
    """
    _, first = np.unique(np.asarray(row_hashes, dtype=str), return_index=True)
    if len(first) > size:
        first = first[np.sort(np.random.default_rng(seed).choice(len(first), size, replace=False))]
    return first.tolist()


def make_reference(
    model: LoadedModel,
    conversations: Sequence[CheckedConversation],
    row_hashes: Sequence[str],
    *,
    progress: bool = False,
) -> Reference:
    """Embed the distinct readable rows among these as a reference."""
    readable = {name: i for i, name in enumerate(row_hashes) if not conversations[i].problem}
    if not readable:
        raise InstructMiningError("no readable row to draw a reference from")
    names = sorted(readable)
    texts, _ = embedding.encoder_texts(model, [conversations[readable[name]] for name in names])
    vectors = embedding.embed(model, texts, progress=progress)
    if np.isnan(vectors).any():
        raise InstructMiningError(
            "out of memory while embedding the reference; free some and retry"
        )
    who = identity(model)
    return Reference(tuple(names), vectors, who["model"], who["revision"], who["dtype"])


NEIGHBOURS = {"knn_6": 6, "diversity": 1}  # column -> which neighbour's distance it is
OUT_OF_MEMORY = "out of memory on this row alone"


def compute_neighbours(
    conversations: Sequence[CheckedConversation],
    model: LoadedModel,
    *,
    reference: Reference,
    row_hashes: Sequence[str],
    columns: Collection[str] = ("knn_6",),
    batch_tokens: int | None = None,
) -> dict[str, Column]:
    """Distance of each row to its 6th nearest neighbour in the reference, to the nearest, or both.

    row_hashes : one a conversation; by them a row finds itself in the reference
    columns : of "knn_6" and "diversity"; both together embed a row only once
    batch_tokens : as in `embedding.embed`
    A row is one point (`embedding.encoder_texts`); NaN with a reason where the reference is too
    small. Raises InstructMiningError if the reference was embedded by another model.
    """
    who = identity(model)
    ours, theirs = (who["revision"], who["dtype"]), (reference.revision, reference.dtype)
    if ours != theirs:
        raise InstructMiningError(
            f"the reference was embedded by {reference.model} {' '.join(theirs)}, the rows would "
            f"be by {who['model']} {' '.join(ours)}: use the same encoder, or a new reference"
        )
    readable = np.array([not c.problem for c in conversations], dtype=bool)
    texts, cut = embedding.encoder_texts(model, [c for c in conversations if not c.problem])
    vectors = embedding.embed(model, texts, batch_tokens=batch_tokens)
    where = {name: i for i, name in enumerate(reference.row_hashes)}
    own = np.array([where.get(name, -1) for name in row_hashes], dtype=np.int64)[readable]
    most = max(NEIGHBOURS[name] for name in columns)
    distances, _ = nearest(vectors, reference.embeddings, most, own)
    lost = np.isnan(vectors).any(axis=1)
    distances[lost] = np.nan
    found = {}
    for name in columns:
        values = np.full(len(conversations), np.nan)
        values[readable] = distances[:, NEIGHBOURS[name] - 1]
        few = f"the reference has fewer than {NEIGHBOURS[name]} other rows"
        notes = iter(
            OUT_OF_MEMORY if gone else few if np.isnan(value) else note
            for gone, value, note in zip(lost, values[readable], cut, strict=True)
        )
        found[name] = Column(values, [c.problem or next(notes) for c in conversations])
    return found


def of_set(conversations: Sequence[CheckedConversation], model: LoadedModel) -> dict[str, Any]:
    """How diverse a set of rows is, in plain types.

    returns : rows (embedded ones), vendi_score, nearest_inside (mean, "1 %", median and "99 %" of
        the distances to the nearest other row; None for fewer than two rows), encoder
    """
    texts, _ = embedding.encoder_texts(model, [c for c in conversations if not c.problem])
    vectors = embedding.embed(model, texts)
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
