"""Input and output length (InstructMining v3, Table 1: Len_in, Len_out).

The paper's tokenizer is unknown: ours is the base model's, without special tokens; without a model
words and punctuation marks are counted by a regular expression, and the version says so. That
expression takes a run of letters as a word, so in scripts without spaces (Chinese, Japanese, Thai)
a whole clause is one word: use a tokenizer there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tqdm.auto import tqdm

from instructmining_core.indicators.text import Column, Conversation, mean_over_turns

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_CHUNK = 4096  # texts handed to the tokenizer at once


def compute_length(
    conversations: Sequence[Conversation], model=None, *, progress: bool = False
) -> dict[str, Column]:
    """Lengths in tokens (or words and marks), mean over the assistant's turns.

    model : a Hugging Face tokenizer or an opened model with `.tokenizer`; None counts words.
    len_in : what was said since the previous response (system and user messages).
    len_out : the response. An empty text has length 0.
    """
    texts, pieces_in = _texts(conversations)
    tokenizer = getattr(model, "tokenizer", model)
    count = count_words if tokenizer is None else lambda t: count_tokens(t, tokenizer, progress)
    lengths = count(texts)
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


def count_tokens(texts: Sequence[str], tokenizer, progress: bool = False) -> list[int]:
    """Tokens of each text, no special tokens added, and "</s>" in a text counted as text."""
    lengths: list[int] = []
    bar = tqdm(total=len(texts), desc="length", unit="text", disable=not progress)
    with bar:
        for start in range(0, len(texts), _CHUNK):
            ids = tokenizer(
                list(texts[start : start + _CHUNK]), add_special_tokens=False,
                split_special_tokens=True, return_attention_mask=False, verbose=False,
            )["input_ids"]  # fmt: skip
            lengths.extend(map(len, ids))
            bar.update(len(ids))
    return lengths


def _texts(conversations: Sequence[Conversation]) -> tuple[list[str], list[int]]:
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
