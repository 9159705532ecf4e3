from __future__ import annotations

import pandas as pd

from .embedded.near_copies import shared_runs


def texts_of(table: pd.DataFrame) -> list[str]:
    """Each record's messages as one text, a line each."""
    return ["\n".join(m["content"] for m in messages) for messages in table["messages"]]


def count_shared(left: pd.DataFrame, right: pd.DataFrame) -> int:
    """How many records of `left` share a run of 8 words with any record of `right`."""
    return int(shared_runs(texts_of(left), texts_of(right))["text_left"].nunique())


def without_copies_of(table: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The records of `table` that share no run of 8 words with any record of `others`."""
    shared = shared_runs(texts_of(table), texts_of(others))["text_left"]
    return table.drop(index=table.index[shared.unique()]).reset_index(drop=True)
