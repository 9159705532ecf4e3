"""MTLD, the measure of textual lexical diversity (McCarthy & Jarvis 2010, threshold 0.72).

The mean number of running words over which the type-token ratio stays above the threshold, read
forwards and backwards. It assumes that words are set apart by spaces: in Chinese, Japanese or Thai
the value says little. Our own code; the values equal those of the package `lexicalrichness` (with
its default preprocessing) wherever that one gives a value.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from operator import itemgetter

from .turns import CheckedConversation, Column, each_turn, mean_over_turns

THRESHOLD = 0.72
_DELETED = dict.fromkeys(map(ord, string.digits + "-\N{EN DASH}\N{EM DASH}"))
_TABLE = {**dict.fromkeys(map(ord, string.punctuation), " "), **_DELETED}


def compute_mtld(conversations: Sequence[CheckedConversation], model=None) -> dict[str, Column]:
    """MTLD of each response, in words; mean over the assistant's turns."""
    values = [mtld(mtld_words(turn.response)) for turn in each_turn(conversations)]
    reasons = ["no word in the response" if value != value else "" for value in values]
    return {"mtld": mean_over_turns(conversations, values, reasons)}


def mtld_words(text: str) -> list[str]:
    """Lower-case words: digits and dashes are deleted, other ASCII punctuation parts words.

    >>> mtld_words("A well-known 3rd fact: it's so.")
    ['a', 'wellknown', 'rd', 'fact', 'it', 's', 'so']
    """
    return text.lower().translate(_TABLE).split()


def mtld(tokens: Sequence[str]) -> float:
    """MTLD of a list of words.

    tokens : words in reading order
    returns : words per factor, mean of both directions. A factor ends where types / tokens <=
        THRESHOLD; the rest at the end counts as the part of a factor that it has come, `(1 -
        ratio) / (1 - THRESHOLD)`. Where no word comes twice there is no factor at all: the value
        is the number of words, a lower bound. NaN with no word.
    """
    if not tokens:
        return float("nan")
    repeats = _repeats(tokens)
    if not repeats:
        return float(len(tokens))
    last = len(tokens) - 1
    backwards = [(last - late, last - early) for early, late in repeats]
    backwards.sort(key=itemgetter(1))
    size = len(tokens)
    return (size / _factors(repeats, size) + size / _factors(backwards, size)) / 2


def _repeats(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(earlier, later) positions of neighbouring uses of one word, by the later one."""
    seen: dict[str, int] = {}
    pairs = []
    for position, token in enumerate(tokens):
        if token in seen:
            pairs.append((seen[token], position))
        seen[token] = position
    return pairs


def _factors(repeats: Sequence[tuple[int, int]], size: int) -> float:
    """Factors in one direction.

    Only repeats are visited: a new word raises the ratio, so a factor always ends at a repeat.
    """
    factors, start, doubles = 0.0, 0, 0
    for early, late in repeats:
        if early < start:
            continue
        doubles += 1
        count = late - start + 1
        if (count - doubles) / count <= THRESHOLD:
            factors, start, doubles = factors + 1, late + 1, 0
    rest = size - start
    if rest:
        factors += (1 - (rest - doubles) / rest) / (1 - THRESHOLD)
    return factors
