"""What may be claimed from the runs: every inference of the study under one name.

statistics.md, section 4. Two kinds of interval, never mixed: "these sources" (HC3) and
"new sources" (delete-one-source jackknife).
"""

import pandas as pd

from .held_out import Jackknife, held_out, jackknife_sources, summary
from .ols import vif
from .permutation import Permutation, permutation
from .stability import (
    SeedVariance,
    bootstrap_choice,
    effective_dimensions,
    lack_of_fit,
    residual_page,
    seed_variance,
)
from .within import Fit

__all__ = [
    "Jackknife", "Permutation", "SeedVariance", "bootstrap_choice", "effective_dimensions", "hc3",
    "held_out", "jackknife_sources", "lack_of_fit", "permutation", "residual_page",
    "seed_variance", "summary", "vif",
]


def hc3(fit: Fit, level: float = 0.95) -> pd.DataFrame:
    """Intervals for these sources: HC3 with t(n − k); the columns of Fit.table."""
    return fit.table(level)
