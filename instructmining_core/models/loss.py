"""The study's loss of a model on an evaluation set, in its declared variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..data.tokenization import Encoded
from .causal_lm import LM, response_nll


def losses(frame: pd.DataFrame) -> dict[str, float]:
    """Means of a frame of `causal_lm.response_nll`, in nats per token.

    body_prompt_mean, body_token_mean : over the body of the responses, which is all but each
        response's first token and the token that ends it: mean over rows of each row's mean, and
        total over total, where long responses weigh more. The study's two losses.
    first_token, end_of_text : mean over rows of what the body leaves out.
    prompt_mean, token_mean : both means over all target tokens.
    first64 : mean over rows, each on its first 64 target tokens.
    without_eos : mean over rows, the token that ends a response left out.
    effective_n : rows that the token mean rests on, (sum t)^2 / sum t^2 for t tokens a row.
    rows, missing : rows in the means, and rows without any target token, which are left out.

    A row whose loss is not finite or did not fit into memory makes every mean NaN: a mean over
    the other rows would be another quantity.
    """
    empty = frame["reason"].str.startswith("no response token").to_numpy()
    kept = frame[~empty]
    tokens, nll = _columns(kept, "")
    first64_tokens, first64 = _columns(kept, "_first64")
    eos_tokens, eos = _columns(kept, "_eos")
    first_tokens, first = _columns(kept, "_first")
    failed = np.isnan(nll)
    text, text_tokens = nll - eos, tokens - eos_tokens
    body, body_tokens = text - first, text_tokens - first_tokens
    return {
        "prompt_mean": _mean(nll, tokens),
        "token_mean": _ratio(nll.sum(), tokens.sum()),
        "body_prompt_mean": _mean(body, body_tokens, (body_tokens > 0) | failed),
        "body_token_mean": _ratio(body.sum(), body_tokens.sum()),
        "first_token": _mean(first, first_tokens, (first_tokens > 0) | failed),
        "end_of_text": _mean(eos, eos_tokens, (eos_tokens > 0) | failed),
        "first64": _mean(first64, first64_tokens),
        "without_eos": _mean(text, text_tokens, (text_tokens > 0) | failed),
        "effective_n": _ratio(tokens.sum() ** 2, (tokens**2).sum()),
        "rows": len(kept),
        "missing": int(empty.sum()),
    }


def evaluate(
    lm: LM, encoded: Sequence[Encoded], *, batch_tokens: int | None = None
) -> tuple[dict[str, float], pd.DataFrame]:
    """Losses of `lm` on an evaluation set (see `losses`), and the frame for each example."""
    frame = response_nll(lm, encoded, batch_tokens=batch_tokens)
    return losses(frame), frame


def _columns(frame: pd.DataFrame, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and nll of a part of the responses; 0 where a row lacks it, NaN where a row failed."""
    tokens, nll = (frame[f"{name}{part}"].to_numpy(float) for name in ("tokens", "nll"))
    return tokens, np.where(frame["nll"].isna(), np.nan, np.where(tokens > 0, nll, 0.0))


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else float("nan")


def _mean(nll: np.ndarray, tokens: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
    """Mean over the chosen rows of each row's mean."""
    if not len(nll[rows]):
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean(nll[rows] / tokens[rows]))
