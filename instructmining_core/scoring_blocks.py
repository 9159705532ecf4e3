"""Rows on their way through an indicator: read, sorted into blocks, computed, stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from instructmining_core.bank import Shelf
from instructmining_core.indicators import Indicator
from instructmining_core.indicators.text import Conversation, read
from instructmining_core.records import row_hash
from instructmining_core.templates import clean_text

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
    columns = indicator.load().compute(conversations, **options)
    ordered = [columns[name] for name in indicator.columns]
    values = np.column_stack([column.values for column in ordered])
    return values, list(zip(*(column.reasons for column in ordered), strict=True))


def fill(
    shelf: Shelf,
    indicator: Indicator,
    conversations: Sequence[Conversation],
    names: Sequence[str],
    options_of: Callable[[list[str]], Mapping[str, Any]],
    block_rows: int,
    progress: bool = False,
) -> None:
    """Compute rows and put them on a shelf block by block, so that a kill loses one block.

    names : row hashes; options_of : row hashes of a block -> keywords of `compute`

    Longest first: rows of one length share a block, so batches inside it have little padding, and
    the time left is never told too short.
    """
    sizes = np.array([characters(c) for c in conversations], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    bar = tqdm(
        total=len(order), desc=indicator.name, unit="row", disable=not progress or not len(order)
    )
    done, start = 0, time.perf_counter()
    with bar:
        for first in range(0, len(order), block_rows):
            block = order[first : first + block_rows]
            hashes = [names[i] for i in block]
            rows = [conversations[i] for i in block]
            store(shelf, hashes, *stacked(indicator, rows, options_of(hashes)))
            done += int(sizes[block].sum())
            rate = done / 4 / (time.perf_counter() - start)  # about four characters a token
            bar.set_postfix_str(f"about {rate:,.0f} tokens/s", refresh=False)
            bar.update(len(block))


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
