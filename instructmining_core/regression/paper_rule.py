"""The paper's own fit: the best four indicators by R², then by p-values, without source shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import t as student

from .rule import RuleFit, fit_pooled, residualise
from .run_table import Standardizer, pick_arms, standardised

NEAR_BEST = 0.01  # R² within this of the best counts as "highest"; the paper gives no figure
NOT_VALID = "the paper's procedure, not valid after selection"


@dataclass(frozen=True)
class Choice:
    """What the procedure chose for each of B outcomes.

    subset : (B,) position in `SubsetSearch.subsets`; r2 : (B,) R² beyond the controls;
    p : (B, size) p-values of the chosen terms, not valid after selection, NaN past the last term;
    beta : (B, size) slopes of the chosen terms, 0 past the last term
    """

    subset: np.ndarray
    r2: np.ndarray
    p: np.ndarray
    beta: np.ndarray


class SubsetSearch:
    """All regressions of one size on a fixed design, projectors computed once.

    X : (n, p) indicators; controls : (n, m) columns always in the model (a constant, or the
    source shares); size : most terms in a rule; smaller : also all rules with fewer terms.
    subsets : (G, size) column positions; p stands for "no term".
    """

    def __init__(self, X: np.ndarray, controls: np.ndarray, size: int = 4, *,
                 smaller: bool = False):
        n, p = X.shape
        self.size = min(size, p)
        self.subsets = np.array([(*c, *[p] * (self.size - k))
                                 for k in range(1 if smaller else self.size, self.size + 1)
                                 for c in combinations(range(p), k)])
        left = residualise(np.asarray(X, float), controls)
        self.controls = controls
        self.scale = np.append(np.sqrt((left**2).sum(axis=0)), np.inf)
        # a column that the controls fix (rounding noise only) must explain nothing
        self.scale[:p][self.scale[:p] <= 1e-10 * np.linalg.norm(X, axis=0)] = np.inf
        self.left = np.hstack([left, np.zeros((n, 1))]) / self.scale
        gram = self.left.T @ self.left
        grams = gram[self.subsets[:, :, None], self.subsets[:, None, :]]
        self.inverse = np.linalg.pinv(grams, rcond=1e-10, hermitian=True)
        self.terms = (self.subsets < p).sum(axis=1)
        self.df = n - np.linalg.matrix_rank(controls) - self.terms

    def members(self, subset: int) -> list[int]:
        """Column positions of one subset."""
        return [int(i) for i in self.subsets[subset][: self.terms[subset]]]

    def _slopes(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cross products (B, G, k), slopes (B, G, k) in scaled units, total squares (B,)."""
        cross = (self.left.T @ E).T[:, self.subsets]
        beta = np.einsum("gij,bgj->bgi", self.inverse, cross)
        return cross, beta, np.maximum((E**2).sum(axis=0), 1e-300)

    def r2(self, Y: np.ndarray) -> np.ndarray:
        """R² beyond the controls of every subset, (B, G); Y : (n, B) outcomes."""
        cross, beta, total = self._slopes(residualise(Y, self.controls))
        return (cross * beta).sum(axis=2) / total[:, None]

    def max_r2(self, Y: np.ndarray) -> np.ndarray:
        """The permutation statistic, (B,): the largest R² over the subsets."""
        return self.r2(Y).max(axis=1)

    def choose(self, Y: np.ndarray) -> Choice:
        """Of the subsets within NEAR_BEST of the best R², the one whose largest p is smallest."""
        E = residualise(Y, self.controls)
        cross, beta, total = self._slopes(E)
        r2 = (cross * beta).sum(axis=2) / total[:, None]
        variance = (1 - r2) * total[:, None] / self.df
        diagonal = np.diagonal(self.inverse, axis1=1, axis2=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            tvalue = np.abs(beta) / np.sqrt(np.maximum(variance, 0)[:, :, None] * diagonal)
        term = np.arange(self.size) < self.terms[:, None]
        p = np.where(term, 2 * student.sf(np.nan_to_num(tvalue), self.df[:, None]), 0.0)
        allowed = r2 >= r2.max(axis=1, keepdims=True) - NEAR_BEST
        best = np.where(allowed, p.max(axis=2), np.inf).argmin(axis=1)
        rows = np.arange(len(best))
        shown = np.where(term[best], p[rows, best], np.nan)
        scale = self.scale[self.subsets[best]]
        return Choice(best, r2[rows, best], shown, beta[rows, best] / scale)


@dataclass(frozen=True)
class PaperFit:
    """What the paper's procedure gives: `fit`, of the chosen columns, kind "pooled"."""

    fit: RuleFit

    def table(self) -> pd.DataFrame:
        """The chosen terms as in RuleFit.table, p-values and bounds labelled as not valid."""
        return self.fit.table().assign(p_paper=self.fit.ols.pvalues[1:], interval=NOT_VALID)


def fit_paper(runs: pd.DataFrame, columns: Sequence[str],
              standardizer: Standardizer | None = None, *, size: int = 4,
              arms: Sequence[str] | None = None) -> PaperFit:
    """"First highest R², then the most significant p values" (paper v3, section on the rule).

    Our reading, since the paper gives no figures: all subsets of up to `size` terms (v3 has four)
    with a constant; of those within NEAR_BEST of the best R², the one whose largest p is smallest.
    arms=None takes every run at equal rows, ("fusion",) the paper's own design.
    """
    picked = pick_arms(runs, arms)
    X = standardised(picked, columns, standardizer)
    y = picked["log_loss"].to_numpy(float)[:, None]
    search = SubsetSearch(X, np.ones((len(X), 1)), size, smaller=True)
    names = [columns[i] for i in search.members(search.choose(y).subset[0])]
    return PaperFit(fit_pooled(picked, names, standardizer))
