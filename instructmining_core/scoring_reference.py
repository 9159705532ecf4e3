"""A pool's reference for pool-relative indicators, embedded once and kept in the bank.

The same rows and the same encoder give the same embeddings, so a second run opens no encoder.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from instructmining_core.bank import key_hash
from instructmining_core.indicators.reference import (
    Reference,
    make_reference,
    reference_hash,
    sample_reference,
)
from instructmining_core.indicators.text import Conversation
from instructmining_core.scoring_models import Models


def kept_reference(
    models: Models,
    conversations: Sequence[Conversation],
    row_hashes: Sequence[str],
    bank: str | Path | None,
    *,
    size: int,
    seed: int = 0,
    progress: bool = False,
) -> Reference:
    """The reference that `make_reference` draws from a pool; from the bank where it has it."""
    readable = [i for i, conversation in enumerate(conversations) if not conversation.problem]
    chosen = [readable[i] for i in sample_reference([row_hashes[i] for i in readable], size, seed)]
    names = tuple(row_hashes[i] for i in chosen)
    who = {name: models.describe("encoder")[name] for name in ("model", "revision", "dtype")}
    path = None
    if bank is not None:
        path = Path(bank) / "references" / f"{reference_hash(names)}-{key_hash(who)}.npz"
        kept = _read(path)
        if kept is not None and kept.row_hashes == names:
            return replace(kept, model=who["model"])  # the same weights may lie elsewhere now
    made = make_reference(
        models.open("encoder"), [conversations[i] for i in chosen], list(names), size=size,
        seed=seed, progress=progress,
    )  # fmt: skip
    if path is not None:
        made.save(path)
    return made


def _read(path: Path) -> Reference | None:
    """A kept reference; None where there is none, or only a broken file (it is made anew)."""
    try:
        return Reference.read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
