"""What is read off the text itself: length, compression, script, number of turns.

Length (InstructMining v3, Table 1: Len_in, Len_out): the paper's tokenizer is unknown; ours is the
base model's, without special tokens. Without a model words and punctuation marks are counted, and
the version says so; there a run of letters is a word, so in scripts without spaces (Chinese,
Japanese, Thai) a whole clause is one word: use a tokenizer.

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
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .turns import EMPTY, CheckedConversation, Column, each_turn, mean_over_turns

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_TWO_WORDS = ("OLD", "LINEAR", "MEETEI", "PHAISTOS", "SYLOTI", "TAI", "NEW")  # a script's name
_CHUNK = 4096  # texts handed to the tokenizer at once


def compute_length(conversations: Sequence[CheckedConversation], model=None) -> dict[str, Column]:
    """Lengths in tokens (or words and marks), mean over the assistant's turns.

    model : a Hugging Face tokenizer or an opened model with `.tokenizer`; None counts words.
    len_in : what was said since the previous response (system and user messages).
    len_out : the response. An empty text has length 0.
    """
    texts, pieces_in = _texts(conversations)
    tokenizer = getattr(model, "tokenizer", model)
    lengths = count_words(texts) if tokenizer is None else count_tokens(texts, tokenizer)
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


def count_tokens(texts: Sequence[str], tokenizer) -> list[int]:
    """Tokens of each text, no special tokens added, and "</s>" in a text counted as text."""
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        ids = tokenizer(
            list(texts[start : start + _CHUNK]), add_special_tokens=False,
            split_special_tokens=True, return_attention_mask=False, verbose=False,
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


def compute_compression(
    conversations: Sequence[CheckedConversation], model=None
) -> dict[str, Column]:
    """UTF-8 bytes per zlib byte (level 6) of each response; mean over the assistant's turns."""
    values = [ratio(turn.response) for turn in each_turn(conversations)]
    reasons = [EMPTY if value != value else "" for value in values]
    return {"compression": mean_over_turns(conversations, values, reasons)}


def ratio(text: str) -> float:
    """Raw bytes per compressed byte; larger is more repetitive; NaN for an empty text.

    text : without lone surrogates (`templates.clean_text`)
    """
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
