"""Perplexity of the response given what came before it, and IFD, its ratio to that alone.

Perplexity (InstructMining v3, Table 1: PPL) is exp of the mean negative log-likelihood of the
response's tokens. The paper does not say whether the end-of-text token counts; ours leaves it out,
because it measures the template, not the text, and weighs most in short responses. The prompt
template is that of the model (`LM.template`; the paper's is unknown).

IFD, instruction-following difficulty: Li et al. 2023 (arXiv 2308.12032) divide the mean losses;
Superfiltering (Li et al. 2024, arXiv 2402.00530) the perplexities, ppl(A|Q) / ppl(A), and so do we.
Above 1 the instruction makes the response less likely: the authors drop such rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..data.tokenization import Encoded, encode_many
from ..models.causal_lm import LM, response_nll
from ..models.loading import token_limit
from ..models.pooled import OpenHead, start_token
from .turns import EMPTY, CheckedConversation, Column, Turn, cut_note, each_turn, mean_over_turns


def compute_perplexity(
    conversations: Sequence[CheckedConversation],
    model: LM,
    *,
    columns: Collection[str] = ("ppl", "log_ppl"),
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> dict[str, Column]:
    """Perplexity of each response, its IFD, or both; means over the assistant's turns.

    model : a causal LM (`causal_lm.load_lm`)
    columns : of "ppl" with "log_ppl" (its logarithm turn by turn, which a rule takes: a few rows of
        broken text have perplexities a thousand times those of others), and "ifd"; both together
        read the response after its context only once
        (a model that heads read too, `LM.pooled`, has both from the heads' own pass)
    batch_tokens, padding_side : see `causal_lm.response_nll`, whose own batch size is the fast
        one; they do not change the values
    An empty response is NaN. Over-long conversations lose whole messages from the left, then the
    response's end, and the reasons say so. Alone, the response's same tokens follow only
    the model's start token (bos, or eos where it has none).
    """
    turns = list(each_turn(conversations))
    rows = encode_turns(turns, model)
    options = {"batch_tokens": batch_tokens, "padding_side": padding_side}
    if model.pooled is not None:
        given, alone, failed = model.pooled.mean_nll(rows)
    else:
        given, failed = _mean_nll(model, rows, **options)
        alone = None
    found = {}
    if "ppl" in columns:
        notes = list(map(_reason, turns, rows, failed))
        found["ppl"] = mean_over_turns(conversations, np.exp(given), notes)
        found["log_ppl"] = mean_over_turns(conversations, given, notes)
    if "ifd" in columns:
        if alone is None:
            start = start_token(model.tokenizer)
            alone, second = _mean_nll(model, [_alone(row, start) for row in rows], **options)
            failed = [one or other for one, other in zip(failed, second, strict=True)]
        reasons = list(map(_reason, turns, rows, failed))
        found["ifd"] = mean_over_turns(conversations, np.exp(given - alone), reasons)
    return found


def compute_by_head(
    conversations: Sequence[CheckedConversation], model: OpenHead
) -> dict[str, Column]:
    """A head's columns for each response given what was said before it; means over the turns.

    Empty responses and over-long conversations are as in `compute_perplexity`.
    """
    turns = list(each_turn(conversations))
    rows = encode_turns(turns, model.lm)
    scores, failed = model.scores(rows)
    reasons = list(map(_reason, turns, rows, failed))
    return {
        column: mean_over_turns(conversations, values, reasons)
        for column, values in zip(model.file.columns, np.transpose(scores), strict=True)
    }


def encode_turns(turns: Sequence[Turn], model: LM) -> list[Encoded]:
    """Each response with its context as token ids, the response (and eos) marked as targets."""
    conversations = [
        [*turn.context, {"role": "assistant", "content": turn.response}] for turn in turns
    ]
    ends = [sum(m["role"] == "assistant" for m in turn.context) for turn in turns]
    return encode_many(
        model.tokenizer, conversations, max_tokens=token_limit(model.model, model.tokenizer),
        turns=ends, template=model.template,
    )  # fmt: skip


def _mean_nll(model: LM, rows: Sequence[Encoded], **options) -> tuple[np.ndarray, list[str]]:
    """Mean negative log-likelihood per target token, eos left out, in nats; NaN with a reason."""
    nll = response_nll(model, rows, **options)
    return mean_without_eos(nll), nll["reason"].tolist()


def mean_without_eos(nll: pd.DataFrame) -> np.ndarray:
    """Mean negative log-likelihood per response token, eos left out, in nats; NaN without one.

    nll : the frame of `causal_lm.response_nll`
    """
    tokens = (nll["tokens"] - nll["tokens_eos"]).to_numpy(dtype=np.float64)
    total = (nll["nll"] - nll["nll_eos"].fillna(0.0)).to_numpy(dtype=np.float64)
    return np.divide(total, tokens, out=np.full(len(nll), np.nan), where=tokens > 0)


def _reason(turn: Turn, row: Encoded, reason: str) -> str:
    if not turn.response:
        return EMPTY
    return "; ".join(filter(None, [reason, cut_note(row.dropped, row.truncated, "response")]))


def _alone(row: Encoded, start: int) -> Encoded:
    """The target tokens of a row after a start token and nothing else."""
    kept = tuple(token for token, target in zip(row.ids, row.targets, strict=True) if target)
    return replace(row, ids=(start, *kept), targets=(False, *(True for _ in kept)))
