"""What is read off the text itself: length, MTLD, compression, script, number of turns.

Length (InstructMining v3, Table 1: Len_in, Len_out): the paper's tokenizer is unknown; ours is the
base model's, without special tokens. Without a model words and punctuation marks are counted, and
the version says so; there a run of letters is a word, so in scripts without spaces (Chinese,
Japanese, Thai) a whole clause is one word: use a tokenizer.

MTLD, the measure of textual lexical diversity (McCarthy & Jarvis 2010): the mean number of running
words over which the type-token ratio stays above 0.72, read forwards and backwards. It needs words
set apart by spaces: in Chinese, Japanese or Thai the value says little. Our own code; the values
equal those of the package `lexicalrichness` (with its default preprocessing) wherever it gives one.

Compression: Yin et al. 2024, "Entropy Law" (arXiv 2407.06645) rank data by raw / compressed bytes,
and Shaib et al. 2024 (arXiv 2403.00553) recommend it as a diversity score. Theirs is taken over
sets of texts; ours is of one response, so the compressor's fixed cost of about 11 bytes pulls short
texts below 1. No word borders are assumed: it works in any language.

Script: the share of Latin letters, a column to see by that a row is in another language or garbled,
a common fault of web data (Kreutzer et al. 2022, arXiv 2103.12028). Scripts are those of Unicode
Standard Annex 24, taken from the letters' names.

Turns: LIMA (Zhou et al. 2023, arXiv 2305.11206, section 4) finds that 30 dialogues among 1,000 rows
change the model's dialogues; the InstructMining paper leaves dialogue to future work.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

import numpy as np

from .turns import EMPTY, CheckedConversation, Column, each_turn, mean_over_turns

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_TWO_WORDS = ("OLD", "LINEAR", "MEETEI", "PHAISTOS", "SYLOTI", "TAI", "NEW")  # a script's name
_CHUNK = 4096  # texts handed to the tokenizer at once

THRESHOLD = 0.72  # of MTLD
_DELETED = dict.fromkeys(map(ord, string.digits + "-\N{EN DASH}\N{EM DASH}"))
_TABLE = {**dict.fromkeys(map(ord, string.punctuation), " "), **_DELETED}


def compute_length(conversations: Sequence[CheckedConversation], model=None) -> dict[str, Column]:
    """Lengths in tokens (or words and marks), mean over the assistant's turns.

    model : a Hugging Face tokenizer or an opened model with `.tokenizer`; None counts words.
    len_in : what was said since the previous response (system and user messages).
    len_out : the response. An empty text has length 0.
    """
    texts, pieces_in = _texts(conversations)
    tokenizer = getattr(model, "tokenizer", model)
    lengths = count_words(texts) if tokenizer is None else count_tokens(
        texts, tokenizer, add_special_tokens=False, split_special_tokens=True
    )
    len_in, len_out, position = [], [], 0
    for pieces in pieces_in:
        len_in.append(sum(lengths[position : position + pieces]))
        len_out.append(lengths[position + pieces])
        position += pieces + 1
    return {
        "len_in": mean_over_turns(conversations, len_in),
        "len_out": mean_over_turns(conversations, len_out),
    }


def count_words(texts: Sequence[str]) -> list[int]:
    """Words and punctuation marks of each text.

    >>> count_words(["Don't panic!", ""])
    [5, 0]
    """
    find = _WORD_OR_MARK.findall
    return [len(find(text)) for text in texts]


def count_tokens(texts: Sequence[str], tokenizer, **options) -> list[int]:
    """Tokens of each text, all of them; options : of the tokenizer's call"""
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        ids = tokenizer(
            list(texts[start : start + _CHUNK]), truncation=False, return_attention_mask=False,
            verbose=False, **options,
        )["input_ids"]  # fmt: skip
        lengths.extend(map(len, ids))
    return lengths


def _texts(conversations: Sequence[CheckedConversation]) -> tuple[list[str], list[int]]:
    """Every text to count, and for each turn how many of them are its input."""
    texts: list[str] = []
    pieces_in: list[int] = []
    for conversation in conversations:
        start = 0
        for end in conversation.ends:
            texts += [m["content"] for m in conversation.messages[start : end + 1]]
            pieces_in.append(end - start)
            start = end + 1
    return texts, pieces_in


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


def compute_compression(
    conversations: Sequence[CheckedConversation], model=None
) -> dict[str, Column]:
    """UTF-8 bytes per zlib byte (level 6) of each response; mean over the assistant's turns."""
    values = [ratio(turn.response) for turn in each_turn(conversations)]
    reasons = [EMPTY if value != value else "" for value in values]
    return {"compression": mean_over_turns(conversations, values, reasons)}


def ratio(text: str) -> float:
    """Raw bytes per compressed byte; NaN for an empty text. text : without lone surrogates"""
    raw = text.encode("utf-8")
    return len(raw) / len(zlib.compress(raw, 6)) if raw else float("nan")


def compute_script(conversations: Sequence[CheckedConversation], model=None) -> dict[str, Column]:
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


def compute_turns(conversations: Sequence[CheckedConversation], model=None) -> dict[str, Column]:
    """Assistant turns of each row; a row without one is NaN, with its reason."""
    counts = np.array([len(c.ends) or np.nan for c in conversations], dtype=np.float64)
    return {"turns": Column(counts, [c.problem for c in conversations])}
