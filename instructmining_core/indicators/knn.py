"""KNN_i: Euclidean distance to the i-th nearest neighbour in embedding space, i = 6.

InstructMining v3, Table 1, finds neighbours approximately (NN-Descent, Dong et al. 2011); ours is
exact. The distance is taken against a `reference.Reference`.

A reference holds distinct rows. A row is not its own neighbour: the reference row with its hash is
left out, so an exact copy is no neighbour either. A nearly equal row is, with a distance near 0.
Equal distances are ordered by position in the reference; the i-th distance does not depend on it.

A conversation that is longer than the encoder reads loses whole messages from the left, and the
reasons say so (`encoder.texts_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instructmining_core.indicators import encoder
from instructmining_core.indicators.neighbours import nearest
from instructmining_core.indicators.opened import Opened
from instructmining_core.indicators.reference import Reference, check_encoder
from instructmining_core.indicators.text import Column, Conversation

NEIGHBOUR = 6
OUT_OF_MEMORY = "out of memory on this row alone"


def compute_knn(
    conversations: Sequence[Conversation],
    model: Opened,
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
    texts, cut = encoder.texts_of(model, [c for c in conversations if not c.problem])
    vectors = encoder.embed(model, texts, batch_tokens=batch_tokens, progress=progress)
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
