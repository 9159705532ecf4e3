"""The rule: within-source slopes of the log loss on set means, beside the source shares.

Least squares is statsmodels'; here are what it does not have and how a study's runs go into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import f as fisher
from scipy.stats import t as student

from ..config import InstructMiningError
from .run_table import (
    DESIGNED,
    RankError,
    RunsError,
    Standardizer,
    pick_arms,
    share_matrix,
    standardised,
    within_sources,
)

if TYPE_CHECKING:
    from statsmodels.regression.linear_model import RegressionResults

LEVEL = 0.95  # of every interval
THESE_SOURCES = "these sources: HC3, t(n-k)"
NEW_SOURCES = "new sources: delete-one-source jackknife, t(S-1)"
LENGTH_LABEL = "length or training tokens"


def ols(X: np.ndarray, y: np.ndarray, names: Sequence[str]) -> RegressionResults:
    """Least squares of y, (n,), on X, (n, k), any constant included, by statsmodels.

    Errors: RankError with the names of the columns at fault, or where n ≤ k; InstructMiningError
    where values are missing.
    """
    # takes a second to import, and most callers of this room fit nothing
    from statsmodels.regression.linear_model import OLS

    X, y = np.asarray(X, float), np.asarray(y, float)
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        bad = [n for n, ok in zip(names, np.isfinite(X).all(axis=0), strict=True) if not ok]
        raise InstructMiningError(f"values are missing or infinite in {bad or 'the outcome'}: drop "
                                  "those runs or those columns")
    if X.shape[0] <= X.shape[1]:
        raise RankError(f"{X.shape[0]} runs can't fit {X.shape[1]} coefficients: add runs or "
                        "leave columns out")
    norms = np.linalg.norm(X, axis=0)
    weak = np.abs(np.diag(np.linalg.qr(X / np.where(norms > 0, norms, 1), mode="r"))) < 1e-9
    if weak.any():
        bad = [n for n, w in zip(names, weak, strict=True) if w]
        raise RankError(f"columns {bad} are constant or follow from the others in these "
                        f"{X.shape[0]} runs: leave them out or vary them in the design")
    model = OLS(y, X)
    model.data.xnames = list(names)
    return model.fit()


def hc3(fit: RegressionResults) -> np.ndarray:
    """HC3 covariance of the coefficients, (k, k): MacKinnon & White 1985; Long & Ervin 2000.

    As statsmodels', but the term of a run with leverage 1, which is fitted exactly, is 0, not 0/0.
    """
    room = 1 - fit.get_influence().hat_matrix_diag
    if (room > 1e-9).all():
        return fit.cov_HC3
    scaled = np.divide(fit.resid, room, out=np.zeros_like(room), where=room > 1e-9)
    half = fit.model.pinv_wexog * scaled
    return half @ half.T


def residualise(X: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """X minus its projection on the columns of `controls`, (n, p); controls may lack full rank."""
    u, s, _ = np.linalg.svd(controls, full_matrices=False)
    basis = u[:, s > 1e-10 * s.max()]
    return X - basis @ (basis.T @ X)


def slope_map(X: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """The matrix A, (p, n), with A y = slopes of y on X beside `controls` (Frisch–Waugh–Lovell).

    For many outcomes or many deletions at once. Raises RankError where the controls leave some
    direction of X without variation.
    """
    left = residualise(X, controls)
    if np.linalg.matrix_rank(left, tol=1e-9 * max(np.linalg.norm(X), 1e-300)) < X.shape[1]:
        raise RankError(f"{X.shape[1]} slopes can't be told apart beside the controls in "
                        f"{X.shape[0]} runs")
    return np.linalg.pinv(left)


def vif(X: np.ndarray, controls: np.ndarray | None = None) -> np.ndarray:
    """Variance inflation of each column of X, (p,), beside `controls` (default: a constant).

    1/(1 − R²_j), R²_j from regressing column j on the others, both after the controls are
    taken out. Infinite where the others give a column exactly.
    """
    left = residualise(X, np.ones((len(X), 1)) if controls is None else controls)
    scale = np.linalg.norm(left, axis=0)
    left /= np.where(scale > 0, scale, 1)
    corr = left.T @ left
    if np.linalg.matrix_rank(corr) < len(corr):
        return np.full(X.shape[1], np.inf)
    return np.diag(np.linalg.inv(corr))


@dataclass(frozen=True)
class RuleFit:
    """A fitted rule. Slopes are changes of log loss per sd of the indicator over the pool's rows.

    kind : "within" or "pooled"; columns : of the indicators, the last coefficients of `ols`;
    sources : of the share columns, () where the fit has a constant; runs : one row a set
    """

    kind: str
    columns: tuple[str, ...]
    sources: tuple[str, ...]
    ols: RegressionResults
    standardizer: Standardizer
    runs: pd.DataFrame

    @property
    def slopes(self) -> pd.Series:
        """Standardised slopes, indexed by column."""
        return pd.Series(self.ols.params[-len(self.columns):], list(self.columns), name="estimate")

    @property
    def intercept(self) -> float:
        """Log loss at the pool's mean row: the constant, or the sources' constants averaged."""
        return float(np.mean(self.ols.params[: -len(self.columns)]))

    @property
    def controls(self) -> np.ndarray:
        """The share columns or the constant, (n, S) or (n, 1)."""
        return self.ols.model.exog[:, : -len(self.columns)]

    @property
    def indicators(self) -> np.ndarray:
        """The standardised set means, (n, p)."""
        return self.ols.model.exog[:, -len(self.columns):]

    @property
    def sigma(self) -> float:
        """Residual sd of log loss on `df` degrees of freedom."""
        return float(np.sqrt(self.ols.scale))

    @property
    def df(self) -> int:
        """Residual degrees of freedom, runs minus coefficients."""
        return int(self.ols.df_resid)

    @property
    def covariance(self) -> pd.DataFrame:
        """HC3 covariance of the slopes, (p, p)."""
        p = len(self.columns)
        return pd.DataFrame(hc3(self.ols)[-p:, -p:], list(self.columns), list(self.columns))

    @property
    def r2_beyond_controls(self) -> float:
        """Share of what the controls leave over that the indicators explain."""
        left = residualise(self.ols.model.endog[:, None], self.controls)[:, 0]
        return float(1 - self.ols.ssr / (left @ left))

    def table(self) -> pd.DataFrame:
        """One row an indicator: estimate, raw, se, t, p, low, high, vif, interval, label.

        estimate, se, low, high : log loss per sd; raw : log loss per unit of the indicator;
        interval : what the bounds speak of; label : what the coefficient may be called.
        """
        frame = interval_table(self.slopes, np.sqrt(np.diag(self.covariance)), self.df)
        frame.insert(1, "raw", self.slopes / self.standardizer.sd[list(self.columns)])
        frame["vif"] = vif(self.indicators, self.controls)
        frame["interval"] = THESE_SOURCES
        tokens_fixed = "arm" in self.runs and set(self.runs["arm"]) == {"tokens"}
        frame["label"] = [LENGTH_LABEL if c == "len_out" and not tokens_fixed else c
                          for c in self.columns]
        return frame


def interval_table(estimate: pd.Series, se: np.ndarray, df: int) -> pd.DataFrame:
    """estimate, se, t, p, low, high by column, from Student's t on df degrees of freedom."""
    frame = pd.DataFrame({"estimate": estimate})
    frame["se"] = se
    frame["t"] = frame["estimate"] / frame["se"]
    frame["p"] = 2 * student.sf(frame["t"].abs(), df)
    half = student.ppf(0.5 + LEVEL / 2, df) * frame["se"]
    frame["low"], frame["high"] = frame["estimate"] - half, frame["estimate"] + half
    frame.index.name = "column"
    return frame


def fit_rule(runs: pd.DataFrame, columns: Sequence[str], standardizer: Standardizer | None = None,
             *, arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss") -> RuleFit:
    """log L = Σ_s α_s w_s + Σ_j β_j X̄_j + ε over one run a set; statistics.md section 3.

    runs : `log_loss`, `share_<source>` and the columns, from `run_table`; arms : which runs
    enter (default: the designed ones; fusion runs hold every source, so that they could be in no
    delete-one-source fit; None takes all at equal rows). Without `standardizer` the columns are
    taken as standardised. Errors: RunsError, RankError (set means that can't be told apart).
    """
    runs, shares, sources, X, y = within_sources(runs, columns, standardizer, arms, outcome)
    fitted = ols(np.hstack([shares, X]), y, [*(f"share_{s}" for s in sources), *columns])
    return RuleFit("within", tuple(columns), sources, fitted,
                   standardizer or Standardizer.identity(columns), runs)


def fit_pooled(runs: pd.DataFrame, columns: Sequence[str],
               standardizer: Standardizer | None = None) -> RuleFit:
    """log L = β0 + Σ_j β_j X̄_j + ε, no source shares: the regression of the paper's rule.

    All runs at equal rows. It mixes slopes between sources with slopes within.
    """
    runs = pick_arms(runs, None)
    X = standardised(runs, columns, standardizer)
    fitted = ols(np.hstack([np.ones((len(X), 1)), X]), runs["log_loss"].to_numpy(float),
                 ["constant", *columns])
    return RuleFit("pooled", tuple(columns), (), fitted,
                   standardizer or Standardizer.identity(columns), runs)


@dataclass(frozen=True)
class MundlakTest:
    """table : by column: within, within_low, within_high, between, between_low, between_high,
    difference, se, t, p, low, high (of the difference); all bounds HC3, these sources
    f, df1, df2, p : Wald test of β_B = β_W for all columns together, HC3, these sources
    """

    table: pd.DataFrame
    f: float
    df1: int
    df2: int
    p: float


def mundlak_test(runs: pd.DataFrame, columns: Sequence[str], source_means: pd.DataFrame,
                 standardizer: Standardizer | None = None) -> MundlakTest:
    """Are slopes between sources those within? log L = β0 + W β_W + B β_B (Mundlak 1978).

    B = Σ_s w_s μ_s is what the means of a set's sources give, W = X̄ − B what its tilt gives; over
    all runs at equal rows. source_means : index source, the pool's means of each column, raw units
    (standardised units without `standardizer`). Needs more sources than columns + 1, since B has
    only S − 1 dimensions: otherwise a RunsError that says to name fewer columns or add sources.
    """
    runs = pick_arms(runs, None)
    shares, sources = share_matrix(runs)
    if len(sources) <= len(columns) + 1:
        raise RunsError(f"{len(sources)} sources span {len(sources) - 1} dimensions, too few for "
                        f"{len(columns)} slopes between sources: name at most "
                        f"{max(len(sources) - 2, 0)} columns, or add sources (more runs "
                        "do not help)")
    missing = sorted(set(sources) - set(source_means.index))
    if missing:
        raise RunsError(f"source_means has no row for {missing}")
    X = standardised(runs, columns, standardizer)
    B = shares @ standardised(source_means.loc[list(sources)], columns, standardizer)
    p, df = len(columns), len(X) - 2 * len(columns) - 1
    names = ["constant", *(f"within_{c}" for c in columns), *(f"between_{c}" for c in columns)]
    fit = ols(np.hstack([np.ones((len(X), 1)), X - B, B]), runs["log_loss"].to_numpy(float), names)
    errors = hc3(fit)
    contrast = np.hstack([np.zeros((p, 1)), -np.eye(p), np.eye(p)])
    cov = contrast @ errors @ contrast.T
    difference = pd.Series(contrast @ fit.params, list(columns))
    parts = []
    for name, part in (("within", slice(1, p + 1)), ("between", slice(p + 1, None))):
        own = interval_table(pd.Series(fit.params[part], list(columns)),
                             np.sqrt(np.diag(errors))[part], df)
        parts.append(own[["estimate", "low", "high"]].set_axis(
            [name, f"{name}_low", f"{name}_high"], axis=1))
    told = interval_table(difference, np.sqrt(np.diag(cov)), df)
    table = pd.concat([*parts, told.rename(columns={"estimate": "difference"})], axis=1)
    table["interval"] = THESE_SOURCES
    f = float(difference @ np.linalg.solve(cov, difference) / p)
    return MundlakTest(table, f, p, df, float(fisher.sf(f, p, df)))
