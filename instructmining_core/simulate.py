"""Simulated studies: what the paper's design can't see, and whether our inference keeps its word.

    python -m instructmining_core.simulate --full table.csv     # all acceptance figures, minutes
    python -m instructmining_core.simulate table.json           # the quick version, under a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from scipy.stats import t as student

from .held_out import deletion_maps
from .ols import residualise, slope_map
from .permutation import freedman_lane
from .planner import half_widths, sigma_band
from .simulated_null import PAPER_R2, null_r2, pure_noise
from .subset_search import SubsetSearch
from .subsets import designed_sets, fusion_sets
from .worlds import COLUMNS, NOISE_SD, Design, design, outcomes, synthetic_world

__all__ = ["PAPER_R2", "acceptance", "coverage", "design_comparison", "null_r2",
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
    """Shares of 95 % intervals that hold the truth, one row a design: hc3, hc3_uneven, jackknife.

    hc3_uneven : the noise sd runs fourfold, from half to twice, with the first indicator;
    jackknife : slopes vary over sources with sd 0.01, the target is their mean in new sources.
    """
    rows = []
    for d in range(n_designs):
        made, _, _ = two_designs(n_sources, seed + d, n_runs=n_runs)
        rng = np.random.default_rng([seed, d, 1])
        uneven = NOISE_SD * 2 ** np.linspace(-1, 1, n_runs)[made.X[:, 0].argsort().argsort()]
        row = {"design": d}
        for name, sd in (("hc3", NOISE_SD), ("hc3_uneven", uneven)):
            drawn = outcomes(made, n_studies, rng, noise_sd=sd)
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
    """Rejections at 5 % where only the sources differ: h0b and h0a, one row a study."""
    rows = []
    for d in range(n_designs):
        made, _, _ = two_designs(n_sources, seed + d, n_runs=n_runs)
        rng = np.random.default_rng([seed, d, 2])
        drawn = outcomes(made, n_studies, rng, slope_sd=0.0)
        for name, controls in (("h0b", made.shares), ("h0a", np.ones((n_runs, 1)))):
            search = SubsetSearch(made.X, controls)
            for b in range(n_studies):
                seen, null = freedman_lane(search, drawn.Y[:, b], n_permutations, rng)
                p = (1 + (null >= seen - 1e-12).sum()) / (1 + n_permutations)
                rows.append({"design": d, "study": b, "null": name, "reject": p <= 0.05})
    return (pd.DataFrame(rows).pivot(index=["design", "study"], columns="null", values="reject")
            .reset_index().rename_axis(columns=None))


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


def acceptance(full: bool = False, seed: int = 20261123) -> pd.DataFrame:
    """Every acceptance figure of statistics.md, sections 1, 4 and 5, as one table.

    Columns: figure, value, wanted (in words), low, high (bounds; NaN where only shown), passed.
    full : 2,000 studies and the like; else about a tenth of them.
    """
    k = 1 if full else 0
    rows: list[tuple] = []
    for s in (4, 8, 12):
        null = null_r2(s, (100, 1000)[k], seed)
        rows += [(f"median R² without any effect, {s} sources", null["r2"].median(), "shown"),
                 (f"every term 'significant', {s} sources", null["all_significant"].mean(),
                  "shown"),
                 (f"rank correlation of two repeats, {s} sources",
                  null["repeat_rank_correlation"].median(), "shown"),
                 (f"variance in three components, {s} sources", null["first_three"].median(),
                  "shown"),
                 (f"median VIF, {s} sources", null["vif"].median(), "shown")]
    noise = pure_noise((300, 2000)[k], seed)
    rows += [("median R² of the best four, no effect of anything", noise["r2"].median(), "shown"),
             ("a 'significant' term, no effect of anything", noise["any_significant"].mean(),
              "shown")]
    covered = coverage((8, 20)[k], (50, 100)[k], seed).mean()
    rows += [("HC3 coverage, even noise", covered["hc3"], (0.94, 0.98)),
             ("HC3 coverage, noise fourfold", covered["hc3_uneven"], (0.90, 1.0)),
             ("jackknife coverage, slopes vary over sources", covered["jackknife"], (0.93, 0.99))]
    size = permutation_size((4, 20)[k], (25, 50)[k], seed,
                            n_permutations=(99, 199)[k]).mean()
    rows += [("H0b rejects, only sources differ", size["h0b"], (0.03, 0.07)),
             ("H0a rejects, only sources differ", size["h0a"], (0.90, 1.0))]
    both = design_comparison(n_designs=(6, 20)[k], n_studies=(10, 20)[k], seed=seed)
    median = both.groupby("design")[["rank_correlation", "half_width"]].median()
    tilted = median.loc["designed with shares"]
    rows.append(("rank correlation with the true score, unseen source: designed with shares",
                 tilted["rank_correlation"], (0.85, 1.0)))
    for name in ("fusion, paper's procedure", "fusion, nine terms", "fusion with shares"):
        rows.append((f"rank correlation with the true score, unseen source: {name}",
                     median.loc[name, "rank_correlation"], "shown"))
    rows += [("half-width, designed / fusion with shares",
              tilted["half_width"] / median.loc["fusion with shares", "half_width"], (0, 0.25)),
             ("half-width, designed / fusion, nine terms",
              tilted["half_width"] / median.loc["fusion, nine terms", "half_width"], "shown")]
    band = planner_band((200, 500)[k], seed).mean()
    rows += [("planner's 80 % band holds the half-width", band["classical"], (0.75, 0.85)),
             ("the same, half-width by HC3", band["hc3"], "shown")]
    return _accepted(rows)


def _accepted(rows: Sequence[tuple]) -> pd.DataFrame:
    frame = []
    for name, value, wanted in rows:
        low, high = wanted if isinstance(wanted, tuple) else (np.nan, np.nan)
        words = wanted if isinstance(wanted, str) else f"{low:g} to {high:g}"
        passed = None if isinstance(wanted, str) else bool(low <= value <= high)
        frame.append({"figure": name, "value": float(value), "wanted": words, "low": low,
                      "high": high, "passed": passed})
    return pd.DataFrame(frame)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the acceptance table to a CSV or JSON file; exit status 1 where a figure fails."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to write, .csv or .json")
    parser.add_argument("--full", action="store_true", help="all studies (minutes)")
    parser.add_argument("--seed", type=int, default=20261123)
    options = parser.parse_args(argv)
    table = acceptance(options.full, options.seed)
    if options.out.endswith(".json"):
        table.to_json(options.out, orient="records", indent=2, force_ascii=False)
    else:
        table.to_csv(options.out, index=False)
    return int(table["passed"].eq(False).any())


if __name__ == "__main__":
    raise SystemExit(main())
