"""The reference set of `score`: from a file, a profile's own, or drawn from the scored files."""

from __future__ import annotations

import argparse
import hashlib
import heapq
import sys
from pathlib import Path

import pandas as pd

from instructmining_core.cli_models import opened_study
from instructmining_core.records import iter_records, row_hash
from instructmining_core.scoring import Scorer

REFERENCE_SEED = 0


def set_reference(args: argparse.Namespace, scorer: Scorer, piped: Path | None = None) -> None:
    """Give the scorer the reference that the options ask for; one that is drawn is kept beside OUT.

    piped : standard input as a file, where it is among the scored files
    """
    from instructmining_core.indicators.reference import REFERENCE_ROWS, Reference

    if args.reference:
        scorer.reference = Reference.read(Path(args.reference))
        return
    show = not args.quiet
    if args.profile:
        study = opened_study(args.profile)
        rows, seed = study.data.candidates, study.profile.data.seed
        size = min(study.profile.models.reference_rows, len(rows))
        reference = scorer.make_reference(rows, size=size, seed=seed, progress=show)
    else:
        rows = _bottom_rows(args, REFERENCE_ROWS, piped)
        reference = scorer.make_reference(rows, seed=REFERENCE_SEED, progress=show)
    kept = Path(f"{args.out}.reference.npz")
    reference.save(kept)
    sys.stderr.write(
        f"knn_6 is measured against {len(reference.row_hashes)} rows, kept in {kept}; score other "
        f"data with --reference {kept}\n"
    )


def _bottom_rows(args: argparse.Namespace, size: int, piped: Path | None) -> pd.DataFrame:
    """A sample of distinct rows in one pass: those of the lowest hashes, whatever their order."""
    heap: list[tuple[int, str, list]] = []
    inside: set[str] = set()
    for messages in _conversations(args, piped):
        own = row_hash(messages)
        if own in inside:
            continue
        salted = hashlib.sha256(f"{REFERENCE_SEED} {own}".encode()).digest()
        entry = (-int.from_bytes(salted[:8]), own, messages)
        inside.add(own)
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            inside.discard(heapq.heappushpop(heap, entry)[1])
    return pd.DataFrame({"messages": [messages for *_, messages in heap]})


def _conversations(args: argparse.Namespace, piped: Path | None):
    """The messages of every readable record of all files in turn."""
    for name in args.files:
        stream = piped.open("rb", buffering=0) if name == "-" else None
        for table, _ in iter_records(
            name, on_error="collect", paths=args.paths, revision=args.revision,
            chunk_rows=args.chunk_rows, stdin=stream,
        ):  # fmt: skip
            yield from table["messages"]
