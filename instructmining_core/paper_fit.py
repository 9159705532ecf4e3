"""The paper's own fit: the best four indicators by R², then by p-values, without source shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from .runs import Standardisation, pick_arms, standardised
from .subset_search import NEAR_BEST, SubsetSearch
from .within import Fit, fit_pooled

NOT_VALID = "the paper's procedure, not valid after selection"


@dataclass(frozen=True)
class PaperFit:
    """What the paper's procedure gives on these runs.

    fit : Fit of the chosen columns, kind "pooled"; candidates : DataFrame, one row a subset in
    reach of the best R²: columns (str), r2, largest_p, chosen
    """

    fit: Fit
    candidates: pd.DataFrame

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """The chosen terms as in Fit.table, p-values and bounds labelled as not valid."""
        frame = self.fit.table(level)
        classical = np.sqrt(np.diag(self.fit.ols.cov_classical()))[1:]
        frame["p_paper"] = _p_values(frame["estimate"].to_numpy() / classical, self.fit.ols.df)
        frame["interval"] = NOT_VALID
        return frame


def _p_values(tvalues: np.ndarray, df: int) -> np.ndarray:
    return 2 * student.sf(np.abs(tvalues), df)


def fit_paper(runs: pd.DataFrame, columns: Sequence[str],
              standardisation: Standardisation | None = None, *, size: int = 4,
              near: float = NEAR_BEST, arms: Sequence[str] | None = None,
              outcome: str = "log_loss") -> PaperFit:
    """"First highest R², then the most significant p values" (paper v3, section on the rule).

    Our reading, since the paper gives no figures: all subsets of up to `size` terms (v3 has four)
    with a constant; of those within `near` of the best R², the one whose largest p is smallest.
    arms=None takes every run at equal rows, ("fusion",) the paper's own design.
    """
    picked = pick_arms(runs, arms)
    X = standardised(picked, columns, standardisation)
    y = picked[outcome].to_numpy(float)[:, None]
    search = SubsetSearch(X, np.ones((len(X), 1)), size, smaller=True)
    chosen = int(search.choose(y, near).subset[0])
    r2 = search.r2(y)[0]
    rows = []
    for g in np.flatnonzero(r2 >= r2.max() - near):
        one = SubsetSearch(X[:, search.members(g)], np.ones((len(X), 1)), search.size)
        rows.append({"columns": ", ".join(columns[i] for i in search.members(g)), "r2": r2[g],
                     "largest_p": float(one.choose(y).p.max()), "chosen": bool(g == chosen)})
    names = [columns[i] for i in search.members(chosen)]
    part = standardisation and Standardisation(standardisation.mean[names],
                                               standardisation.sd[names])
    candidates = pd.DataFrame(rows).sort_values("r2", ascending=False, ignore_index=True)
    return PaperFit(fit_pooled(picked, names, part, outcome=outcome), candidates)
