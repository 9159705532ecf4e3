"""Slopes between sources against slopes within: the Mundlak split and its test.

The main estimator: within-source slopes of the log loss on set means, beside source shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import f as fisher
from scipy.stats import t as student

from .ols import OLS, ols, residualise, vif
from .run_table import DESIGNED, RunsError, Standardizer, pick_arms, share_matrix, standardised

THESE_SOURCES = "these sources: HC3, t(n-k)"
NEW_SOURCES = "new sources: delete-one-source jackknife, t(S-1)"
LENGTH_LABEL = "length or training tokens"


@dataclass(frozen=True)
class RuleFit:
    """A fitted rule. Slopes are changes of log loss per sd of the indicator over the pool's rows.

    kind : "within", "between" or "pooled"
    columns : indicators in the rule, in order; the last len(columns) coefficients of `ols`
    sources : names of the share columns, () where the fit has a constant instead
    runs : the table the fit saw, one row a set
    """

    kind: str
    columns: tuple[str, ...]
    sources: tuple[str, ...]
    ols: OLS
    standardisation: Standardizer
    runs: pd.DataFrame

    @property
    def slopes(self) -> pd.Series:
        """Standardised slopes, indexed by column."""
        return pd.Series(self.ols.beta[-len(self.columns):], list(self.columns), name="estimate")

    @property
    def intercept(self) -> float:
        """Log loss at the pool's mean row: the constant, or the sources' constants averaged."""
        return float(np.mean(self.ols.beta[: -len(self.columns)]))

    @property
    def controls(self) -> np.ndarray:
        """The share columns or the constant, (n, S) or (n, 1)."""
        return self.ols.X[:, : -len(self.columns)]

    @property
    def indicators(self) -> np.ndarray:
        """The standardised set means, (n, p)."""
        return self.ols.X[:, -len(self.columns):]

    @property
    def covariance(self) -> pd.DataFrame:
        """HC3 covariance of the slopes, (p, p)."""
        p = len(self.columns)
        return pd.DataFrame(self.ols.cov_hc3()[-p:, -p:], list(self.columns), list(self.columns))

    @property
    def r2(self) -> float:
        """Share of the variance of log loss that the whole fit explains."""
        return self.ols.r2

    @property
    def r2_beyond_controls(self) -> float:
        """Share of what the controls leave over that the indicators explain."""
        left = residualise(self.ols.y[:, None], self.controls)[:, 0]
        return float(1 - self.ols.residuals @ self.ols.residuals / (left @ left))

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row an indicator: estimate, raw, se, t, p, low, high, vif, interval, label.

        estimate, se, low, high : log loss per sd; raw : log loss per unit of the indicator;
        interval : what the bounds speak of; label : what the coefficient may be called.
        """
        return coefficient_table(self, level)


def coefficient_table(fit: RuleFit, level: float) -> pd.DataFrame:
    """See RuleFit.table."""
    frame = interval_table(fit.slopes, np.sqrt(np.diag(fit.covariance)), fit.ols.df, level)
    frame.insert(1, "raw", fit.slopes / fit.standardisation.sd[list(fit.columns)])
    frame["vif"] = vif(fit.indicators, fit.controls)
    frame["interval"] = THESE_SOURCES
    tokens_fixed = "arm" in fit.runs and set(fit.runs["arm"]) == {"tokens"}
    frame["label"] = [LENGTH_LABEL if c == "len_out" and not tokens_fixed else c
                      for c in fit.columns]
    return frame


def interval_table(estimate: pd.Series, se: np.ndarray, df: int, level: float) -> pd.DataFrame:
    """estimate, se, t, p, low, high by column, from Student's t on df degrees of freedom."""
    frame = pd.DataFrame({"estimate": estimate})
    frame["se"] = se
    frame["t"] = frame["estimate"] / frame["se"]
    frame["p"] = 2 * student.sf(frame["t"].abs(), df)
    half = student.ppf(0.5 + level / 2, df) * frame["se"]
    frame["low"], frame["high"] = frame["estimate"] - half, frame["estimate"] + half
    frame.index.name = "column"
    return frame


def fit_rule(runs: pd.DataFrame, columns: Sequence[str],
               standardisation: Standardizer | None = None, *,
               arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> RuleFit:
    """log L = Σ_s α_s w_s + Σ_j β_j X̄_j + ε over one run a set; statistics.md section 3.

    runs : `log_loss`, `share_<source>` and the columns, from `runs.assemble`; arms : which runs
    enter (default: the designed ones; fusion runs hold every source, so that they could be in no
    delete-one-source fit; None takes all at equal rows). Without `standardisation` the columns are
    taken as standardised. Errors: RunsError, RankError (set means that can't be told apart).
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    X = standardised(runs, columns, standardisation)
    names = [f"share_{s}" for s in sources] + list(columns)
    fitted = ols(np.hstack([shares, X]), runs[outcome].to_numpy(float), names)
    return RuleFit("within", tuple(columns), sources, fitted,
               standardisation or Standardizer.identity(columns), runs)


def fit_pooled(runs: pd.DataFrame, columns: Sequence[str],
               standardisation: Standardizer | None = None, *,
               arms: Sequence[str] | None = None, outcome: str = "log_loss") -> RuleFit:
    """log L = β0 + Σ_j β_j X̄_j + ε, no source shares: the regression of the paper's rule.

    What it finds mixes slopes between sources with slopes within; arms as in `fit_rule`.
    """
    runs = pick_arms(runs, arms)
    if not len(columns):
        raise RunsError("no columns to fit")
    X = standardised(runs, columns, standardisation)
    fitted = ols(np.hstack([np.ones((len(X), 1)), X]), runs[outcome].to_numpy(float),
                 ["constant", *columns])
    return RuleFit("pooled", tuple(columns), (), fitted,
               standardisation or Standardizer.identity(columns), runs)


@dataclass(frozen=True)
class Mundlak:
    """log L = β0 + W β_W + B β_B, B = Σ_s w_s μ_s, W = X̄ − B (Mundlak 1978).

    table : by column: within, within_low, within_high, between, between_low, between_high,
        difference, se, t, p, low, high (of the difference); all bounds HC3, these sources
    f, df1, df2, p : Wald test of β_B = β_W for all columns together, HC3, these sources
    """

    table: pd.DataFrame
    f: float
    df1: int
    df2: int
    p: float
    between: RuleFit


def mundlak(runs: pd.DataFrame, columns: Sequence[str], source_means: pd.DataFrame,
            standardisation: Standardizer | None = None, *,
            arms: Sequence[str] | None = None, level: float = 0.95,
            outcome: str = "log_loss") -> Mundlak:
    """Split the set means in what their sources' means give and what the tilt gives.

    source_means : index source, the pool's means of each column, raw units (standardised units
    where `standardisation` is None). Needs more sources than columns + 1, since B has only S − 1
    dimensions: otherwise a RunsError that says to name fewer columns or add sources.
    """
    runs = pick_arms(runs, arms)
    shares, sources = share_matrix(runs)
    if len(sources) <= len(columns) + 1:
        raise RunsError(f"{len(sources)} sources span {len(sources) - 1} dimensions, too few for "
                        f"{len(columns)} slopes between sources: name at most "
                        f"{max(len(sources) - 2, 0)} columns, or add sources (more runs "
                        "do not help)")
    missing = sorted(set(sources) - set(source_means.index))
    if missing:
        raise RunsError(f"source_means has no row for {missing}")
    X = standardised(runs, columns, standardisation)
    means = source_means.loc[list(sources)]
    B = shares @ standardised(means, columns, standardisation)
    p = len(columns)
    names = ["constant", *(f"within_{c}" for c in columns), *(f"between_{c}" for c in columns)]
    fit = ols(np.hstack([np.ones((len(X), 1)), X - B, B]), runs[outcome].to_numpy(float), names)
    contrast = np.hstack([np.zeros((p, 1)), -np.eye(p), np.eye(p)])
    cov = contrast @ fit.cov_hc3() @ contrast.T
    difference = pd.Series(contrast @ fit.beta, list(columns))
    table = interval_table(difference, np.sqrt(np.diag(cov)), fit.df, level)
    table = table.rename(columns={"estimate": "difference"})
    errors = np.sqrt(np.diag(fit.cov_hc3()))
    sides = [("within", slice(1, p + 1)), ("between", slice(p + 1, None))]
    for place, (name, part) in enumerate(sides):
        own = interval_table(pd.Series(fit.beta[part], list(columns)), errors[part], fit.df, level)
        for i, column in enumerate(("estimate", "low", "high")):
            label = name if column == "estimate" else f"{name}_{column}"
            table.insert(3 * place + i, label, own[column])
    table["interval"] = THESE_SOURCES
    f = float(difference @ np.linalg.solve(cov, difference) / p)
    between = RuleFit("between", tuple(columns), (), fit,
                  standardisation or Standardizer.identity(columns), runs)
    return Mundlak(table, f, p, fit.df, float(fisher.sf(f, p, fit.df)), between)
