"""IFD, instruction-following difficulty: how little the instruction helps to predict the response.

Li et al. 2023 (arXiv 2308.12032) divide the mean losses; Superfiltering (Li et al. 2024,
arXiv 2402.00530) the perplexities, ppl(A|Q) / ppl(A), and so do we. Above 1 the instruction makes
the response less likely: the authors drop such rows. As in `perplexity`, eos is left out.

Perplexity of the response given what was said before it (InstructMining v3, Table 1: PPL).

exp of the mean negative log-likelihood of the response's tokens. The paper does not say whether the
end-of-text token counts; ours leaves it out, because it measures the template, not the text, and
weighs most in short responses. The prompt template is `templates.TEMPLATE_VERSION` (the paper's is
unknown). Over-long conversations lose whole messages from the left, then the response's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..data.tokenization import Encoded, encode_many
from ..models.causal_lm import LM, response_nll
from ..models.loading import token_limit
from .turns import EMPTY, CheckedConversation, Column, Turn, each_turn, mean_over_turns


def compute_perplexity(
    conversations: Sequence[CheckedConversation],
    model: LM,
    *,
    progress: bool = False,
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> dict[str, Column]:
    """Perplexity of each response; mean over the assistant's turns.

    model : a causal LM (`lm.load_lm`)
    batch_tokens, padding_side : see `lm.response_nll`, whose own batch size is the fast one; they
        do not change the values.
    An empty response is NaN. What was cut to fit the model stands in the reasons.
    """
    turns = list(each_turn(conversations))
    encoded = encode_turns(turns, model)
    nll = response_nll(
        model, encoded, batch_tokens=batch_tokens, progress=progress, padding_side=padding_side
    )
    mean = mean_without_eos(nll)
    reasons = [
        _reason(turn, row, text)
        for turn, row, text in zip(turns, encoded, nll["reason"], strict=True)
    ]
    return {"ppl": mean_over_turns(conversations, np.exp(mean), reasons)}


def encode_turns(turns: Sequence[Turn], model: LM) -> list[Encoded]:
    """Each response with its context as token ids, the response (and eos) marked as targets."""
    conversations = [
        [*turn.context, {"role": "assistant", "content": turn.response}] for turn in turns
    ]
    ends = [sum(m["role"] == "assistant" for m in turn.context) for turn in turns]
    return encode_many(
        model.tokenizer, conversations, max_tokens=token_limit(model.model, model.tokenizer),
        turns=ends,
    )  # fmt: skip


def mean_without_eos(nll: pd.DataFrame) -> np.ndarray:
    """Mean negative log-likelihood per response token, eos left out, in nats; NaN without one.

    nll : the frame of `lm.response_nll`
    """
    tokens = (nll["tokens"] - nll["tokens_eos"]).to_numpy(dtype=np.float64)
    total = (nll["nll"] - nll["nll_eos"].fillna(0.0)).to_numpy(dtype=np.float64)
    return np.divide(total, tokens, out=np.full(len(nll), np.nan), where=tokens > 0)


def _reason(turn: Turn, row: Encoded, reason: str) -> str:
    if not turn.response:
        return EMPTY
    notes = [reason] if reason else []
    if row.dropped:
        notes.append(f"{row.dropped} earlier messages cut to fit the model")
    if row.truncated:
        notes.append("end of the response cut to fit the model")
    return "; ".join(notes)


def compute_ifd(
    conversations: Sequence[CheckedConversation],
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
