"""Script of the response: the share of Latin letters among its letters.

A column to see by that a row is in another language, or garbled. Scripts are those of Unicode
Standard Annex 24, taken from the letters' names; wrong-language rows are a common fault of web data
(Kreutzer et al. 2022, "Quality at a Glance", arXiv 2103.12028).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from instructmining_core.indicators.text import (
    Column,
    Conversation,
    each_turn,
    mean_over_turns,
)

_ASCII_LETTER = re.compile("[A-Za-z]")
_TWO_WORDS = ("OLD", "LINEAR", "MEETEI", "PHAISTOS", "SYLOTI", "TAI", "NEW")


def compute_script(
    conversations: Sequence[Conversation], model=None, *, progress: bool = False
) -> dict[str, Column]:
    """Share of Latin letters, 0 to 1, of each response; mean over the assistant's turns."""
    values = [latin_share(turn.response) for turn in each_turn(conversations)]
    reasons = ["no letter in the response" if value != value else "" for value in values]
    return {"script": mean_over_turns(conversations, values, reasons)}


def latin_share(text: str) -> float:
    """Latin letters per letter; NaN without a letter.

    >>> latin_share("Привет, world")
    0.45454545454545453
    """
    if text.isascii():
        return 1.0 if _ASCII_LETTER.search(text) else float("nan")
    scripts = count_scripts(text)
    return scripts["LATIN"] / scripts.total() if scripts else float("nan")


def dominant(text: str) -> str:
    """The script with the most letters ("LATIN", "CJK", ...), "" without a letter."""
    scripts = count_scripts(text)
    return scripts.most_common(1)[0][0] if scripts else ""


def count_scripts(text: str) -> Counter[str]:
    """Letters of each script; han ideographs are "CJK", kana "HIRAGANA" and "KATAKANA"."""
    scripts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            scripts[_script(letter)] += count
    return scripts


@lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
    parts = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "UNKNOWN").split()
    return " ".join(parts[:2]) if parts[0] in _TWO_WORDS else parts[0]
