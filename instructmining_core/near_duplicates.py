"""Near duplicates in a ranking: a row that says again what a better row has said.

The study's leak test calls two rows near copies if they share *one* run of 8 words (statistics,
section 8). That is right for keeping an evaluation clean and too hard for a selection, where an
idiom or a quoted sentence would cost a good row. Here a row is a near duplicate of a better row if
that row holds at least 80 % of its runs of 8 words, in the whole conversation and in the answers
alone: another question about the same passage stays.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import floor

import numpy as np

from instructmining_core.messages import Conversation

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

    def add(self, name: object, messages: Conversation) -> object | None:
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
    rows: Iterable[tuple[object, Conversation]], threshold: float = THRESHOLD
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
