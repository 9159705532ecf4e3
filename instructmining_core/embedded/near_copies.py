"""Near copies: rows that share a run of 8 words, and the groups they form.

`shared/statistics.md` section 8: a near copy of a row shares a run of 8 words with it after folding
case and punctuation. Groups are the connected components of that relation, so no row of one group
is a near copy of a row of another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

RUN = 8
_WORD = re.compile(r"[^\W_]+")


def fold(text: str) -> list[str]:
    """Words in lower case; every other character, the underscore too, ends a word.

    >>> fold("Don't use `read_csv`.")
    ['don', 't', 'use', 'read', 'csv']
    """
    return _WORD.findall(text.lower())


def run_table(texts: Sequence[str], run: int = RUN) -> pd.DataFrame:
    """Every distinct run of `run` words in every text.

    returns : columns `text` (position in `texts`) and `key` (int64 hash of the run), no duplicates.
        A hash collision (odds below 1e-6 at ten million runs) can only join texts, not part them.
    """
    words = [fold(text) for text in texts]
    lengths = np.array([len(row) for row in words], dtype=np.int64)
    if lengths.sum() == 0:
        return pd.DataFrame({"text": np.empty(0, np.int64), "key": np.empty(0, np.int64)})
    codes, _ = pd.factorize(np.array([word for row in words for word in row], dtype=object))
    owner = np.repeat(np.arange(len(words)), lengths)
    # odd 64-bit constant (golden ratio): a polynomial hash modulo 2**64
    mixed = (codes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    usable = max(len(codes) - run + 1, 0)
    key = np.zeros(usable, dtype=np.uint64)
    for offset in range(run):
        key = key * np.uint64(0xD6E8FEB86659FD93) + mixed[offset : offset + usable]
    inside = owner[:usable] == owner[run - 1 : run - 1 + usable]
    frame = pd.DataFrame({"text": owner[:usable][inside], "key": key[inside].view(np.int64)})
    return frame.drop_duplicates(ignore_index=True)


def boilerplate(runs: pd.DataFrame, most: int) -> np.ndarray:
    """Texts to leave out so that no run is in more than `most` texts.

    A run that stands in many texts ("If True, the input is copied, else ...") is boilerplate, and
    would chain unrelated functions into one huge group. In reading order, a text is left out if one
    of its runs has already been met `most` times in the texts before it.

    runs : as `run_table` gives it; returns : sorted positions of the texts to leave out.
    """
    counts = runs.groupby("key")["text"].transform("size")
    common = runs[counts > most].sort_values(["text", "key"])
    met: dict[int, int] = {}
    out = []
    for text, keys in common.groupby("text", sort=True)["key"]:
        keys = keys.tolist()
        if any(met.get(key, 0) >= most for key in keys):
            out.append(text)
            continue
        for key in keys:
            met[key] = met.get(key, 0) + 1
    return np.array(out, dtype=np.int64)


def groups(runs: pd.DataFrame, size: int, also: Sequence | None = None) -> np.ndarray:
    """Group number of each text: connected components of "shares a run".

    runs : as `run_table` gives it; size : number of texts
    also : an optional label per text; texts with the same label are joined as well
    returns : int array, shape (size,)
    """
    _, key = np.unique(runs["key"].to_numpy(), return_inverse=True)
    rows, cols = [runs["text"].to_numpy()], [key + size]
    nodes = size + (int(key.max()) + 1 if len(key) else 0)
    if also is not None:
        label, _ = pd.factorize(np.asarray(also, dtype=object))
        rows.append(np.arange(size))
        cols.append(label + nodes)
        nodes += int(label.max()) + 1 if size else 0
    row, col = np.concatenate(rows), np.concatenate(cols)
    graph = coo_matrix((np.ones(len(row), np.int8), (row, col)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][:size]


def shared_runs(left: Sequence[str], right: Sequence[str], run: int = RUN) -> pd.DataFrame:
    """Pairs (position in `left`, position in `right`) of texts that share a run of words."""
    table = run_table([*left, *right], run)
    first = table[table["text"] < len(left)]
    second = table[table["text"] >= len(left)].assign(text=lambda t: t["text"] - len(left))
    pairs = first.merge(second, on="key", suffixes=("_left", "_right"))
    return pairs[["text_left", "text_right"]].drop_duplicates(ignore_index=True)
