"""How many runs are enough, for which coefficient: answered before they are paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import f as fisher
from scipy.stats import t as student

from .inference import SeedVariance
from .rule import LEVEL, RuleFit
from .run_table import RankError

REPLAN_EVERY = 30  # runs
RANDOM_SHARE = 0.2  # of the sets stays undesigned, so that lack of fit can be seen
PASSES = 3  # of exchanges over the chosen sets, at most
BAND = 0.80  # of studies whose half-width lies in the planned band


@dataclass(frozen=True)
class Precision:
    """table : runs, coefficient, half_width, low, high (80 % band, log loss per sd); sources : how
    many"""

    table: pd.DataFrame
    sources: int

    def runs_needed(self, target: float, *, safe: bool = True) -> pd.Series:
        """Fewest planned runs with half_width ≤ target, by coefficient; NaN where none suffices.

        safe : the upper end of the band must reach the target.
        """
        enough = self.table[self.table["high" if safe else "half_width"] <= target]
        names = self.table["coefficient"].unique()
        return enough.groupby("coefficient")["runs"].min().reindex(names)


def half_widths(M: np.ndarray, sigma: float) -> np.ndarray:
    """t(N−k) · σ · sqrt([(M'M)⁻¹]_jj) of every coefficient, (k,); M : (N, k).

    Infinite where M has too few rows or can't tell a coefficient from the others.
    """
    N, k = M.shape
    M = M[:, M.any(axis=0)] if N else M
    if N <= k or np.linalg.matrix_rank(M) < k:
        return np.full(k, np.inf)
    r_inv = np.linalg.inv(np.linalg.qr(M)[1])
    return student.ppf(0.5 + LEVEL / 2, N - k) * sigma * np.sqrt((r_inv**2).sum(axis=1))


def sigma_band(sigma: float, df_pilot: int, df_study: int,
               level: float = BAND) -> tuple[float, float]:
    """Bounds for the residual sd that the study will have: (study/pilot)² is F(df_study, df_pilot).
    """
    tail = (1 - level) / 2
    low, high = fisher.ppf([tail, 1 - tail], df_study, df_pilot)
    return sigma * np.sqrt(low), sigma * np.sqrt(high)


def plan_runs(shares: np.ndarray, X: np.ndarray, columns: Sequence[str], pilot: SeedVariance,
              sizes: Sequence[int]) -> Precision:
    """Half-widths of the slopes after the first N sets of a design, with an 80 % band.

    shares : (n, S) and X : (n, p), the planned sets in the order in which they will be run;
    pilot : from `seed_variance` on 4 sets × 3 seeds, or `replan`; sizes : numbers of runs N
    """
    rows = []
    for N in sizes:
        part = shares[:N][:, shares[:N].any(axis=0)]
        M = np.hstack([part, X[:N]])
        unit = half_widths(M, 1.0)[-len(columns):]
        low, high = (sigma_band(pilot.sd, pilot.df, N - M.shape[1]) if N > M.shape[1]
                     else (np.nan, np.nan))
        rows += [{"runs": N, "coefficient": c, "half_width": u * pilot.sd, "low": u * low,
                  "high": u * high} for c, u in zip(columns, unit, strict=True)]
    return Precision(pd.DataFrame(rows), shares.shape[1])


def replan(pilot: SeedVariance, fit: RuleFit) -> SeedVariance:
    """The noise to plan with once runs are in: the fit's where it has more degrees of freedom."""
    if fit.df <= pilot.df:
        return pilot
    low, high = sigma_band(fit.sigma, fit.df, 10**6, LEVEL)
    return SeedVariance(fit.sigma, fit.df, low, high)


def d_optimal(M: np.ndarray, n: int, seed: int = 0, *, groups: Sequence[str] | None = None,
              quota: Mapping[str, int] | None = None) -> np.ndarray:
    """Positions of `n` of the candidate sets, chosen to make det(M'M) large; the rest random.

    M : (candidates, k), shares and standardised set means of ≥ 1,000 tilted candidates, all known
    before training; groups, quota : a label for each candidate, and how many sets of each label
    are wanted (n in all; default: any candidate may take any place). A share RANDOM_SHARE is
    drawn at random first, the others are added one by one and then exchanged while the
    determinant grows (Fedorov 1972, one exchange a step). Returned in running order: random and
    chosen sets interleaved. Errors: RankError.
    """
    if n < M.shape[1] or n > len(M):
        raise RankError(f"{n} sets from {len(M)} candidates can't fit {M.shape[1]} coefficients")
    labels = np.full(len(M), "") if groups is None else np.asarray(groups)
    room = {"": n} if quota is None else dict(quota)
    short = [g for g, many in room.items() if many > (labels == g).sum()]
    if short or sum(room.values()) != n:
        raise RankError(f"{n} sets can't be had as {room}: too few candidates of {short}")
    rng = np.random.default_rng(seed)
    random: list[int] = []
    for group, many in room.items():
        drawn = rng.choice(np.flatnonzero(labels == group), round(RANDOM_SHARE * many), False)
        random += drawn.tolist()
        room[group] -= len(drawn)
    # a ridge far below any real information lets the first steps invert
    A = M[random].T @ M[random] + 1e-6 * np.eye(M.shape[1])
    chosen: list[int] = []
    free = np.ones(len(M), bool)
    free[random] = False
    while len(random) + len(chosen) < n:
        gain = np.einsum("ij,jk,ik->i", M, np.linalg.inv(A), M)
        open_groups = [group for group, many in room.items() if many]
        best = int(np.where(free & np.isin(labels, open_groups), gain, -1).argmax())
        room[str(labels[best])] -= 1
        chosen.append(best)
        free[best] = False
        A += np.outer(M[best], M[best])
    for _ in range(PASSES):
        if not _exchange(M, A, chosen, free, labels):
            break
    order = rng.permutation(n)
    return np.array(random + chosen, int)[order]


def _exchange(M: np.ndarray, A: np.ndarray, chosen: list[int], free: np.ndarray,
              labels: np.ndarray) -> bool:
    """One pass of Fedorov exchanges in place, inside a label; True if any raised det(A)."""
    changed = False
    for i, old in enumerate(chosen):
        inverse = np.linalg.inv(A)
        with_old = M @ inverse @ M[old]
        own = np.einsum("ij,jk,ik->i", M, inverse, M)
        delta = own - (own * own[old] - with_old**2) - own[old]
        best = int(np.where(free & (labels == labels[old]), delta, -np.inf).argmax())
        if delta[best] > 1e-9:
            A += np.outer(M[best], M[best]) - np.outer(M[old], M[old])
            chosen[i] = best
            free[best], free[old] = False, True
            changed = True
    return changed
