"""Rows on their way through an indicator: read, sorted into blocks, computed, stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from instructmining_core.bank import Shelf
from instructmining_core.indicators import Indicator
from instructmining_core.indicators.text import Conversation, read
from instructmining_core.records import row_hash
from instructmining_core.scoring_progress import Progress
from instructmining_core.templates import clean_text

BLOCK_SECONDS = 10  # of work between two writes to the bank: what a kill may cost
FIRST_ROWS = 8  # of the first block, before the speed is known; later ones grow fourfold at most
_RETRIED = "out of memory"  # a reason that another machine or another day may not give


def read_rows(table: pd.DataFrame) -> tuple[list[Conversation], list[str]]:
    """The checked conversation and the row hash of each row; a row that cannot be read has "".

    A column `problem` (`read_records(on_error="keep")`) takes the place of our own finding.
    """
    conversations = [read(messages) for messages in table["messages"]]
    if "problem" in table:
        conversations = [
            Conversation((), (), clean_text(problem)) if problem else conversation
            for conversation, problem in zip(conversations, table["problem"], strict=True)
        ]
    hashes = [
        "" if c.problem else row_hash(messages)
        for c, messages in zip(conversations, table["messages"], strict=True)
    ]
    return conversations, hashes


def stacked(
    indicator: Indicator, conversations: Sequence[Conversation], options: Mapping[str, Any]
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """An indicator's columns side by side.

    options : keywords of its `compute`
    returns : values, float64, shape (n, columns), and n tuples of one reason a column
    """
    columns = indicator.load()(conversations, **options)
    ordered = [columns[name] for name in indicator.columns]
    values = np.column_stack([column.values for column in ordered])
    return values, list(zip(*(column.reasons for column in ordered), strict=True))


def timed(indicator: Indicator, conversations: Sequence[Conversation], options: Mapping) -> float:
    """Seconds that an indicator takes on these rows; a call on the first one warms it up before."""
    compute = indicator.load()
    first = {"row_hashes": options["row_hashes"][:1]} if "row_hashes" in options else {}
    compute(conversations[:1], **{**options, **first})
    start = time.perf_counter()
    compute(conversations, **options)
    return time.perf_counter() - start


def unknown(shelf: Shelf, names: Sequence[str]) -> list[int]:
    """Positions of the distinct rows that the shelf lacks, each at its first place."""
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    order = list(first)
    return [first[order[i]] for i in shelf.missing(order)]


def fill(
    shelf: Shelf,
    indicator: Indicator,
    conversations: Sequence[Conversation],
    names: Sequence[str],
    options_of: Callable[[list[str]], Mapping[str, Any]],
    block_rows: int,
    progress: Progress,
) -> None:
    """Compute rows and put them on a shelf block by block, so that a kill loses one block.

    names : row hashes; options_of : row hashes of a block -> keywords of `compute`
    block_rows : rows of a block at most; it is smaller where they would take over `BLOCK_SECONDS`

    Longest first: rows of one length share a block, so batches inside it have little padding, and
    the time left is never told too short.
    """
    sizes = np.array([characters(c) for c in conversations], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    whole = max(1, int(sizes.sum()))
    first, rows = 0, min(FIRST_ROWS, block_rows)
    while first < len(order):
        block = order[first : first + rows]
        hashes = [names[i] for i in block]
        options = {**options_of(hashes), "progress": progress.meter}  # opens the model
        start = time.perf_counter()
        with progress.working(indicator.name):
            found = stacked(indicator, [conversations[i] for i in block], options)
        seconds = time.perf_counter() - start
        store(shelf, hashes, *found)
        done = int(sizes[block].sum())
        progress.done(indicator.name, len(order) * done / whole)
        first += len(block)
        affordable = BLOCK_SECONDS * done / max(seconds, 1e-9)
        rows = rows_within(sizes[order[first:]], affordable, min(block_rows, 4 * len(block)))


def rows_within(sizes: np.ndarray, affordable: float, most: int) -> int:
    """How many of the next rows to take: as many as are affordable, at least 1, at most `most`.

    sizes : shape (n,), characters of the rows in order; affordable : characters

    >>> rows_within(np.array([50, 30, 30, 10]), 100, 8)
    2
    """
    return int(np.clip(np.searchsorted(np.cumsum(sizes), affordable, side="right"), 1, most))


def store(
    shelf: Shelf, names: Sequence[str], values: np.ndarray, reasons: Sequence[tuple[str, ...]]
) -> None:
    """Put rows on the shelf, and on disk those whose reason is not a passing one."""
    passing = [any(_RETRIED in why for why in row) for row in reasons]
    lasting = [i for i, now in enumerate(passing) if not now]
    if lasting:
        shelf.add([names[i] for i in lasting], values[lasting], [reasons[i] for i in lasting])
    for i, now in enumerate(passing):
        if now:
            shelf.values[names[i]] = (tuple(values[i]), tuple(reasons[i]))


def characters(conversation: Conversation) -> int:
    """Characters of all its messages."""
    return sum(len(m["content"]) for m in conversation.messages)
