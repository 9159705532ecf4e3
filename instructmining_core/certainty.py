"""How sure each number of the rule is: tables that put an interval beside what has no slope."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .intervals import median_interval, r2_interval, r2_of, share_interval
from .paper import R_SQUARED
from .paper_fit import fit_paper
from .permutation import Permutation
from .runs import Standardisation, one_per_set, standardised
from .stability import effective_dimensions
from .within import Fit


def failure_table(null: pd.DataFrame) -> pd.DataFrame:
    """What simulated studies without any effect find (`simulate.null_r2`), with intervals.

    One row a number of sources: studies; the median R² and the median rank correlation of two
    repeats, bounds by order statistics; shares of studies that reach the paper's R² and in which
    every chosen term is "significant", bounds by Wilson.
    """
    rows = {}
    for sources, part in null.groupby("n_sources"):
        shares = {"R² as large as the paper's": part["r2"] >= R_SQUARED,
                  "every term “significant”": part["all_significant"]}  # fmt: skip
        medians = {"median R²": part["r2"],
                   "median rank correlation": part["repeat_rank_correlation"]}  # fmt: skip
        found = {n: (v.median(), *median_interval(v)) for n, v in medians.items()}
        found |= {n: (v.mean(), *share_interval(v.sum(), len(v))) for n, v in shares.items()}
        rows[sources] = {"studies": str(len(part))} | {
            name: f"{value:.2f} [{low:.2f}, {high:.2f}]"
            for name, (value, low, high) in found.items()
        }
    return pd.DataFrame(rows).T.rename_axis("sources")


def paper_table(
    runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation, size: int
) -> pd.DataFrame:
    """The paper's procedure on all arms at equal rows, and on its own design, fusion alone.

    One row a design and chosen term: estimate, low, high, p_paper, and the fit's r2 with r2_low
    and r2_high. All of it takes the choice as given: not valid after selection.
    """
    parts = []
    for name, arms in (("all arms", None), ("fusion, the paper's own design", ("fusion",))):
        sets = runs.loc[runs["arm"].isin(arms or set(runs["arm"])), "set_id"].nunique()
        if sets <= size + 2:  # smoke's two mixtures leave nothing to choose from
            continue
        found = fit_paper(runs, columns, constants, size=size, arms=arms)
        r2, low, high = r2_of(found.fit)
        part = found.table()[["estimate", "low", "high", "p_paper"]]
        parts.append(part.assign(design=name, runs=len(found.fit.runs), r2=r2, r2_low=low,
                                 r2_high=high).reset_index())  # fmt: skip
    return pd.concat(parts).set_index(["design", "column"])


def dimensions(runs: pd.DataFrame, fit: Fit) -> pd.DataFrame:
    """Effective dimensions of the rule's design beside its shares, and of fusion's."""
    found = {"designed sets, beside the source shares":
             effective_dimensions(fit.indicators, fit.controls)}  # fmt: skip
    fusion = one_per_set(runs[runs["arm"] == "fusion"])
    if len(fusion) > 2:
        means = standardised(fusion, fit.columns, fit.standardisation)
        found["fusion sets, the paper's design"] = effective_dimensions(means)
    return pd.DataFrame(found).T


def tests_table(tests: Sequence[Permutation], fit: Fit, size: int) -> pd.DataFrame:
    """The permutation tests with what belongs to them.

    One row a test: R² of the best `size` terms (where shared rows are counted, of the whitened
    runs), its bounds (these sources; the choice is taken as given, so the lower one is too high),
    the R² that 95 % of the permutations stay below, p and what the number of permutations leaves
    open of it (Wilson), and the share of the errors that belongs to rows.
    """
    rows = []
    for test in tests:
        spent = fit.controls.shape[1] if test.hypothesis == "H0b" else 1
        low, high = r2_interval(test.statistic, size, len(fit.runs) - spent - size)
        n = len(test.null)
        reached = int((test.null >= test.statistic - 1e-12).sum())
        p_low, p_high = share_interval(reached, n)
        rows.append({
            "hypothesis": test.meaning, "largest R²": test.statistic, "low": low, "high": high,
            "95 % of permutations below": np.quantile(test.null, 0.95), "p": test.p,
            "p low": p_low, "p high": p_high, "permutations": n,
            "share of rows": "not counted" if test.row_share is None else f"{test.row_share:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def choice_table(chosen: pd.DataFrame, draws: int) -> pd.DataFrame:
    """`inference.bootstrap_choice` with Wilson bounds of each frequency over `draws` draws."""
    bounds = [share_interval(f * draws, draws) for f in chosen["frequency"]]
    frame = chosen.copy()
    frame.insert(1, "low", [low for low, _ in bounds])
    frame.insert(2, "high", [high for _, high in bounds])
    return frame


def line_enough(found: dict[str, float]) -> str:
    """`inference.lack_of_fit` in one sentence."""
    said = ("more than seeds explain, so that the slopes are averages over what the line misses"
            if found["p"] < 0.05 else "no more than seeds explain")
    return (f"What the line leaves over has {found['ratio']:.1f} times the sd of a seed "
            f"[{found['ratio_low']:.1f}, {found['ratio_high']:.1f}], p = {found['p']:.2g}: {said}.")
