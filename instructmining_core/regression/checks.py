"""What stands beside the rule: single indicators, plain baselines, other losses, equal tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .inference import jackknife_sources, r2_of
from .rule import RuleFit, fit_rule
from .run_table import DESIGNED, EQUAL_TOKENS, RunsError, Standardizer


def univariate(runs: pd.DataFrame, columns: Sequence[str],
               standardizer: Standardizer | None = None) -> pd.DataFrame:
    """Each indicator alone, beside the source shares: RuleFit.table, r2 (beyond the shares) with
    r2_low and r2_high (these sources), p_holm (Holm 1979, over all the indicators).
    """
    from statsmodels.stats.multitest import multipletests

    rows = []
    for column in columns:
        fit = fit_rule(runs, [column], standardizer)
        r2, low, high = r2_of(fit)
        rows.append(fit.table().assign(r2=r2, r2_low=low, r2_high=high))
    frame = pd.concat(rows)
    frame["p_holm"] = multipletests(frame["p"], method="holm")[1]
    return frame


def baseline_comparison(runs: pd.DataFrame, columns: Sequence[str], baselines: Sequence[str],
                        standardizer: Standardizer | None = None) -> pd.DataFrame:
    """How much of the loss is mere vocabulary and token count.

    baselines : columns of `runs`, of any unit, such as a unigram model's losses.
    One row a model (+ each baseline, + all baselines, + indicators, + both): terms, r2 beyond the
    shares with r2_low and r2_high (these sources), r2_adjusted. `baseline_slopes` has the slopes.
    """
    both = [*baselines, *columns]
    plain = Standardizer.fit(runs, list(baselines))
    own = standardizer or Standardizer.identity(columns)
    joint = Standardizer(pd.concat([plain.mean, own.mean]), pd.concat([plain.sd, own.sd]))
    models = {f"+ {b}": [b] for b in baselines}
    models |= {"+ all baselines": list(baselines), "+ indicators": list(columns),
               "+ baselines and indicators": both}
    fits = {name: fit_rule(runs, terms, joint) for name, terms in models.items()}
    rows = {}
    for name, fit in fits.items():
        r2, low, high = r2_of(fit)
        terms = len(fit.columns)
        rows[name] = {"terms": terms, "r2": r2, "r2_low": low, "r2_high": high,
                      "r2_adjusted": 1 - (1 - r2) * (fit.df + terms) / fit.df}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    slopes = {}
    for word, name in (("without", "+ indicators"), ("with", "+ baselines and indicators")):
        table = fits[name].table().loc[list(columns)]
        slopes |= {word: table["estimate"], f"{word}_low": table["low"],
                   f"{word}_high": table["high"]}
    frame.attrs["slopes"] = pd.DataFrame(slopes).to_dict()
    return frame


def baseline_slopes(compared: pd.DataFrame) -> pd.DataFrame:
    """The indicators' slopes without and with the baselines beside them, from
    `baseline_comparison`, by column: without, without_low, without_high, with, with_low, with_high
    (log loss per sd; these sources).
    """
    return pd.DataFrame(compared.attrs.get("slopes", {}))


def sign_flags(first: RuleFit, second: RuleFit) -> pd.DataFrame:
    """Coefficients of one rule under two losses, flagged where the sign differs.

    By column: estimate_1, low_1, high_1, estimate_2, low_2, high_2, sign_differs, and
    contradicts (the sign differs and both intervals leave out zero). Bounds as in RuleFit.table.
    """
    if first.columns != second.columns:
        raise RunsError(f"the two fits have other columns: {first.columns} and {second.columns}")
    parts = [fit.table()[["estimate", "low", "high"]].add_suffix(f"_{i}")
             for i, fit in enumerate((first, second), 1)]
    frame = pd.concat(parts, axis=1)
    frame["sign_differs"] = frame["estimate_1"] * frame["estimate_2"] < 0
    clear = (frame["low_1"] * frame["high_1"] > 0) & (frame["low_2"] * frame["high_2"] > 0)
    frame["contradicts"] = frame["sign_differs"] & clear
    return frame


def transfer_slope(score: pd.Series, runs: pd.DataFrame, outcome: str = "log_loss") -> RuleFit:
    """Loss of base B on the score of base A's rule, beside source shares: 1 carries over whole.

    score : mean predicted log loss of each set by rule A, index as `runs`
    """
    return fit_rule(runs.assign(score=score), ["score"], outcome=outcome)


# the ledger's column of losses, in nats per token -> what it is; the first is the study's loss
VARIANTS = {
    "loss_eval_1": "mean over prompts",
    "loss_eval_1_token": "mean over tokens",
    "loss_eval_1_first64": "first 64 tokens of a response",
    "loss_eval_1_without_eos": "without the end mark",
    "loss_eval_2": "second evaluation set, mean over prompts",
    "loss_eval_2_token": "second evaluation set, mean over tokens",
}


def variant_table(runs: pd.DataFrame, columns: Sequence[str],
                  standardizer: Standardizer | None = None) -> pd.DataFrame:
    """The within-source slopes under every loss that all runs have, each against the study's own.

    runs : as for `fit_rule`, with the ledger's losses (nats per token, > 0)
    returns : one row a variant and indicator: loss, column, estimate, low, high (these sources),
        sign_differs, contradicts (see `sign_flags`)
    """
    names = {c: name for c, name in VARIANTS.items() if c in runs and runs[c].notna().all()}
    logs = runs.assign(**{f"log {c}": np.log(runs[c].astype(float)) for c in names})
    fits = {c: fit_rule(logs, columns, standardizer, outcome=f"log {c}") for c in names}
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
    page = table.assign(text=text).pivot(index="column", columns="loss", values="text")
    return page.loc[table["column"].unique(), table["loss"].unique()]


def effective_n(runs: pd.DataFrame) -> dict[str, float]:
    """Prompts that the token mean of each evaluation set rests on, (Σt)²/Σt² for t tokens."""
    found = runs.filter(like="effective_n_").median().dropna()
    return found.rename(lambda c: c.removeprefix("effective_n_")).to_dict()


def length_slopes(runs: pd.DataFrame, standardizer: Standardizer) -> pd.DataFrame:
    """The slope of `len_out` alone, beside source shares: at equal rows and at equal tokens.

    At equal rows the mean response length *is* the number of training tokens. One row a design:
    sets, tokens (mean of a set) and tokens_cv (sd over mean), estimate, low, high (these sources),
    new_low, new_high (new sources). Empty where the equal-token arm has too few sets to fit it.
    """
    rows = {}
    for name, arms in (("equal rows", DESIGNED), ("equal tokens", (EQUAL_TOKENS,))):
        try:
            fit = fit_rule(runs, ["len_out"], standardizer, arms=arms)
        except RunsError:
            return pd.DataFrame()
        trained = fit.runs["tokens_trained"]
        try:
            found = jackknife_sources(runs, ["len_out"], standardizer, arms=arms).table
        except RunsError:  # a deletion leaves too little to fit
            found = pd.DataFrame({"low": np.nan, "high": np.nan}, ["len_out"])
        rows[name] = {
            "sets": len(fit.runs), "tokens": trained.mean(),
            "tokens_cv": trained.std() / trained.mean(),
            **fit.table().loc["len_out", ["estimate", "low", "high"]].to_dict(),
            "new_low": found.at["len_out", "low"], "new_high": found.at["len_out", "high"],
        }  # fmt: skip
    return pd.DataFrame(rows).T.rename_axis("design")
