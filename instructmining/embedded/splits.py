"""Who gets which rows: base model's text, stand-ins, candidates, pool and two evaluation sets.

Two promises: all rows of one function are in one split, and no row of a split is a near copy of a
row of another split. A near-copy group that stands in several splits keeps only the rows of one of
them, the others are left out of the corpus.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from instructmining_core.data.duplicates import boilerplate, groups, word_runs

SPLITS = ("base_text", "standin", "candidates", "pool", "eval_1", "eval_2")
EVALS = ("eval_1", "eval_2")


@dataclass(frozen=True)
class SplitSizes:
    """Rows per library; what is left of a library goes to the base model's text."""

    read: int = 2400  # rows read of one library at most
    evaluation: int = 12  # rows in each evaluation set, the same for every library
    candidates: int = 600  # rows of a candidate library
    pool: int = 300  # rows of a candidate library that no set may use
    unseen_pool: int = 1000  # rows of a library that is in no set
    candidate_share: float = 0.72  # of a small library's rows
    pool_share: float = 0.2  # of what is left after that
    most_copies: int = 3  # texts that may share one run of 8 words; more is boilerplate


SIZES = {
    "full": SplitSizes(),
    "smoke": SplitSizes(read=240, evaluation=2, candidates=90, pool=24, unseen_pool=90),
}


def split(rows: pd.DataFrame, roles: dict[str, str], sizes: SplitSizes, seed: int) -> pd.DataFrame:
    """Rows with their split, near-copy group, and only those that keep both promises.

    rows : columns source, symbol, prompt, response
    roles : library -> "candidate", "unseen", "standin" or "base"
    returns : the rows kept, with columns `split` and `group` (int); the numbers left out are in
        `.attrs["left_out"]`: boilerplate, crossing (near copies in another split), unused
        (a second row of a function in an evaluation set, or past a split's size)
    """
    texts = (rows["prompt"] + "\n" + rows["response"]).tolist()
    runs = word_runs(texts)
    common = boilerplate(runs, sizes.most_copies)
    runs = runs[~runs["text"].isin(common)]
    table = rows.assign(group=groups(runs, len(rows))).drop(index=rows.index[common])
    lonely = _lonely_symbols(table)
    parts = [
        _split_library(part, roles[source], sizes, lonely, seed)
        for source, part in table.groupby("source", sort=False)
    ]
    chosen = pd.concat(parts).reindex(table.index)
    table = table.assign(split=chosen)
    named = table[table["split"] != ""]
    kept = _one_split_per_group(named)
    kept = kept.assign(group=pd.factorize(kept["group"])[0])
    kept.attrs["left_out"] = {
        "boilerplate": len(common),
        "unused": len(table) - len(named),
        "crossing": len(named) - len(kept),
    }
    return kept.reset_index(drop=True)


def _order(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{key}".encode()).digest()


def _lonely_symbols(table: pd.DataFrame) -> set[str]:
    """Functions without a near copy in another function: only they may be asked in evaluation."""
    symbols_of_group = table.groupby("group")["symbol"].transform("nunique")
    shared = set(table.loc[symbols_of_group > 1, "symbol"])
    return set(table["symbol"]) - shared


def _split_library(
    part: pd.DataFrame, role: str, sizes: SplitSizes, lonely: set[str], seed: int
) -> pd.Series:
    """Split name of every row of one library, "" for rows not used."""
    if role in ("standin", "base"):
        return pd.Series("standin" if role == "standin" else "base_text", index=part.index)
    chosen = pd.Series("", index=part.index)
    symbols = sorted(part["symbol"].unique(), key=lambda s: _order(s, seed))
    asked = [s for s in symbols if s in lonely][: 2 * sizes.evaluation]
    rows_of = part.groupby("symbol").indices
    for position, symbol in enumerate(asked):
        index = part.index[rows_of[symbol]]
        one = min(index, key=lambda i: _order(f"row {part.at[i, 'id']}", seed))
        chosen[one] = EVALS[position % 2]
    rest = [s for s in symbols if s not in set(asked)]
    count = np.array([len(rows_of[s]) for s in rest])
    for name, rank in zip(_fill(role, sizes, count), rest, strict=True):
        chosen[part.index[rows_of[rank]]] = name
    return chosen


def _fill(role: str, sizes: SplitSizes, count: np.ndarray) -> list[str]:
    """Split of each function, in order: candidates, then pool, then the base model's text."""
    total = int(count.sum())
    if role == "unseen":
        first, second = 0, min(sizes.unseen_pool, int(0.7 * total))
    else:
        first = min(sizes.candidates, int(sizes.candidate_share * total))
        second = min(sizes.pool, int(sizes.pool_share * total))
    reached = np.cumsum(count)
    return [
        "candidates" if r <= first else "pool" if r <= first + second else "base_text"
        for r in reached
    ]


def _one_split_per_group(table: pd.DataFrame) -> pd.DataFrame:
    """Of a group that stands in several splits, the rows of the split with most of them.

    Ties go to the split that stands later in SPLITS, the scarcer one.
    """
    rank = table["split"].map({name: i for i, name in enumerate(SPLITS)})
    size = table.groupby(["group", "split"])["split"].transform("size")
    best = (size * len(SPLITS) + rank).groupby(table["group"]).transform("max")
    return table[size * len(SPLITS) + rank == best]
