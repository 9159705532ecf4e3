"""Simulated studies: what the paper's design can't see, and whether our inference keeps its word.

The figures that must hold, and the command that makes their table, are in `acceptance`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from scipy.stats import t as student

from .held_out import deletion_maps
from .ols import residualise, slope_map
from .permutation import permutation
from .planner import half_widths, sigma_band
from .simulated_null import PAPER_R2, null_r2, pure_noise
from .subset_search import SubsetSearch
from .subsets import designed_sets, fusion_sets
from .worlds import COLUMNS, NOISE_SD, Design, design, outcomes, synthetic_world

__all__ = ["PAPER_R2", "coverage", "design_comparison", "null_r2",
           "permutation_size", "planner_band", "pure_noise", "two_designs"]


def two_designs(n_sources: int, seed: int, *, n_runs: int = 80, size: int = 400,
                rows: int = 1000) -> tuple[Design, Design, np.ndarray]:
    """Designed arm and fusion of the same number of runs, and an unseen source's rows (r, 9).

    70 % of the designed runs are within-source sets, the rest mixed, as in `laptop` (56 + 24).
    """
    world = synthetic_world(n_sources + 1, rows, seed)
    stranger = world["source"].eq(world["source"].iloc[-1])
    pool = world[~stranger]
    n_within = round(0.7 * n_runs / 2) * 2
    sets = designed_sets(pool, pool, n_within, n_runs - n_within, size, seed=seed,
                         columns=COLUMNS, min_sources=1)
    mixed = fusion_sets(pool, n_runs, size, seed, on_short="redraw")
    return (design(sets, pool), design(mixed, pool),
            world.loc[stranger, list(COLUMNS)].to_numpy(float))


def hc3_studies(X: np.ndarray, controls: np.ndarray, Y: np.ndarray,
                level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and HC3 half-widths of many outcomes on one design, both (p, B); Y : (n, B)."""
    A = slope_map(X, controls)
    full = np.hstack([controls, X])
    E = residualise(Y, full)
    # the trace of the residual projector, and with it leverage, holds for controls short of rank
    hat = 1 - np.diag(residualise(np.eye(len(X)), full))
    df = len(X) - np.linalg.matrix_rank(full)
    variance = A**2 @ (E / np.maximum(1 - hat, 1e-9)[:, None]) ** 2
    return A @ Y, student.ppf(0.5 + level / 2, df) * np.sqrt(variance)


def design_comparison(n_sources: int = 12, n_designs: int = 20, n_studies: int = 20,
                      seed: int = 0, *, n_runs: int = 80, size: int = 400) -> pd.DataFrame:
    """True example-level effects beside source effects: which design finds them?

    One row a study and design ("fusion, paper's procedure", "fusion, nine terms", "fusion with
    shares", "designed with shares"): rank_correlation of the fitted with the true score on the
    rows of an unseen source; half_width, median over the nine slopes, HC3, in log loss per sd;
    coverage, share of the nine 95 % intervals that hold the true slope (NaN after a choice).
    """
    found = []
    for d in range(n_designs):
        tilted, fused, rows = two_designs(n_sources, seed + d, n_runs=n_runs, size=size)
        rng = np.random.default_rng([seed, d])
        for name, made, shares in (("fusion, nine terms", fused, False),
                                   ("fusion with shares", fused, True),
                                   ("designed with shares", tilted, True)):
            drawn = outcomes(made, n_studies, rng)
            controls = made.shares if shares else np.ones((len(made.X), 1))
            beta, half = hc3_studies(made.X, controls, drawn.Y)
            covered = np.abs(beta - drawn.slopes) <= half
            found.append(_compared(name, d, rows, beta, drawn.slopes, np.median(half, axis=0),
                                   covered.mean(axis=0)))
            if name == "fusion, nine terms":
                found.append(_paper_choice(made, drawn, rows, d))
    return pd.concat(found, ignore_index=True)


def _paper_choice(made, drawn, rows, d) -> pd.DataFrame:
    search = SubsetSearch(made.X, np.ones((len(made.X), 1)), 4, smaller=True)
    choice = search.choose(drawn.Y)
    beta = np.zeros_like(drawn.slopes)
    for b, g in enumerate(choice.subset):
        members = search.members(g)
        beta[members, b] = choice.beta[b, : len(members)]
    nan = np.full(len(choice.r2), np.nan)
    return _compared("fusion, paper's procedure", d, rows, beta, drawn.slopes, nan, nan)


def _compared(name, d, rows, beta, slopes, half, covered) -> pd.DataFrame:
    ranks = [spearmanr(rows @ b, rows @ s)[0] for b, s in zip(beta.T, slopes.T, strict=True)]
    return pd.DataFrame({"design": name, "world": d, "rank_correlation": ranks,
                         "half_width": half, "coverage": covered})


def coverage(n_designs: int, n_studies: int, seed: int, *, n_sources: int = 12,
             n_runs: int = 80) -> pd.DataFrame:
    """Shares of 95 % intervals that hold the truth, one row a design.

    hc3 : even noise;

    hc3_uneven : the noise sd runs fourfold, from half to twice, with the first indicator;
    hc3_rows : rows differ too, three times as much over sets as seeds do;
    jackknife : slopes vary over sources with sd 0.01, the target is their mean in new sources.
    """
    rows = []
    for d in range(n_designs):
        made, _, _ = two_designs(n_sources, seed + d, n_runs=n_runs)
        rng = np.random.default_rng([seed, d, 1])
        uneven = NOISE_SD * 2 ** np.linspace(-1, 1, n_runs)[made.X[:, 0].argsort().argsort()]
        row = {"design": d}
        for name, noise in (("hc3", {"noise_sd": NOISE_SD}), ("hc3_uneven", {"noise_sd": uneven}),
                            ("hc3_rows", {"noise_sd": NOISE_SD / 3, "rows_sd": NOISE_SD})):
            drawn = outcomes(made, n_studies, rng, **noise)
            beta, half = hc3_studies(made.X, made.shares, drawn.Y)
            row[name] = float((np.abs(beta - drawn.slopes) <= half).mean())
        drawn = outcomes(made, n_studies, rng, slope_spread=0.01)
        beta, half = jackknife_studies(made, drawn.Y)
        row["jackknife"] = float((np.abs(beta - drawn.slopes) <= half).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def jackknife_studies(made: Design, Y: np.ndarray,
                      level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and delete-one-source half-widths of many outcomes, both (p, B)."""
    S = made.shares.shape[1]
    beta = slope_map(made.X, made.shares) @ Y
    gaps = deletion_maps(made.shares, made.X) @ Y - beta
    se = np.sqrt((S - 1) / S * (gaps**2).sum(axis=0))
    return beta, student.ppf(0.5 + level / 2, S - 1) * se


def permutation_size(n_designs: int, n_studies: int, seed: int, *, n_sources: int = 12,
                     n_runs: int = 80, n_permutations: int = 199) -> pd.DataFrame:
    """Rejections at 5 % where no indicator matters: one row a study, one column a test.

    h0b, h0a : only the sources differ; rows_plain, rows_counted : rows differ as well, three times
    as much over sets as seeds do, and H0b is tested without and with the shared rows counted.
    """
    found = []
    for d in range(n_designs):
        made, _, _ = two_designs(n_sources, seed + d, n_runs=n_runs)
        rng = np.random.default_rng([seed, d, 2])
        sources = outcomes(made, n_studies, rng, slope_sd=0.0).Y
        rows = outcomes(made, n_studies, rng, slope_sd=0.0, noise_sd=NOISE_SD / 3,
                        rows_sd=NOISE_SD).Y
        for b in range(n_studies):
            tests = {"h0b": (sources, "H0b", None), "h0a": (sources, "H0a", None),
                     "rows_plain": (rows, "H0b", None), "rows_counted": (rows, "H0b", made.rows)}
            p = {
                name: permutation(made.runs(Y[:, b]), COLUMNS, null=null, rows=held, arms=None,
                                  n_permutations=n_permutations, seed=seed + b).p
                for name, (Y, null, held) in tests.items()
            }
            found.append({"design": d, "study": b} | {name: p[name] <= 0.05 for name in p})
    return pd.DataFrame(found)


def planner_band(n_studies: int, seed: int, *, n_sources: int = 12,
                 n_runs: int = 80) -> pd.DataFrame:
    """Does the planner's 80 % band hold the half-width that the study then has?

    One row a study: classical (half-width by the residual variance, as planned) and hc3, each the
    share of the nine slopes whose half-width lies in the band; the pilot is 4 sets × 3 seeds.
    """
    rows = []
    per_design = 50
    for d in range(max(1, n_studies // per_design)):
        made, _, _ = two_designs(n_sources, seed + d, n_runs=n_runs)
        rng = np.random.default_rng([seed, d, 3])
        full = np.hstack([made.shares, made.X])
        p, df = made.X.shape[1], n_runs - full.shape[1]
        drawn = outcomes(made, per_design, rng)
        _, hc3 = hc3_studies(made.X, made.shares, drawn.Y)
        realised = np.sqrt((residualise(drawn.Y, full) ** 2).sum(axis=0) / df)
        unit = half_widths(full, 1.0)[-p:]
        pilot = NOISE_SD * np.sqrt(rng.chisquare(8, per_design) / 8)
        for b in range(per_design):
            low, high = sigma_band(pilot[b], 8, df)
            inside = (unit * low <= hc3[:, b]) & (hc3[:, b] <= unit * high)
            rows.append({"design": d, "classical": low <= realised[b] <= high,
                         "hc3": inside.mean()})
    return pd.DataFrame(rows)
