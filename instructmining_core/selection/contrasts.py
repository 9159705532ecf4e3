"""Contrasts of two groups of runs: Welch, equivalence, prompts as a second factor, verdicts.

Source: our statistical plan, section 6; Welch 1947, Schuirmann 1987 (two one-sided tests).
Differences are taken in log loss and shown as relative differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from ..config import InstructMiningError

LEVEL = 0.95  # of every interval here
ALPHA = 0.05  # of every test
POWER = 0.8  # at which a difference counts as detectable
MARGIN = 0.01  # relative difference below which two losses count as equal
BOUNDS = np.log1p([-MARGIN, MARGIN])  # the margin in log loss


@dataclass(frozen=True)
class Contrast:
    """One difference of mean log losses with everything that a verdict needs.

    difference, low, high : relative (−0.02 is a loss 2 % lower), with its 95 % interval
    p : two-sided Welch p-value; p_margin : the larger of two one-sided tests
    detectable : relative difference seen with 80 % power at this noise and these counts
    df : Welch–Satterthwaite degrees of freedom
    """

    difference: float
    low: float
    high: float
    p: float
    p_margin: float
    detectable: float
    df: float


def contrast(
    losses: Sequence[float], versus: Sequence[float], *, alpha: float = ALPHA
) -> Contrast:
    """Welch contrast of two groups of runs on the log loss.

    losses, versus : loss of each run, in nats; fewer than two runs on a side, or no variation at
    all, give NaN for everything but the difference. alpha : level of the detectable difference.
    """
    a, b = np.log(np.asarray(losses, float)), np.log(np.asarray(versus, float))
    if min(len(a), len(b)) == 0:
        raise InstructMiningError("a contrast needs at least one run on each side, got none")
    difference = float(np.expm1(a.mean() - b.mean()))
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        return Contrast(difference, *[float("nan")] * 6)
    both = CompareMeans(DescrStatsW(a), DescrStatsW(b))
    _, p, df = both.ttest_ind(usevar="unequal")
    p_margin, *_ = both.ttost_ind(*BOUNDS, usevar="unequal")
    low, high = np.expm1(both.tconfint_diff(1 - LEVEL, usevar="unequal"))
    seen = detectable_difference(both.std_meandiff_separatevar, df, alpha)
    return Contrast(difference, float(low), float(high), float(p), float(p_margin), seen, float(df))


def detectable_difference(se: float, df: float, alpha: float = ALPHA) -> float:
    """Smallest relative difference that a two-sided t test at `alpha` finds with 80 % power.

    se : of a log-loss difference; df : its degrees of freedom. From the noncentral t.
    """
    return float(np.expm1(detectable_shift(se, df, alpha)))


def detectable_shift(se: float, df: float, alpha: float = ALPHA) -> float:
    """As `detectable_difference`, in the units of `se`; NaN where there is no test."""
    if not (np.isfinite(se) and se > 0 and df > 0):
        return float("nan")
    df = min(df, 1e6)  # beyond that the t is the normal
    # the wrong-sided tail is left out: below 1e-4 here
    return float(se * special.nctdtrinc(df, 1 - POWER, stats.t.isf(alpha / 2, df)))


def verdict(difference: float, p: float, p_margin: float) -> str:
    """"better", "worse", "within ±1 %", both ("better, and within ±1 %") or "undecided".

    p_margin : of "outside the margin", by two one-sided tests. A missing p-value is "undecided".
    """
    inside = f"within ±{100 * MARGIN:g} %" if p_margin < ALPHA else ""
    if p < ALPHA:
        sign = "better" if difference < 0 else "worse"
        return f"{sign}, and {inside}" if inside else sign
    return inside or "undecided"


def crossed_interval(losses: np.ndarray, versus: np.ndarray) -> tuple[float, float]:
    """95 % interval of the relative difference with runs and prompts both taken as random.

    losses : shape (n_runs_a, n_prompts), per-prompt loss in nats; versus : shape (n_runs_b,
    n_prompts), the same prompts in the same order. A prompt's own level cancels in the difference.
    Variance = between runs + between prompts − what both count (Satterthwaite degrees of freedom).
    """
    if losses.ndim != 2 or versus.ndim != 2 or losses.shape[1] != versus.shape[1]:
        raise InstructMiningError(
            f"per-prompt losses must be (runs, prompts) with the same prompts, got {losses.shape} "
            f"and {versus.shape}"
        )
    if min(*losses.shape, versus.shape[0]) < 2:
        raise InstructMiningError("two runs a side and two prompts are the least, got fewer")
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
    reach = stats.t.isf((1 - LEVEL) / 2, df) * np.sqrt(total)
    return float(np.expm1(centre - reach)), float(np.expm1(centre + reach))
