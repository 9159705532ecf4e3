"""Ordinary least squares with what inference needs: leverage, HC3, Cook's distance, VIF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class RankError(ValueError):
    """A design matrix can't tell its columns apart."""


@dataclass(frozen=True)
class OLS:
    """A fitted regression y = X b + e.

    names : tuple of k str; X : (n, k); y : (n,); beta : (k,)
    xtx_inv : (k, k), (X'X)⁻¹; leverage : (n,), diagonal of the hat matrix
    """

    names: tuple[str, ...]
    X: np.ndarray
    y: np.ndarray
    beta: np.ndarray
    xtx_inv: np.ndarray
    leverage: np.ndarray

    @property
    def df(self) -> int:
        """Residual degrees of freedom, n − k."""
        return self.X.shape[0] - self.X.shape[1]

    @property
    def fitted(self) -> np.ndarray:
        """Fitted values, (n,)."""
        return self.X @ self.beta

    @property
    def residuals(self) -> np.ndarray:
        """y minus fitted values, (n,)."""
        return self.y - self.fitted

    @property
    def sigma(self) -> float:
        """Residual standard deviation on n − k degrees of freedom; units of y."""
        return float(np.sqrt(self.residuals @ self.residuals / self.df))

    @property
    def r2(self) -> float:
        """1 − RSS/TSS about the mean of y; right for designs whose columns span a constant."""
        centred = self.y - self.y.mean()
        return float(1 - self.residuals @ self.residuals / (centred @ centred))

    def cov_classical(self) -> np.ndarray:
        """s²(X'X)⁻¹, (k, k)."""
        return self.sigma**2 * self.xtx_inv

    def cov_hc3(self) -> np.ndarray:
        """HC3 covariance, (k, k): MacKinnon & White 1985; Long & Ervin 2000.

        A run with leverage 1 is fitted exactly and says nothing of the noise: its term is 0
        instead of 0/0.
        """
        room = 1 - self.leverage
        scaled = np.divide(self.residuals, room, out=np.zeros_like(room), where=room > 1e-9)
        half = self.xtx_inv @ (self.X * scaled[:, None]).T
        return half @ half.T

    def cook(self) -> np.ndarray:
        """Cook's distance, (n,): e²h / (k s² (1 − h)²)."""
        room = np.maximum(1 - self.leverage, 1e-12)
        return self.residuals**2 * self.leverage / (self.X.shape[1] * self.sigma**2 * room**2)

    def studentised(self) -> np.ndarray:
        """Internally studentised residuals, (n,)."""
        return self.residuals / (self.sigma * np.sqrt(np.maximum(1 - self.leverage, 1e-12)))


def ols(X: np.ndarray, y: np.ndarray, names: Sequence[str]) -> OLS:
    """Fit by QR on columns of unit length, which keeps Longley's data right to 1e-9.

    X : (n, k), any constant included; y : (n,). Errors: RankError with the columns at
    fault, or where n ≤ k; ValueError where values are missing.
    """
    X, y = np.asarray(X, float), np.asarray(y, float)
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        bad = [n for n, ok in zip(names, np.isfinite(X).all(axis=0), strict=True) if not ok]
        raise ValueError(f"values are missing or infinite in {bad or 'the outcome'}: drop those "
                         "runs or those columns")
    if X.shape[0] <= X.shape[1]:
        raise RankError(f"{X.shape[0]} runs can't fit {X.shape[1]} coefficients: add runs or "
                         "leave columns out")
    norms = np.linalg.norm(X, axis=0)
    q, r = np.linalg.qr(X / np.where(norms > 0, norms, 1))
    weak = np.abs(np.diag(r)) < 1e-9
    if weak.any():
        bad = [n for n, w in zip(names, weak, strict=True) if w]
        raise RankError(f"columns {bad} are constant or follow from the others in these "
                        f"{X.shape[0]} runs: leave them out or vary them in the design")
    r_inv = np.linalg.solve(r, np.eye(r.shape[0]))
    beta = (r_inv @ (q.T @ y)) / norms
    xtx_inv = (r_inv @ r_inv.T) / np.outer(norms, norms)
    return OLS(tuple(names), X, y, beta, xtx_inv, np.sum(q**2, axis=1))


def residualise(X: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """X minus its projection on the columns of `controls`, (n, p); controls may lack full rank."""
    u, s, _ = np.linalg.svd(controls, full_matrices=False)
    basis = u[:, s > 1e-10 * s.max()]
    return X - basis @ (basis.T @ X)


def slope_map(X: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """The matrix A, (p, n), with A y = slopes of y on X beside `controls` (Frisch–Waugh–Lovell).

    Raises RankError where the controls leave some direction of X without variation.
    """
    left = residualise(X, controls)
    if np.linalg.matrix_rank(left, tol=1e-9 * max(np.linalg.norm(X), 1e-300)) < X.shape[1]:
        raise RankError(f"{X.shape[1]} slopes can't be told apart beside the controls in "
                        f"{X.shape[0]} runs")
    return np.linalg.pinv(left)


def vif(X: np.ndarray, controls: np.ndarray | None = None) -> np.ndarray:
    """Variance inflation of each column of X, (p,), beside `controls` (default: a constant).

    1/(1 − R²_j), R²_j from regressing column j on the others, both after the controls are
    taken out; with a constant this is the usual VIF (R: car::vif). Infinite where the others
    give a column exactly.
    """
    X = np.asarray(X, float)
    left = residualise(X, np.ones((len(X), 1)) if controls is None else controls)
    scale = np.linalg.norm(left, axis=0)
    if (scale == 0).any():
        return np.full(X.shape[1], np.inf)
    corr = (left / scale).T @ (left / scale)
    if np.linalg.matrix_rank(corr) < len(corr):
        return np.full(X.shape[1], np.inf)
    return np.diag(np.linalg.inv(corr))
