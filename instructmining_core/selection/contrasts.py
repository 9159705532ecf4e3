"""Contrasts of two groups of runs: Welch, equivalence, prompts as a second factor, verdicts.

Source: our statistical plan, section 6; Welch 1947, Schuirmann 1987 (two one-sided tests), Holm
1979. Differences are taken in log loss and shown as relative differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

MARGIN = 0.01
VERDICTS = (
    "better", "better, and within ±1 %", "worse", "worse, and within ±1 %", "within ±1 %",
    "undecided",
)


class ComparisonError(ValueError):
    """The runs do not contain what the comparison asks for."""


@dataclass(frozen=True)
class Contrast:
    """One difference of mean log losses with everything that a verdict needs.

    difference, low, high : float, relative (−0.02 is a loss 2 % lower), interval at `level`
    p : float, two-sided Welch p-value; p_margin : float, the larger of two one-sided tests
    detectable : float, relative difference seen with 80 % power at this noise and these counts
    df : float, Welch–Satterthwaite degrees of freedom
    """

    difference: float
    low: float
    high: float
    p: float
    p_margin: float
    detectable: float
    df: float


def welch(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean difference a − b along the last axis, its standard error and Welch's degrees of freedom.

    a : ndarray, shape (..., n_a); b : ndarray, shape (..., n_b); both n at least 2.
    """
    var_a = a.var(axis=-1, ddof=1) / a.shape[-1]
    var_b = b.var(axis=-1, ddof=1) / b.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (var_a + var_b) ** 2 / (
            var_a**2 / (a.shape[-1] - 1) + var_b**2 / (b.shape[-1] - 1)
        )
    return a.mean(axis=-1) - b.mean(axis=-1), np.sqrt(var_a + var_b), df


def p_values(
    difference: np.ndarray, se: np.ndarray, df: np.ndarray, margin: float = MARGIN
) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p-value of "no difference", and of "outside the margin" (two one-sided tests).

    difference, se : in log loss; margin : relative, so the bounds are log(1 ± margin).
    """
    p = 2 * stats.t.sf(np.abs(difference) / se, df)
    above = stats.t.sf((difference - np.log1p(-margin)) / se, df)
    below = stats.t.cdf((difference - np.log1p(margin)) / se, df)
    return p, np.maximum(above, below)


def detectable_difference(se: float, df: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest relative difference that a two-sided t test at `alpha` finds with this power.

    se : float, standard error of a log-loss difference; df : float. From the noncentral t.
    """
    return float(np.expm1(detectable_shift(se, df, alpha, power)))


def detectable_shift(se: float, df: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """As `detectable_difference`, in the units of `se`; NaN where there is no test."""
    if not (np.isfinite(se) and se > 0 and df > 0):
        return float("nan")
    df = min(df, 1e6)  # beyond that the t is the normal
    critical = stats.t.isf(alpha / 2, df)

    def shortfall(shift: float) -> float:
        # The wrong-sided tail is left out: below 1e-4 here, and scipy's nct gives NaN in it.
        return stats.nct.sf(critical, df, shift) - power

    return float(se * optimize.brentq(shortfall, 0.0, critical * 2 + 4))


def contrast(
    losses: Sequence[float],
    versus: Sequence[float],
    *,
    level: float = 0.95,
    margin: float = MARGIN,
    alpha: float | None = None,
) -> Contrast:
    """Welch contrast of two groups of runs on the log loss.

    losses, versus : loss of each run, in nats; fewer than two runs on a side, or no variation at
    all, give NaN for everything but the difference. alpha : level of the detectable difference.
    """
    a, b = np.log(np.asarray(losses, float)), np.log(np.asarray(versus, float))
    nan = float("nan")
    if min(len(a), len(b)) == 0:
        raise ComparisonError("a contrast needs at least one run on each side, got none")
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        return Contrast(float(np.expm1(a.mean() - b.mean())), nan, nan, nan, nan, nan, nan)
    difference, se, df = welch(a, b)
    reach = stats.t.isf((1 - level) / 2, df) * se
    p, p_margin = p_values(difference, se, df, margin)
    seen = detectable_difference(float(se), float(df), 1 - level if alpha is None else alpha)
    low, high = np.expm1([difference - reach, difference + reach])
    return Contrast(
        float(np.expm1(difference)), float(low), float(high), float(p), float(p_margin),
        seen, float(df),
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment; NaN stays NaN and counts as a test (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")
    factor = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factor))
    return adjusted


def verdict(
    difference: float, p: float, p_margin: float, *, alpha: float = 0.05, margin: float = MARGIN
) -> str:
    """One of `VERDICTS` (with the margin at hand); a missing p-value is "undecided".

    p_margin : of "outside the margin", by two one-sided tests; below alpha the difference is
    smaller than the margin, whatever its sign. A difference that is real *and* that small is
    called by its sign, with "and within ±1 %" after it.
    """
    inside = f"within ±{100 * margin:g} %" if p_margin < alpha else ""
    if p < alpha:
        sign = "better" if difference < 0 else "worse"
        return f"{sign}, and {inside}" if inside else sign
    return inside or "undecided"


def crossed_interval(
    losses: np.ndarray, versus: np.ndarray, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the relative difference with runs and prompts both taken as random.

    losses : ndarray, shape (n_runs_a, n_prompts), per-prompt loss in nats; versus : ndarray,
    shape (n_runs_b, n_prompts), the same prompts in the same order. The prompt's own level cancels
    in the difference; what is left is how differently the two methods treat each prompt.
    Variance = between runs + between prompts − what both count (Satterthwaite degrees of freedom).
    """
    if losses.ndim != 2 or versus.ndim != 2 or losses.shape[1] != versus.shape[1]:
        raise ComparisonError(
            f"per-prompt losses must be (runs, prompts) with the same prompts, got {losses.shape} "
            f"and {versus.shape}"
        )
    if min(*losses.shape, versus.shape[0]) < 2:
        raise ComparisonError("two runs a side and two prompts are the least, got fewer")
    scaled = [group / group.mean() for group in (losses, versus)]
    n_prompts = losses.shape[1]
    terms, shared = [], []
    for group in scaled:
        n = len(group)
        rest = group - group.mean(0) - group.mean(1, keepdims=True) + group.mean()
        terms.append((group.mean(1).var(ddof=1) / n, n - 1))
        shared.append((
            (rest**2).sum() / ((n - 1) * (n_prompts - 1)) / (n * n_prompts),
            (n - 1) * (n_prompts - 1),
        ))
    by_prompt = (scaled[0].mean(0) - scaled[1].mean(0)).var(ddof=1) / n_prompts
    terms.append((by_prompt, n_prompts - 1))
    total = sum(v for v, _ in terms) - sum(v for v, _ in shared)
    # The subtraction is an estimate: it may not undercut what either factor shows alone.
    total = max(total, by_prompt, terms[0][0] + terms[1][0])
    df = total**2 / sum(v**2 / d for v, d in terms + shared)
    # nor may its degrees of freedom undercut the smallest factor's: with two runs they run to 0
    df = max(df, min(d for _, d in terms))
    centre = np.log(losses.mean(1)).mean() - np.log(versus.mean(1)).mean()
    reach = stats.t.isf((1 - level) / 2, df) * np.sqrt(total)
    return float(np.expm1(centre - reach)), float(np.expm1(centre + reach))
