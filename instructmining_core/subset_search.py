"""The paper's choice of variables, over all subsets of one size and many outcomes at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import t as student

from .ols import residualise

NEAR_BEST = 0.01  # R² within this of the best counts as "highest"; the paper gives no figure


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
    source shares); size : most terms in a rule, lowered to p where p is smaller; smaller : also
    all rules with fewer terms, as the paper's procedure may choose (v1 has three, v3 four).
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

    def choose(self, Y: np.ndarray, near: float = NEAR_BEST) -> Choice:
        """Of the subsets within `near` of the best R², the one whose largest p is smallest."""
        E = residualise(Y, self.controls)
        cross, beta, total = self._slopes(E)
        r2 = (cross * beta).sum(axis=2) / total[:, None]
        variance = (1 - r2) * total[:, None] / self.df
        diagonal = np.diagonal(self.inverse, axis1=1, axis2=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            tvalue = np.abs(beta) / np.sqrt(np.maximum(variance, 0)[:, :, None] * diagonal)
        term = np.arange(self.size) < self.terms[:, None]
        p = np.where(term, 2 * student.sf(np.nan_to_num(tvalue), self.df[:, None]), 0.0)
        allowed = r2 >= r2.max(axis=1, keepdims=True) - near
        best = np.where(allowed, p.max(axis=2), np.inf).argmin(axis=1)
        rows = np.arange(len(best))
        shown = np.where(term[best], p[rows, best], np.nan)
        scale = self.scale[self.subsets[best]]
        return Choice(best, r2[rows, best], shown, beta[rows, best] / scale)
