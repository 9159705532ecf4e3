"""Compression ratio of the response: repetition that a general compressor finds.

Yin et al. 2024, "Entropy Law" (arXiv 2407.06645) rank data by the ratio raw / compressed, and
Shaib et al. 2024 (arXiv 2403.00553) recommend it as a diversity score of text. Theirs is taken
over sets of texts; ours is of one response, so the compressor's fixed cost of about 11 bytes pulls
short texts below 1. No word borders are assumed: it works in any language.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from instructmining_core.indicators.text import (
    EMPTY,
    Column,
    Conversation,
    each_turn,
    mean_over_turns,
)


def compute_compression(
    conversations: Sequence[Conversation], model=None, *, progress: bool = False
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
