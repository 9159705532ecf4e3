"""IFD, instruction-following difficulty: how little the instruction helps to predict the response.

Li et al. 2023 (arXiv 2308.12032) divide the mean losses; Superfiltering (Li et al. 2024,
arXiv 2402.00530) the perplexities, ppl(A|Q) / ppl(A), and so do we. Above 1 the instruction makes
the response less likely: the authors drop such rows. As in `perplexity`, eos is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from instructmining_core.indicators.perplexity import encode_turns, mean_without_eos
from instructmining_core.indicators.text import (
    EMPTY,
    Column,
    Conversation,
    each_turn,
    mean_over_turns,
)
from instructmining_core.lm import LM, response_nll
from instructmining_core.templates import Encoded


def compute_ifd(
    conversations: Sequence[Conversation],
    model: LM,
    *,
    progress: bool = False,
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> dict[str, Column]:
    """ppl(response | what came before) / ppl(response alone); mean over the assistant's turns.

    Both perplexities are over the same tokens; alone, the response follows only the model's start
    token (bos, or eos where it has none).
    """
    turns = list(each_turn(conversations))
    given = encode_turns(turns, model)
    start = model.tokenizer.bos_token_id
    alone = [_alone(row, model.tokenizer.eos_token_id if start is None else start) for row in given]
    options = {"batch_tokens": batch_tokens, "padding_side": padding_side, "progress": progress}
    frames = [response_nll(model, rows, **options) for rows in (given, alone)]
    values = np.exp(mean_without_eos(frames[0]) - mean_without_eos(frames[1]))
    reasons = [
        EMPTY if not turn.response else first or second
        for turn, first, second in zip(turns, frames[0]["reason"], frames[1]["reason"], strict=True)
    ]
    return {"ifd": mean_over_turns(conversations, values, reasons)}


def _alone(row: Encoded, start: int) -> Encoded:
    """The target tokens of a row after a start token and nothing else."""
    kept = tuple(token for token, target in zip(row.ids, row.targets, strict=True) if target)
    return replace(row, ids=(start, *kept), targets=(False, *(True for _ in kept)))
