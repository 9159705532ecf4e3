"""Length or training tokens? The slope of length at equal rows and at equal training tokens.

At a fixed number of rows the mean response length *is* the number of training tokens; sets with as
many tokens each, but not rows, tell the two apart (`equal_tokens`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .held_out import jackknife_sources
from .ols import RankError
from .runs import DESIGNED, EQUAL_TOKENS, RunsError, Standardisation
from .within import LENGTH_LABEL, fit_within


def length_slopes(runs: pd.DataFrame, constants: Standardisation) -> pd.DataFrame:
    """The slope of `len_out` alone, beside source shares: at equal rows and at equal tokens.

    One row a design: sets, tokens (mean that a set was trained on) and tokens_cv (sd over mean),
    estimate, low, high (these sources), new_low, new_high (new sources). Empty where the study has
    no equal-token arm, or too few sets to fit it.
    """
    one = Standardisation(constants.mean[["len_out"]], constants.sd[["len_out"]])
    rows = {}
    for name, arms in (("equal rows", DESIGNED), ("equal tokens", (EQUAL_TOKENS,))):
        try:
            fit = fit_within(runs, ["len_out"], one, arms=arms)
        except (RunsError, RankError):
            return pd.DataFrame()
        trained = fit.runs["tokens_trained"]
        new_low, new_high = _new_sources(runs, one, arms)
        rows[name] = {
            "sets": len(fit.runs), "tokens": trained.mean(),
            "tokens_cv": trained.std() / trained.mean(),
            **fit.table().loc["len_out", ["estimate", "low", "high"]].to_dict(),
            "new_low": new_low, "new_high": new_high,
        }  # fmt: skip
    return pd.DataFrame(rows).T.rename_axis("design")


def length_said(table: pd.DataFrame) -> str:
    """What `length_slopes` licenses, in one sentence."""
    if table.empty:
        return ("This run has no fit at equal tokens, so the coefficient stays "
                f"“{LENGTH_LABEL}”.")
    equal, rows = table.loc["equal tokens"], table.loc["equal rows"]
    slope = f"{equal['estimate']:+.4f} [{equal['low']:+.4f}, {equal['high']:+.4f}]"
    before = f"{rows['estimate']:+.4f} [{rows['low']:+.4f}, {rows['high']:+.4f}]"
    if equal["low"] <= 0 <= equal["high"]:
        said = "length by itself is not seen: what the rule calls length may be training tokens"
    elif equal["estimate"] * rows["estimate"] > 0:
        said = "length matters beyond the number of training tokens"
    else:
        said = "longer rows act the other way once they bring no more tokens"
    return f"At equal tokens the slope of length is {slope}, at equal rows {before}: {said}."


def _new_sources(runs: pd.DataFrame, one: Standardisation, arms: tuple[str, ...]):
    """The jackknife's bounds, NaN where a deletion leaves too little to fit."""
    try:
        found = jackknife_sources(runs, ["len_out"], one, arms=arms).table.loc["len_out"]
    except (RunsError, RankError):
        return np.nan, np.nan
    return found["low"], found["high"]
