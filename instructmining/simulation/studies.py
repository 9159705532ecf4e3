"""Simulated studies: what the paper's design can't see, and whether our inference keeps its word.

The figures that must hold, and the command that makes their table, are in `acceptance`.

Simulated studies of the beat-random gate: how often it is wrong, how often it sees an effect.

Source: our statistical plan, section 6, which accepts at most 3.5 % false "better" and asks for a
power of 75 % at an effect of 1.6 seed standard deviations, 10 runs against 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr, ttest_ind
from scipy.stats import t as student
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining_core.finetuning.sets import designed_sets, fusion_sets
from instructmining_core.regression.inference import deletion_maps
from instructmining_core.regression.ols import residualise, slope_map
from instructmining_core.regression.paper_rule import SubsetSearch
from instructmining_core.regression.permutation import permutation
from instructmining_core.regression.planner import half_widths, sigma_band
from instructmining_core.selection.contrasts import BOUNDS, crossed_interval

from .null import PAPER_R2, null_r2, pure_noise
from .worlds import COLUMNS, NOISE_SD, Design, design, outcomes, synthetic_world


@dataclass(frozen=True)
class GateDesign:
    """One simulated comparison, in log loss (0.01 is 1 %).

    n_selected, n_random : runs a side; seed_sd : between seeds of one set; draw_sd : between
    random draws, beyond the seed; effect : log loss of selected minus random; pools : how many
    pools share Holm's correction, all with the same effect.
    """

    n_selected: int = 10
    n_random: int = 10
    seed_sd: float = 0.01
    draw_sd: float = 0.01
    effect: float = 0.0
    pools: int = 1


def simulate_gate(
    design: GateDesign, *, studies: int = 20_000, alpha: float = 0.05, seed: int = 0
) -> dict[str, float]:
    """Shares of verdicts over simulated studies.

    Returns `better` (one given pool is called better), `any_better` (at least one pool is),
    `worse`, `equal` (within ±1 %), and `covered` (the interval holds the effect), all in [0, 1].
    """
    rng = np.random.default_rng(seed)
    shape = (studies, design.pools)
    selected = design.effect + rng.normal(0, design.seed_sd, (*shape, design.n_selected))
    spread = np.hypot(design.seed_sd, design.draw_sd)
    random = rng.normal(0, spread, (*shape, design.n_random))
    difference = selected.mean(-1) - random.mean(-1)
    welch = CompareMeans(*(DescrStatsW(side.reshape(-1, side.shape[-1]).T)
                           for side in (selected, random)))
    p = welch.ttest_ind(usevar="unequal")[1].reshape(shape)
    p_margin = welch.ttost_ind(*BOUNDS, usevar="unequal")[0].reshape(shape)
    significant = _holm_rows(p) < alpha
    better = significant & (difference < 0)
    p_effect = welch.ttest_ind(usevar="unequal", value=design.effect)[1].reshape(shape)
    return {
        "better": float(better[:, 0].mean()),
        "any_better": float(better.any(1).mean()),
        "worse": float((significant & (difference > 0))[:, 0].mean()),
        "equal": float(((_holm_rows(p_margin) < alpha) & ~significant)[:, 0].mean()),
        "covered": float((p_effect[:, 0] > alpha).mean()),
    }


def _holm_rows(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, axis=1)
    stepped = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, axis=1), 1)
    return np.minimum(adjusted, 1)


def simulate_crossed(
    *,
    studies: int = 2_000,
    runs: int = 10,
    prompts: int = 80,
    run_sd: float = 0.01,
    prompt_sd: float = 0.4,
    interaction_sd: float = 0.05,
    rest_sd: float = 0.05,
    seed: int = 0,
) -> dict[str, float]:
    """Coverage of a zero difference when runs *and prompts* are drawn anew in each study.

    Standard deviations are of the loss in nats at a mean of 2. Returns `crossed`, the coverage of
    `crossed_interval`, and `runs_only`, that of the Welch interval, at 95 %.
    """
    rng = np.random.default_rng(seed)
    hits = np.zeros((studies, 2), bool)
    for i in range(studies):
        level = 2 + rng.normal(0, prompt_sd, prompts)
        sides = []
        for _ in range(2):
            by_run = rng.normal(0, run_sd, (runs, 1))
            by_prompt = rng.normal(0, interaction_sd, prompts)
            sides.append(level + by_run + by_prompt + rng.normal(0, rest_sd, (runs, prompts)))
        low, high = crossed_interval(*sides)
        runs_only = ttest_ind(*(np.log(side.mean(1)) for side in sides), equal_var=False)
        hits[i] = low < 0 < high, runs_only.pvalue > 0.05
    crossed, runs_only = hits.mean(0)
    return {"crossed": float(crossed), "runs_only": float(runs_only)}


def acceptance(*, studies: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """The table of the gate's acceptance figures: name, value, bound, accepted.

    `studies` simulated comparisons a line (a tenth of them for the crossed interval).
    """
    def rate(name: str, **design: float) -> float:
        return simulate_gate(GateDesign(**design), studies=studies, seed=seed)[name]

    crossed = simulate_crossed(studies=max(studies // 10, 100), seed=seed)
    unequal = {"n_selected": 5, "n_random": 5, "draw_sd": 0.03}
    lines = [
        ("false better, 10 v 10", rate("better"), 0.0, 0.035),
        ("false better in any of 3 pools, 10 v 10", rate("any_better", pools=3), 0.0, 0.035),
        ("false better, 5 v 5, draws 3 × noisier", rate("better", **unequal), 0.0, 0.035),
        ("power at 1.6 seed sd, 10 v 10", rate("better", effect=-0.016), 0.75, 1.0),
        ("the same under Holm over 3 pools", rate("better", effect=-0.016, pools=3), 0.0, 1.0),
        ("coverage of 95 % intervals, 10 v 10", rate("covered", effect=-0.016), 0.94, 0.96),
        ("coverage, new prompts, crossed", crossed["crossed"], 0.93, 0.99),
        ("coverage, new prompts, runs only", crossed["runs_only"], 0.0, 1.0),
    ]
    table = pd.DataFrame(lines, columns=["name", "value", "at_least", "at_most"])
    table["accepted"] = table["value"].between(table["at_least"], table["at_most"])
    return table


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
