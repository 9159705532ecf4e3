"""What stands beside the rule: single indicators, plain baselines, and a second loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .intervals import r2_of
from .ols import residualise
from .runs import DESIGNED, RunsError, Standardisation
from .within import Fit, fit_pooled, fit_within


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def univariate(runs: pd.DataFrame, columns: Sequence[str],
               standardisation: Standardisation | None = None, *, shares: bool = True,
               arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> pd.DataFrame:
    """Each indicator alone, beside the source shares (shares=False: beside a constant).

    Columns of Fit.table, r2 (beyond the controls) with r2_low and r2_high (these sources), p_holm;
    `.attrs["multiplicity"]` is the line to print under the table.
    """
    rows = []
    for column in columns:
        one = standardisation and Standardisation(standardisation.mean[[column]],
                                                  standardisation.sd[[column]])
        fit = (fit_within if shares else fit_pooled)(runs, [column], one, arms=arms,
                                                     outcome=outcome)
        r2, low, high = r2_of(fit)
        rows.append(fit.table().assign(r2=r2, r2_low=low, r2_high=high))
    frame = pd.concat(rows)
    frame["p_holm"] = holm(frame["p"])
    frame.attrs["multiplicity"] = (
        f"{len(frame)} single tests at 5 %: {0.05 * len(frame):.2g} would pass with no effect "
        f"at all; {int((frame['p'] < 0.05).sum())} pass, "
        f"{int((frame['p_holm'] < 0.05).sum())} after Holm's correction")
    return frame


def baseline_comparison(runs: pd.DataFrame, columns: Sequence[str], baselines: Sequence[str],
                        standardisation: Standardisation | None = None, *,
                        arms: Sequence[str] | None = DESIGNED,
                        outcome: str = "log_loss") -> pd.DataFrame:
    """How much of the loss is mere vocabulary and token count.

    baselines : columns of `runs` such as `unigram` (unigram.unigram_losses) and `log_tokens`.
    One row a model (shares, + each baseline, + all baselines, + indicators, + both): terms, r2
    beyond the shares with r2_low and r2_high (these sources), and adjusted r2 on the residual
    degrees of freedom. `baseline_slopes` of it has the slopes.
    """
    both = [*baselines, *columns]
    constants = Standardisation.fit(runs, list(baselines))
    own = standardisation or Standardisation.identity(columns)
    joint = Standardisation(pd.concat([constants.mean, own.mean[list(columns)]]),
                            pd.concat([constants.sd, own.sd[list(columns)]]))
    models = {f"+ {b}": [b] for b in baselines}
    models |= {"+ all baselines": list(baselines), "+ indicators": list(columns),
               "+ baselines and indicators": both}
    fits = {name: fit_within(runs, terms, Standardisation(joint.mean[terms], joint.sd[terms]),
                             arms=arms, outcome=outcome) for name, terms in models.items()}
    any_fit = fits["+ indicators"]
    left = residualise(any_fit.ols.y[:, None], any_fit.controls)[:, 0]
    free = len(left) - any_fit.controls.shape[1]
    rows = []
    for name, fit in fits.items():
        adjusted = 1 - fit.ols.sigma**2 / (left @ left / free)
        r2, low, high = r2_of(fit)
        rows.append({"model": name, "terms": len(fit.columns), "r2": r2, "r2_low": low,
                     "r2_high": high, "r2_adjusted": adjusted})
    frame = pd.DataFrame(rows).set_index("model")
    slopes = {}
    for word, name in (("without", "+ indicators"), ("with", "+ baselines and indicators")):
        table = fits[name].table().loc[list(columns)]
        slopes |= {word: table["estimate"], f"{word}_low": table["low"],
                   f"{word}_high": table["high"]}
    frame.attrs["slopes"] = pd.DataFrame(slopes).to_dict()
    return frame


def baseline_slopes(compared: pd.DataFrame) -> pd.DataFrame:
    """The indicators' slopes without and with the baselines beside them, each with its interval.

    compared : from `baseline_comparison`. By column: without, without_low, without_high, with,
    with_low, with_high (log loss per sd; these sources).
    """
    return pd.DataFrame(compared.attrs.get("slopes", {}))


def sign_flags(first: Fit, second: Fit) -> pd.DataFrame:
    """Coefficients of one rule under two losses, flagged where the sign differs.

    By column: estimate_1, low_1, high_1, estimate_2, low_2, high_2, sign_differs, and
    contradicts (the sign differs and both intervals leave out zero). Bounds as in Fit.table.
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


def transfer_slope(score: pd.Series, runs: pd.DataFrame, *,
                   arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> Fit:
    """Loss of base B on the score of base A's rule, beside source shares: does the rule carry?

    score : mean predicted log loss of each set by rule A, index as `runs`. A slope of 1 carries
    over whole, 0 not at all; `Fit.table()` has its interval.
    """
    return fit_within(runs.assign(score=score), ["score"], arms=arms, outcome=outcome)
