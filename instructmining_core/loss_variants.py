"""One rule under every variant of the loss that the ledger holds: which signs depend on it?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .runs import Standardisation
from .screens import sign_flags
from .within import fit_within

# the ledger's column of losses, in nats per token -> what it is; the first is the study's loss
VARIANTS = {
    "loss_eval_1": "mean over prompts",
    "loss_eval_1_token": "mean over tokens",
    "loss_eval_1_first64": "first 64 tokens of a response",
    "loss_eval_1_without_eos": "without the end mark",
    "loss_eval_2": "second evaluation set, mean over prompts",
    "loss_eval_2_token": "second evaluation set, mean over tokens",
}


def held(runs: pd.DataFrame) -> dict[str, str]:
    """The variants of which every run has a value, column -> what it is."""
    return {c: name for c, name in VARIANTS.items() if c in runs and runs[c].notna().all()}


def variant_table(runs: pd.DataFrame, columns: Sequence[str],
                  standardisation: Standardisation | None = None) -> pd.DataFrame:
    """The within-source slopes under every loss at hand, each against the study's own.

    runs : as for `fit_within`, with the ledger's losses (nats per token, > 0)
    returns : one row a variant and indicator: loss, column, estimate, low, high (these sources),
        sign_differs, contradicts (see `sign_flags`; both False for the study's own loss)
    """
    names = held(runs)
    logs = runs.assign(**{f"log {c}": np.log(runs[c].astype(float)) for c in names})
    fits = {c: fit_within(logs, columns, standardisation, outcome=f"log {c}") for c in names}
    own = next(iter(fits.values()))
    parts = []
    for column, fit in fits.items():
        flags = sign_flags(own, fit)
        part = flags[["estimate_2", "low_2", "high_2", "sign_differs", "contradicts"]]
        part = part.rename(columns=lambda c: c.removesuffix("_2"))
        parts.append(part.assign(loss=names[column]).reset_index())
    table = pd.concat(parts, ignore_index=True)
    return table[["loss", "column", "estimate", "low", "high", "sign_differs", "contradicts"]]


def variant_page(table: pd.DataFrame) -> pd.DataFrame:
    """`variant_table` to read: a row an indicator, a column a loss; "!" where the sign differs
    from the study's loss, "!!" where both intervals also leave out zero.
    """
    marks = np.select([table["contradicts"], table["sign_differs"]], [" !!", " !"], "")
    text = [f"{r.estimate:+.4f} [{r.low:+.4f}, {r.high:+.4f}]{mark}"
            for r, mark in zip(table.itertuples(), marks, strict=True)]
    losses, columns = list(dict.fromkeys(table["loss"])), list(dict.fromkeys(table["column"]))
    page = table.assign(text=text).pivot(index="column", columns="loss", values="text")
    return page.loc[columns, losses]


def variants_said(table: pd.DataFrame) -> str:
    """One sentence: which indicators change their sign with the loss, and which beyond doubt."""
    turned = list(dict.fromkeys(table.loc[table["sign_differs"], "column"]))
    firm = list(dict.fromkeys(table.loc[table["contradicts"], "column"]))
    losses = table["loss"].nunique()
    if not turned:
        return f"No slope changes its sign over the {losses} losses."
    beyond = f"beyond both intervals: {', '.join(firm)}" if firm else "none beyond its intervals"
    return (f"Over the {losses} losses the sign changes for {', '.join(turned)}; {beyond}.")


def effective_n(runs: pd.DataFrame) -> dict[str, float]:
    """Prompts that the token mean of each evaluation set rests on, (Σt)²/Σt² for t tokens."""
    columns = [c for c in runs if str(c).startswith("effective_n_")]
    return {c.removeprefix("effective_n_"): float(runs[c].dropna().median())
            for c in columns if runs[c].notna().any()}
