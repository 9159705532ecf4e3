"""Down a ranking, best row first, until enough rows are kept that repeat none of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from instructmining_core.messages import Conversation
from instructmining_core.near_duplicates import Kept

BATCH_ROWS = 1024  # rows whose texts are fetched at a time, at least

Texts = Callable[[pd.DataFrame], Sequence[Conversation]]


class SelectionError(ValueError):
    """A selection that cannot be made as asked."""


def distinct_from_the_top(
    scored: pd.DataFrame, wanted: int, texts: pd.DataFrame | Texts | None, threshold: float
) -> tuple[list[int], dict[int, int]]:
    """Down the ranking until `wanted` rows are kept: (kept labels, {dropped label: kept label})."""
    firsts, repeats = _exact_duplicates(scored)
    kept: list[int] = []
    twins: dict[int, int] = {}
    near = Kept(threshold)
    for label, messages in _with_texts(scored.loc[firsts], wanted, texts):
        twin = near.add(label, messages) if messages is not None else None
        if twin is None:
            kept.append(label)
        else:
            twins[label] = twin
        if len(kept) == wanted:
            break
    # Labels are positions in the ranking: what lies below the last kept row was not looked at.
    for label, first in repeats.items():
        if label < kept[-1] or len(kept) < wanted:
            twins[label] = twins.get(first, first)
    return kept, twins


def _exact_duplicates(scored: pd.DataFrame) -> tuple[list[int], dict[int, int]]:
    """Labels of the first row of each row hash, and {label of a repeat: label of the first}."""
    if "row_hash" not in scored:
        return list(scored.index), {}
    seen: dict[str, int] = {}
    firsts, repeats = [], {}
    for label, own in scored["row_hash"].items():
        first = seen.setdefault(own, label) if own else label
        if first == label:
            firsts.append(label)
        else:
            repeats[label] = first
    return firsts, repeats


def _with_texts(
    rows: pd.DataFrame, wanted: int, texts: pd.DataFrame | Texts | None
) -> Iterator[tuple[int, Conversation | None]]:
    fetch = _from_table(texts) if isinstance(texts, pd.DataFrame) else texts
    # Fetching may mean reading a file again, so the first batch should do and the next ones double.
    start, size = 0, max(BATCH_ROWS, wanted + wanted // 4)
    while start < len(rows):
        batch = rows.iloc[start : start + size]
        yield from zip(batch.index, fetch(batch) if fetch else [None] * len(batch), strict=True)
        start, size = start + size, 2 * size


def _from_table(table: pd.DataFrame) -> Texts:
    def keys(frame: pd.DataFrame) -> list[tuple]:
        parts = frame["part"] if "part" in frame else [0] * len(frame)
        return list(zip(frame["file"], frame["row"], parts, strict=True))

    by_key = dict(zip(keys(table), table["messages"], strict=True))

    def fetch(rows: pd.DataFrame) -> list[Conversation]:
        missing = [key for key in keys(rows) if key not in by_key]
        if missing:
            raise SelectionError(f"row {missing[0]} of the scores is not in the record table")
        return [by_key[key] for key in keys(rows)]

    return fetch
