"""The rows that neighbours are looked for in: drawn by seed, embedded once, named by a hash.

A neighbour's distance shrinks as the pool grows, so pool-relative indicators are taken against a
sample of fixed size, the same at fitting and at use. It can be kept as a file of numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instructmining_core.indicators.opened import identity
from instructmining_core.indicators.text import Conversation

if TYPE_CHECKING:
    from instructmining_core.indicators.opened import Opened

REFERENCE_ROWS = 2048  # default size of the sample
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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with partial.open("wb") as stream:
            np.savez(
                stream, row_hashes=np.array(self.row_hashes, dtype="U32"),
                embeddings=self.embeddings,
                encoder=np.array([self.model, self.revision, self.dtype, _TEXTS]),
            )  # fmt: skip
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote. Raises ReferenceMismatch for a file of an earlier version."""
        with np.load(path, allow_pickle=False) as found:
            hashes = tuple(str(h) for h in found["row_hashes"])
            *encoder, texts = map(str, found["encoder"])
            if texts != _TEXTS:
                raise ReferenceMismatch(
                    f"{path} was made by a version that cut long conversations otherwise: make it "
                    "again from the same pool"
                )
            return cls(hashes, found["embeddings"], *encoder)


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
    model: Opened,
    conversations: Sequence[Conversation],
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
    from instructmining_core.indicators import encoder  # torch only when it is needed

    texts, _ = encoder.texts_of(model, [conversations[i] for i in chosen])
    vectors = encoder.embed(model, texts, progress=progress)
    if np.isnan(vectors).any():
        raise ReferenceMismatch("out of memory while embedding the reference; free some and retry")
    who = identity(model)
    return Reference(
        tuple(row_hashes[i] for i in chosen), vectors,
        who["model"], who["revision"], who["dtype"],
    )  # fmt: skip


def check_encoder(reference: Reference, model: Opened) -> None:
    """Raise ReferenceMismatch if the reference was embedded by another model than `model`."""
    who = identity(model)
    ours = (who["revision"], who["dtype"])
    theirs = (reference.revision, reference.dtype)
    if ours != theirs:
        raise ReferenceMismatch(
            f"the reference was embedded by {reference.model} {' '.join(theirs)}, the rows would "
            f"be by {who['model']} {' '.join(ours)}: use the same encoder, or a new reference"
        )
