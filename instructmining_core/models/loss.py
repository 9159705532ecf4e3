"""The study's loss of a model on an evaluation set, in its declared variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..data.tokenization import Encoded
from .causal_lm import LM, response_nll


def losses(frame: pd.DataFrame, response_bytes: Sequence[int] | None = None) -> dict[str, float]:
    """Means of a frame of `lm.response_nll`, in nats per target token.

    prompt_mean : mean over rows of each row's mean; the study's primary loss.
    token_mean : total over total; long responses weigh more.
    first64 : mean over rows, each on its first 64 target tokens.
    without_eos : mean over rows, the closing eos left out.
    effective_n : rows that the token mean rests on, (sum t)^2 / sum t^2 for t tokens a row.
    rows, missing : rows in the means, and rows without any target token, which are left out.
    nats_per_byte : total over bytes, with `response_bytes` only; compares across tokenizers.

    A row whose loss is not finite or did not fit into memory makes every mean NaN: a mean over
    the other rows would be another quantity.
    """
    empty = frame["reason"].str.startswith("no response token").to_numpy()
    kept = frame[~empty]
    tokens = kept["tokens"].to_numpy(float)
    nll = kept["nll"].to_numpy(float)
    first = kept["nll_first64"].to_numpy(float)
    first_tokens = kept["tokens_first64"].to_numpy(float)
    eos_tokens = kept["tokens_eos"].to_numpy(float)
    eos = np.where(eos_tokens > 0, kept["nll_eos"].to_numpy(float), 0.0)
    text_tokens = tokens - eos_tokens
    with_text = (text_tokens > 0) | np.isnan(nll)
    found = {
        "prompt_mean": _mean(nll, tokens),
        "token_mean": _ratio(nll.sum(), tokens.sum()),
        "first64": _mean(first, first_tokens),
        "without_eos": _mean((nll - eos)[with_text], text_tokens[with_text]),
        "effective_n": _ratio(tokens.sum() ** 2, (tokens**2).sum()),
        "rows": len(kept),
        "missing": int(empty.sum()),
    }
    if response_bytes is not None:
        found["nats_per_byte"] = _ratio(nll.sum(), float(np.asarray(response_bytes)[~empty].sum()))
    return found


def evaluate(
    lm: LM,
    encoded: Sequence[Encoded],
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Losses of `lm` on an evaluation set (see `losses`), and the frame for each example."""
    frame = response_nll(lm, encoded, batch_tokens=batch_tokens, progress=progress)
    return losses(frame), frame


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else float("nan")


def _mean(nll: np.ndarray, tokens: np.ndarray) -> float:
    if not len(nll):
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean(nll / tokens))
