"""Near duplicates in a ranking: a row that says again what a better row has said.

The study's leak test calls two rows near copies if they share *one* run of 8 words (statistics,
section 8). That is right for keeping an evaluation clean and too hard for a selection, where an
idiom or a quoted sentence would cost a good row. Here a row is a near duplicate of a better row if
that row holds at least 80 % of its runs of 8 words, in the whole conversation and in the answers
alone: another question about the same passage stays.

Near copies: rows that share a run of 8 words, and the groups they form.

Statistical plan, section 8: a near copy of a row shares a run of 8 words with it after folding case
and punctuation. What "folding punctuation" does to `read_csv` and "non-zero" is open, so all three
readings are taken, and one of them is enough. Groups are the connected components of that relation,
so no row of one group is a near copy of a row of another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import floor

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .formats import Messages

RUN = 8
_LETTERS, _WORDS, _MARKS = (re.compile(p) for p in (r"[^\W_]+", r"\w+", r"[^\w\s]|_"))


def fold(text: str) -> tuple[list[str], list[str], list[str]]:
    """Words in lower case, in three readings of "folding punctuation".

    Any mark ends a word; any mark but the underscore does; marks are taken out of the words.

    >>> fold("Use `read_csv`, non-zero.")[2]
    ['use', 'readcsv', 'nonzero']
    """
    text = text.lower()
    return _LETTERS.findall(text), _WORDS.findall(text), _MARKS.sub("", text).split()


def run_table(texts: Sequence[str], run: int = RUN) -> pd.DataFrame:
    """Every distinct run of `run` words in every text.

    returns : columns `text` (position in `texts`) and `key` (int64 hash of the run), no duplicates.
        A hash collision (odds below 1e-6 at ten million runs) can only join texts, not part them.
    """
    readings = [_distinct(fold(text)) for text in texts]
    words = [row for reading in zip(*readings, strict=True) for row in reading]
    lengths = np.array([len(row) for row in words], dtype=np.int64)
    if lengths.sum() == 0:
        return pd.DataFrame({"text": np.empty(0, np.int64), "key": np.empty(0, np.int64)})
    codes, _ = pd.factorize(np.array([word for row in words for word in row], dtype=object))
    owner = np.repeat(np.arange(len(words)), lengths)  # a reading's row, told from the next one's
    # odd 64-bit constants: a polynomial hash modulo 2**64
    mixed = (codes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    usable = max(len(codes) - run + 1, 0)
    key = np.zeros(usable, dtype=np.uint64)
    for offset in range(run):
        key = key * np.uint64(0xD6E8FEB86659FD93) + mixed[offset : offset + usable]
    inside = owner[:usable] == owner[run - 1 : run - 1 + usable]
    text = owner[:usable][inside] % len(texts)
    frame = pd.DataFrame({"text": text, "key": key[inside].view(np.int64)})
    return frame.drop_duplicates(ignore_index=True)


def _distinct(readings: tuple[list[str], ...]) -> tuple[list[str], ...]:
    """The readings, each equal to an earlier one as an empty list: most texts read one way."""
    return tuple(r if r not in readings[:i] else [] for i, r in enumerate(readings))


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


SHINGLE = 8
THRESHOLD = 0.8

# Scripts that write no spaces count a letter as a word, or a page would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_STEP = np.uint64(0xD6E8FEB86659FD93)  # odd: a polynomial hash modulo 2**64


def folded_words(text: str) -> list[str]:
    """Words with case and punctuation folded; a letter each in scripts without spaces.

    >>> folded_words("Don't PANIC.")
    ['don', 't', 'panic']
    """
    return _WORD.findall(text.casefold())


def shingles(words: Sequence[str], run: int = SHINGLE) -> np.ndarray:
    """Distinct hashes of all runs of `run` words, sorted; uint64, shape (m,).

    A text of fewer words has one hash, of all its words: it can only be matched whole. An empty
    text has none. Hashes hold within one process.
    """
    if not words:
        return np.empty(0, np.uint64)
    codes = np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64)
    codes *= np.uint64(0x9E3779B97F4A7C15)
    codes ^= codes >> np.uint64(29)
    run = min(run, len(words))
    usable = len(codes) - run + 1
    keys = np.full(usable, run, dtype=np.uint64)
    for offset in range(run):
        keys = keys * _STEP + codes[offset : offset + usable]
    return np.unique(keys)


class Kept:
    """The rows kept so far, best first, with an index that finds a near duplicate among them.

    threshold : share of a row's runs that one kept row must hold, in (0, 1]
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it is a share above 0 and at most 1")
        self.threshold = threshold
        self._rows: list[tuple[object, np.ndarray, np.ndarray]] = []
        self._index: dict[int, list[int]] = defaultdict(list)

    def add(self, name: object, messages: Messages) -> object | None:
        """Keep a row and return None; or return the name of the kept row that it repeats."""
        whole = shingles(folded_words("\n".join(m["content"] for m in messages)))
        answer = shingles(
            folded_words("\n".join(m["content"] for m in messages if m["role"] == "assistant"))
        )
        for one in self._candidates(whole):
            other, its_whole, its_answer = self._rows[one]
            if self._held(whole, its_whole) and self._held(answer, its_answer):
                return other
        for key in whole.tolist():
            self._index[key].append(len(self._rows))
        self._rows.append((name, whole, answer))
        return None

    def _candidates(self, keys: np.ndarray) -> list[int]:
        """Kept rows that may hold enough of `keys`, in the order in which they were kept.

        A row that holds the share t of n keys misses at most (1 - t) n of them, so it holds one
        of any (1 - t) n + 1: the rarest are asked, since boilerplate stands in very many rows.
        """
        found = [self._index.get(key, ()) for key in keys.tolist()]
        found.sort(key=len)
        needed = floor((1 - self.threshold) * len(found) + 1e-9) + 1
        return sorted({row for rows in found[:needed] for row in rows})

    def _held(self, keys: np.ndarray, other: np.ndarray) -> bool:
        if not len(keys):
            return not len(other)
        common = np.isin(keys, other, assume_unique=True).sum()
        return bool(common >= self.threshold * len(keys) - 1e-9)


def first_of_each(
    rows: Iterable[tuple[object, Messages]], threshold: float = THRESHOLD
) -> tuple[list, dict]:
    """Walk rows from best to worst: (names kept in order, {dropped name: the kept name})."""
    kept, names, dropped = Kept(threshold), [], {}
    for name, messages in rows:
        twin = kept.add(name, messages)
        if twin is None:
            names.append(name)
        else:
            dropped[name] = twin
    return names, dropped
