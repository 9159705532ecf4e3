"""Simulated studies: what the paper's design can't see, and whether our inference keeps its word.

The figures that must hold, and the command that makes their table, are in `acceptance`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr, ttest_ind
from scipy.stats import t as student
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining_core.config import COLUMNS
from instructmining_core.regression.inference import deletion_maps, effective_dimensions
from instructmining_core.regression.paper_rule import SubsetSearch
from instructmining_core.regression.permutation import permutation
from instructmining_core.regression.planner import half_widths, sigma_band
from instructmining_core.regression.rule import LEVEL, residualise, slope_map, vif
from instructmining_core.selection.contrasts import ALPHA, BOUNDS, crossed_interval

from ..paper import RUNS, SET_SIZE
from .worlds import BETWEEN, N_RUNS, NOISE_SD, SOURCE_SD, Design, outcomes, two_designs

TERMS = 4  # of the paper's rule
PROMPTS = 80  # of an evaluation set
# sd of a loss of 2 nats: between prompts, what a method does to a prompt, and the rest
PROMPT_SD, INTERACTION_SD, REST_SD = 0.4, 0.05, 0.05


def null_r2(n_sources: int, n_studies: int, seed: int) -> pd.DataFrame:
    """The paper's design and procedure where no indicator has any effect, only the sources differ.

    One row a study: study, n_sources, r2 (of the chosen terms), all_significant (every chosen
    p < 0.05), repeat_rank_correlation (of the rankings that this study and its repeat, new draws
    from the same sources, give to 50 new sources), first_three (share of the variance of the set
    means in three components), vif (median). Losses are log losses.
    """
    rng = np.random.default_rng(seed)
    one = np.ones((RUNS, 1))
    rows = []
    for study in range(n_studies):
        effects = rng.normal(0, SOURCE_SD, n_sources)
        strangers = rng.normal(0, BETWEEN, (50, len(COLUMNS)))
        means, rankings, first = _source_means(n_sources, rng), [], None
        for _ in range(2):
            shares, X = _fusion_means(means, rng)
            y = shares @ effects + rng.normal(0, NOISE_SD, RUNS)
            search = SubsetSearch(X, one, TERMS, smaller=True)
            choice = search.choose(y[:, None])
            members = search.members(choice.subset[0])
            rankings.append(strangers[:, members] @ choice.beta[0, : len(members)])
            first = first or (choice, X)
        choice, X = first
        rows.append({
            "study": study, "n_sources": n_sources, "r2": float(choice.r2[0]),
            "all_significant": bool(np.nanmax(choice.p[0]) < 0.05),
            "repeat_rank_correlation": float(spearmanr(*rankings)[0]),
            "first_three": effective_dimensions(X)["first_three"],
            "vif": float(np.median(vif(X))),
        })
    return pd.DataFrame(rows)


def _source_means(n_sources: int, rng: np.random.Generator) -> np.ndarray:
    """Means of the sources, (S, 9), correlated by three common factors."""
    p = len(COLUMNS)
    loadings = rng.normal(size=(3, p)) * 0.6
    means = rng.normal(size=(n_sources, 3)) @ loadings + rng.normal(size=(n_sources, p))
    return means * BETWEEN / np.sqrt((loadings**2).sum(axis=0) + 1)


def _fusion_means(means: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shares (n, S) and set means (n, 9) of the paper's design, its rows normal."""
    r = rng.uniform(size=(RUNS, len(means)))
    shares = r / r.sum(axis=1, keepdims=True)
    return shares, shares @ means + rng.normal(size=(RUNS, len(COLUMNS))) / np.sqrt(SET_SIZE)


def pure_noise(n_studies: int, seed: int) -> pd.DataFrame:
    """No effect of anything, nine correlated indicators: r2 and any_significant by study."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(3, len(COLUMNS)))
    X = rng.normal(size=(RUNS, 3)) @ loadings + rng.normal(size=(RUNS, len(COLUMNS)))
    choice = SubsetSearch(X, np.ones((RUNS, 1)), TERMS).choose(rng.normal(size=(RUNS, n_studies)))
    return pd.DataFrame({"r2": choice.r2, "any_significant": (choice.p < 0.05).any(axis=1)})


def hc3_studies(X: np.ndarray, controls: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Slopes and HC3 half-widths of many outcomes on one design, both (p, B); Y : (n, B)."""
    A = slope_map(X, controls)
    full = np.hstack([controls, X])
    E = residualise(Y, full)
    # the trace of the residual projector, and with it leverage, holds for controls short of rank
    hat = 1 - np.diag(residualise(np.eye(len(X)), full))
    df = len(X) - np.linalg.matrix_rank(full)
    variance = A**2 @ (E / np.maximum(1 - hat, 1e-9)[:, None]) ** 2
    return A @ Y, student.ppf(0.5 + LEVEL / 2, df) * np.sqrt(variance)


def jackknife_studies(made: Design, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and delete-one-source half-widths of many outcomes, both (p, B)."""
    S = made.shares.shape[1]
    beta = slope_map(made.X, made.shares) @ Y
    gaps = deletion_maps(made.shares, made.X) @ Y - beta
    se = np.sqrt((S - 1) / S * (gaps**2).sum(axis=0))
    return beta, student.ppf(0.5 + LEVEL / 2, S - 1) * se


def design_comparison(n_designs: int, n_studies: int, seed: int) -> pd.DataFrame:
    """True example-level effects beside source effects: which design finds them?

    One row a study and design ("fusion, paper's procedure", "fusion, nine terms", "fusion with
    shares", "designed with shares"): rank_correlation of the fitted with the true score on the
    rows of an unseen source; half_width, median over the nine slopes, HC3, in log loss per sd;
    coverage, share of the nine 95 % intervals that hold the true slope (NaN after a choice).
    """
    found = []
    for d in range(n_designs):
        tilted, fused, rows = two_designs(seed + d)
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
    search = SubsetSearch(made.X, np.ones((len(made.X), 1)), TERMS, smaller=True)
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


def coverage(n_designs: int, n_studies: int, seed: int) -> pd.DataFrame:
    """Shares of 95 % intervals that hold the truth, one row a design.

    hc3 : even noise;
    hc3_uneven : the noise sd runs fourfold, from half to twice, with the first indicator;
    hc3_rows : rows differ too, three times as much over sets as seeds do;
    jackknife : slopes vary over sources with sd 0.01, the target is their mean in new sources.
    """
    rows = []
    for d in range(n_designs):
        made, _, _ = two_designs(seed + d)
        rng = np.random.default_rng([seed, d, 1])
        uneven = NOISE_SD * 2 ** np.linspace(-1, 1, N_RUNS)[made.X[:, 0].argsort().argsort()]
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


def permutation_size(n_designs: int, n_studies: int, seed: int,
                     n_permutations: int) -> pd.DataFrame:
    """Rejections at 5 % where no indicator matters: one row a study, one column a test.

    h0b, h0a : only the sources differ; rows_plain, rows_counted : rows differ as well, three times
    as much over sets as seeds do, and H0b is tested without and with the shared rows counted.
    """
    found = []
    for d in range(n_designs):
        made, _, _ = two_designs(seed + d)
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


def planner_band(n_studies: int, seed: int) -> pd.DataFrame:
    """Does the planner's 80 % band hold the half-width that the study then has?

    One row a study: classical (half-width by the residual variance, as planned) and hc3, each the
    share of the nine slopes whose half-width lies in the band; the pilot is 4 sets × 3 seeds.
    """
    rows = []
    per_design = 50
    for d in range(max(1, n_studies // per_design)):
        made, _, _ = two_designs(seed + d)
        rng = np.random.default_rng([seed, d, 3])
        full = np.hstack([made.shares, made.X])
        p, df = made.X.shape[1], N_RUNS - full.shape[1]
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


def simulate_gate(studies: int, seed: int, *, effect: float = 0.0, runs: int = 10,
                  draw_sd: float = 0.01, pools: int = 1) -> dict[str, float]:
    """Shares of the gate's verdicts over simulated comparisons in log loss (0.01 is 1 %).

    effect : of selected minus random, the same in all pools; runs : a side; draw_sd : between
    random draws, beyond the seed; pools : how many share Holm's correction.
    Returns `better` (one given pool is called better), `any_better` (at least one pool is),
    `worse`, `equal` (within ±1 %), and `covered` (the interval holds the effect), all in [0, 1].
    """
    rng = np.random.default_rng(seed)
    shape = (studies, pools)
    selected = effect + rng.normal(0, NOISE_SD, (*shape, runs))
    random = rng.normal(0, np.hypot(NOISE_SD, draw_sd), (*shape, runs))
    difference = selected.mean(-1) - random.mean(-1)
    welch = CompareMeans(*(DescrStatsW(side.reshape(-1, runs).T) for side in (selected, random)))
    p = welch.ttest_ind(usevar="unequal")[1].reshape(shape)
    p_margin = welch.ttost_ind(*BOUNDS, usevar="unequal")[0].reshape(shape)
    significant = holm_rows(p) < ALPHA
    better = significant & (difference < 0)
    p_effect = welch.ttest_ind(usevar="unequal", value=effect)[1].reshape(shape)
    return {
        "better": float(better[:, 0].mean()),
        "any_better": float(better.any(1).mean()),
        "worse": float((significant & (difference > 0))[:, 0].mean()),
        "equal": float(((holm_rows(p_margin) < ALPHA) & ~significant)[:, 0].mean()),
        "covered": float((p_effect[:, 0] > ALPHA).mean()),
    }


def holm_rows(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values in every row, as statsmodels' multipletests gives them one by one.

    p : (studies, pools); of ten thousand rows at once, where a call for each takes seconds
    """
    order = np.argsort(p, axis=1)
    stepped = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, axis=1), 1)
    return np.minimum(adjusted, 1)


def simulate_crossed(studies: int, seed: int) -> dict[str, float]:
    """Coverage of a zero difference when runs *and prompts* are drawn anew in each study.

    Returns `crossed`, the coverage of `crossed_interval`, and `runs_only`, that of the Welch
    interval, at 95 %.
    """
    rng = np.random.default_rng(seed)
    hits = np.zeros((studies, 2), bool)
    for i in range(studies):
        level = 2 + rng.normal(0, PROMPT_SD, PROMPTS)
        sides = []
        for _ in range(2):
            by_run = rng.normal(0, NOISE_SD, (10, 1))
            by_prompt = rng.normal(0, INTERACTION_SD, PROMPTS)
            sides.append(level + by_run + by_prompt + rng.normal(0, REST_SD, (10, PROMPTS)))
        low, high = crossed_interval(*sides)
        runs_only = ttest_ind(*(np.log(side.mean(1)) for side in sides), equal_var=False)
        hits[i] = low < 0 < high, runs_only.pvalue > ALPHA
    crossed, runs_only = hits.mean(0)
    return {"crossed": float(crossed), "runs_only": float(runs_only)}
