"""From the ledger to a rule: every estimator of the study under one name.

`fit_rule` is the main estimator; the others stand beside it (statistics.md, section 3).

What may be claimed from the runs: every inference of the study under one name.

statistics.md, section 4. Two kinds of interval, never mixed: "these sources" (HC3) and
"new sources" (delete-one-source jackknife).
"""

from __future__ import annotations

import pandas as pd

from .checks import (
    baseline_comparison,
    baseline_slopes,
    holm,
    sign_flags,
    transfer_slope,
    univariate,
)
from .inference import (
    Jackknife,
    SeedVariance,
    bootstrap_choice,
    effective_dimensions,
    held_out,
    jackknife_sources,
    lack_of_fit,
    residual_page,
    seed_variance,
    summary,
)
from .ols import OLS, RankError, ols, vif
from .paper_rule import NOT_VALID, PaperFit, fit_paper
from .permutation import Permutation, permutation
from .rule import (
    LENGTH_LABEL,
    NEW_SOURCES,
    THESE_SOURCES,
    Mundlak,
    RuleFit,
    fit_pooled,
    fit_rule,
    mundlak,
)
from .run_table import DESIGNED, RunsError, Standardizer, assemble, one_per_set, share_matrix

__all__ = [
    "Jackknife", "Permutation", "SeedVariance", "bootstrap_choice", "effective_dimensions", "hc3",
    "held_out", "jackknife_sources", "lack_of_fit", "permutation", "residual_page",
    "seed_variance", "summary", "vif",
]


def hc3(fit: RuleFit, level: float = 0.95) -> pd.DataFrame:
    """Intervals for these sources: HC3 with t(n − k); the columns of RuleFit.table."""
    return fit.table(level)


__all__ = [
    "DESIGNED", "LENGTH_LABEL", "NEW_SOURCES", "NOT_VALID", "OLS", "THESE_SOURCES", "RuleFit",
    "Mundlak", "PaperFit", "RankError", "RunsError", "Standardizer", "assemble",
    "baseline_comparison", "baseline_slopes", "fit_paper", "fit_pooled", "fit_rule", "holm",
    "mundlak", "ols", "one_per_set", "share_matrix", "sign_flags", "transfer_slope", "univariate",
    "vif",
]
