"""From the ledger to a rule: every estimator of the study under one name.

`fit_within` is the main estimator; the others stand beside it (statistics.md, section 3).
"""

from .mundlak import Mundlak, mundlak
from .ols import OLS, RankError, ols, vif
from .paper_fit import NOT_VALID, PaperFit, fit_paper
from .runs import (
    DESIGNED,
    RunsError,
    Standardisation,
    assemble,
    one_per_set,
    share_matrix,
)
from .screens import (
    baseline_comparison,
    baseline_slopes,
    holm,
    sign_flags,
    transfer_slope,
    univariate,
)
from .within import (
    LENGTH_LABEL,
    NEW_SOURCES,
    THESE_SOURCES,
    Fit,
    fit_pooled,
    fit_within,
)

__all__ = [
    "DESIGNED", "LENGTH_LABEL", "NEW_SOURCES", "NOT_VALID", "OLS", "THESE_SOURCES", "Fit",
    "Mundlak", "PaperFit", "RankError", "RunsError", "Standardisation", "assemble",
    "baseline_comparison", "baseline_slopes", "fit_paper", "fit_pooled", "fit_within", "holm",
    "mundlak", "ols", "one_per_set", "share_matrix", "sign_flags", "transfer_slope", "univariate",
    "vif",
]
