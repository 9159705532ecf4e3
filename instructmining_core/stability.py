"""How firm a fit stands: seed variance, choice under the bootstrap, collinearity, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2
from scipy.stats import f as fisher

from .intervals import sd_ratio_interval
from .ols import residualise
from .runs import DESIGNED, RunsError, Standardisation, pick_arms, share_matrix, standardised
from .subset_search import NEAR_BEST, SubsetSearch
from .within import Fit


@dataclass(frozen=True)
class SeedVariance:
    """sd of the outcome between seeds of one set, with χ² bounds on df degrees of freedom."""

    sd: float
    df: int
    low: float
    high: float


def seed_variance(runs: pd.DataFrame, *, level: float = 0.95,
                  outcome: str = "log_loss") -> SeedVariance:
    """From sets that were run on several seeds: the pooled sd inside a set_id.

    8 anchors on 3 seeds give 16 degrees of freedom, a pilot of 4 sets on 3 seeds gives 8.
    """
    groups = runs.groupby("set_id")[outcome]
    repeated = groups.transform("size") > 1
    if not repeated.any():
        raise RunsError("no set was run on more than one seed: add anchors (subsets.anchors)")
    part = runs[repeated]
    gaps = part[outcome] - part.groupby("set_id")[outcome].transform("mean")
    df = int(len(part) - part["set_id"].nunique())
    total = float((gaps**2).sum())
    tail = (1 - level) / 2
    return SeedVariance(np.sqrt(total / df), df, np.sqrt(total / chi2.ppf(1 - tail, df)),
                        np.sqrt(total / chi2.ppf(tail, df)))


def lack_of_fit(fit: Fit, seeds: SeedVariance) -> dict[str, float]:
    """F test of the fit's residual variance over the seed variance: is a line enough?

    ratio : residual sd / seed sd, with ratio_low and ratio_high (95 %, from F); f, df1, df2,
    p : one-sided.
    """
    ratio = float(fit.ols.sigma / seeds.sd)
    low, high = sd_ratio_interval(ratio, fit.ols.df, seeds.df)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "f": ratio**2,
            "df1": fit.ols.df, "df2": seeds.df,
            "p": float(fisher.sf(ratio**2, fit.ols.df, seeds.df))}


def bootstrap_choice(runs: pd.DataFrame, columns: Sequence[str],
                     standardisation: Standardisation | None = None, *, n: int = 1000,
                     size: int = 4, seed: int = 0, shares: bool = True,
                     near: float = NEAR_BEST, arms: Sequence[str] | None = DESIGNED,
                     outcome: str = "log_loss") -> pd.DataFrame:
    """How often the procedure chooses each indicator when the runs are drawn again.

    By column: frequency (share of n draws), sign_positive (share of its choices with a slope
    above 0). `.attrs["sets"]` counts whole choices. shares=False: the paper's procedure.
    """
    runs = pick_arms(runs, arms)
    X = standardised(runs, columns, standardisation)
    y = runs[outcome].to_numpy(float)
    controls = share_matrix(runs)[0] if shares else np.ones((len(X), 1))
    rng = np.random.default_rng(seed)
    chosen, positive, sets = np.zeros(X.shape[1]), np.zeros(X.shape[1]), {}
    for _ in range(n):
        draw = rng.integers(len(X), size=len(X))
        search = SubsetSearch(X[draw], controls[draw][:, controls[draw].any(axis=0)], size,
                              smaller=True)
        choice = search.choose(y[draw][:, None], near)
        members = search.members(choice.subset[0])
        chosen[members] += 1
        positive[members] += choice.beta[0, : len(members)] > 0
        name = ", ".join(columns[i] for i in members)
        sets[name] = sets.get(name, 0) + 1
    frame = pd.DataFrame({"frequency": chosen / n,
                          "sign_positive": positive / np.maximum(chosen, 1)}, list(columns))
    frame.loc[chosen == 0, "sign_positive"] = np.nan
    frame.attrs["sets"] = dict(sorted(sets.items(), key=lambda item: -item[1]))
    return frame


def effective_dimensions(X: np.ndarray, controls: np.ndarray | None = None) -> pd.Series:
    """How many directions the set means really vary in, beside `controls` (default: a constant).

    participation : (Σλ)²/Σλ² of the covariance's eigenvalues; for_99 : components that hold
    99 % of the variance; first_three : their share; condition : sqrt(largest/smallest λ).
    """
    X = np.asarray(X, float)
    left = residualise(X, np.ones((len(X), 1)) if controls is None else controls)
    values = np.linalg.svd(left, compute_uv=False) ** 2
    shares = np.cumsum(values) / values.sum()
    return pd.Series({
        "participation": values.sum() ** 2 / (values**2).sum(),
        "for_99": int(np.searchsorted(shares, 0.99) + 1),
        "first_three": shares[min(2, len(shares) - 1)],
        "condition": np.sqrt(values[0] / values[-1]) if values[-1] > 0 else np.inf,
    })


def residual_page(fit: Fit) -> pd.DataFrame:
    """One row a run: fitted, residual, studentised, leverage, cook, and set_id, arm, source.

    A page to look at; no run is dropped for what it shows.
    """
    labels = fit.runs[[c for c in ("set_id", "arm", "source") if c in fit.runs]]
    return labels.assign(fitted=fit.ols.fitted, residual=fit.ols.residuals,
                         studentised=fit.ols.studentised(), leverage=fit.ols.leverage,
                         cook=fit.ols.cook())
