"""Rows that say the same again: copies across an evaluation's border, and repeats in a ranking.

Both look at runs of 8 words, after case and punctuation are folded. To keep an evaluation clean one
shared run is enough (statistics, section 8). That is too hard for a selection, where an idiom or a
quoted sentence would cost a good row: there a row is a near duplicate of a better row if that row
holds at least 80 % of its runs, in the whole conversation and in the answers alone, and, where the
answer is short or the text before it long, asks the same: another question about the same passage
stays.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from math import floor
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .fields import Messages

RUN = 8  # words
THRESHOLD = 0.8  # share of a row's runs that one better row must hold
SHORT = 32  # runs of an answer below which it does not tell its question

# Scripts that write no spaces count a letter as a word, or a page would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_LETTERS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_WORDS, _MARKS = re.compile(r"\w+"), re.compile(r"[^\w\s]|_")
_SENTENCES = re.compile(r"(?<=[.?!])\s+|(?<=[。？！])|\n+")
_NONE = np.empty(0, np.uint64)
_STEP = np.uint64(0xD6E8FEB86659FD93)  # odd: a polynomial hash modulo 2**64


def fold(text: str) -> list[str]:
    """Words without case; any mark ends a word. A letter each in scripts without spaces.

    >>> fold("Don't use `read_csv`.")
    ['don', 't', 'use', 'read', 'csv']
    """
    return _LETTERS.findall(text.casefold())


def readings(text: str) -> list[list[str]]:
    """The words in every distinct reading of "folding punctuation", `fold`'s first.

    What it does to `read_csv` and "non-zero" is open: the underscore may be a letter, and marks may
    be taken out of the words. A copy in one reading is a copy.
    """
    found = [fold(text)]
    for words in (_WORDS.findall(text.casefold()), _MARKS.sub("", text.casefold()).split()):
        if words not in found:
            found.append(words)
    return found


def shingles(words: Sequence[str]) -> np.ndarray:
    """Distinct hashes of all runs of 8 words, sorted; uint64, shape (m,).

    A text of fewer words has one hash, of all its words: it can only be matched whole. An empty
    text has none. Hashes hold within one process. A collision (odds below 1e-6 at ten million runs)
    can only join texts, not part them.
    """
    if not words:
        return _NONE
    codes = np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64)
    codes *= np.uint64(0x9E3779B97F4A7C15)
    codes ^= codes >> np.uint64(29)
    run = min(RUN, len(words))
    usable = len(codes) - run + 1
    keys = np.full(usable, run, dtype=np.uint64)
    for offset in range(run):
        keys = keys * _STEP + codes[offset : offset + usable]
    return np.unique(keys)


def word_runs(texts: Sequence[str]) -> pd.DataFrame:
    """Every distinct run of 8 words in every text, in any of its readings.

    returns : columns `text` (position in `texts`) and `key` (uint64 hash of the run), no duplicates
    """
    found = []
    for text in texts:
        own = [shingles(words) for words in readings(text) if len(words) >= RUN]
        found.append(own[0] if len(own) == 1 else np.unique(np.concatenate([*own, _NONE])))
    keys = np.concatenate([*found, _NONE])
    return pd.DataFrame({"text": np.repeat(np.arange(len(found)), list(map(len, found))),
                         "key": keys})  # fmt: skip


def boilerplate(runs: pd.DataFrame, most: int) -> np.ndarray:
    """Texts to leave out so that no run is in more than `most` texts.

    A run that stands in many texts ("If True, the input is copied, else ...") is boilerplate, and
    would chain unrelated functions into one huge group. In reading order, a text is left out if one
    of its runs has already been met `most` times in the texts before it.

    runs : as `word_runs` gives it; returns : sorted positions of the texts to leave out.
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


def groups(runs: pd.DataFrame, size: int) -> np.ndarray:
    """Group number of each text: connected components of "shares a run".

    No text of one group is a near copy of a text of another.

    runs : as `word_runs` gives it; size : number of texts; returns : int array, shape (size,)
    """
    key, _ = pd.factorize(runs["key"])
    nodes = size + (int(key.max()) + 1 if len(key) else 0)
    graph = coo_matrix((np.ones(len(key), np.int8), (runs["text"], key + size)),
                       shape=(nodes, nodes))  # fmt: skip
    return connected_components(graph, directed=False)[1][:size]


def full_texts(table: pd.DataFrame) -> list[str]:
    """Each record's messages as one text, a line each."""
    return ["\n".join(m["content"] for m in messages) for messages in table["messages"]]


def shared_runs(left: Sequence[str], right: Sequence[str]) -> pd.DataFrame:
    """Pairs (position in `left`, position in `right`) of texts that share a run of words."""
    table = word_runs([*left, *right])
    first = table[table["text"] < len(left)]
    second = table[table["text"] >= len(left)].assign(text=lambda t: t["text"] - len(left))
    pairs = first.merge(second, on="key", suffixes=("_left", "_right"))
    return pairs[["text_left", "text_right"]].drop_duplicates(ignore_index=True)


def count_shared(left: pd.DataFrame, right: pd.DataFrame) -> int:
    """How many records of `left` share a run of 8 words with any record of `right`."""
    return int(shared_runs(full_texts(left), full_texts(right))["text_left"].nunique())


def without_copies_of(table: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The records of `table` that share no run of 8 words with any record of `others`."""
    shared = shared_runs(full_texts(table), full_texts(others))["text_left"]
    return table.drop(index=table.index[shared.unique()]).reset_index(drop=True)


class _Row(NamedTuple):
    """A kept row: its runs of words, those of its answers, what its last question says, by
    sentence, and the fingerprints of what is no text."""

    name: object
    whole: np.ndarray
    answer: np.ndarray
    question: list[frozenset[str]]
    unread: list[str]

    def repeats(self, other: _Row) -> bool:
        """Whether `other` holds this row.

        Under a short answer, or a text that is longer than the answer (a passage, a system text),
        runs of words do not tell questions apart, so that the last question must be alike too.
        """
        if self.unread != other.unread or not _held(self.whole, other.whole):
            return False
        if not _held(self.answer, other.answer):
            return False
        told = len(self.answer) >= SHORT and 2 * len(self.answer) >= len(self.whole)
        return told or all(
            any(len(one & its) >= THRESHOLD * max(len(one), len(its)) for its in other.question)
            for one in self.question
        )


class Kept:
    """The rows kept so far, best first, with an index that finds a near duplicate among them."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._index: dict[int, list[int]] = defaultdict(list)

    def add(self, name: object, messages: Messages) -> object | None:
        """Keep a row and return None; or return the name of the kept row that it repeats."""
        answers = [m for m in messages if m["role"] == "assistant"]
        whole, answer = (
            shingles(fold("\n".join(m["content"] for m in some))) for some in (messages, answers)
        )
        asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        question = [frozenset(words) for one in _SENTENCES.split(asked) if (words := fold(one))]
        unread = [m["unread"] for m in messages if "unread" in m]
        row = _Row(name, whole, answer, question, unread)
        for one in self._candidates(whole):
            if row.repeats(self._rows[one]):
                return self._rows[one].name
        for key in whole.tolist():
            self._index[key].append(len(self._rows))
        self._rows.append(row)
        return None

    def _candidates(self, keys: np.ndarray) -> list[int]:
        """Kept rows that may hold enough of `keys`, in the order in which they were kept.

        A row that holds the share t of n keys misses at most (1 - t) n of them, so it holds one
        of any (1 - t) n + 1: the rarest are asked, since boilerplate stands in very many rows.
        """
        found = [self._index.get(key, ()) for key in keys.tolist()]
        found.sort(key=len)
        needed = floor((1 - THRESHOLD) * len(found) + 1e-9) + 1
        return sorted({row for rows in found[:needed] for row in rows})


def _held(keys: np.ndarray, other: np.ndarray) -> bool:
    """Whether `other` holds the threshold's share of `keys`."""
    if not len(keys):
        return not len(other)
    common = np.isin(keys, other, assume_unique=True).sum()
    return bool(common >= THRESHOLD * len(keys) - 1e-9)
