"""The figures that our inference must keep, by simulation, and the command that makes their table.

    python -m bench.acceptance --full table.csv   # all of them, ten minutes
    python -m bench.acceptance table.json         # the quick version, a minute

Statistical plan, sections 1, 4, 5 and 6. Where ours differ from the plan's, both are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from instructmining.tables import null_r2

from . import studies


@dataclass(frozen=True)
class Size:
    """How many simulated studies each figure rests on."""

    null: int = 100
    noise: int = 300
    designs: int = 6
    studies: int = 20
    permutations: int = 99
    band: int = 200
    gate: int = 2_000


FULL = Size(1000, 2000, 20, 50, 199, 500, 20_000)
Row = tuple[str, float, tuple[float, float] | None, str]  # figure, value, bounds, the plan's value


def table(size: Size, seed: int = 20261123) -> pd.DataFrame:
    """One row a figure: figure, value, wanted (in words), passed (None where only shown), plan."""
    return judged([*_blind(size, seed), *_levels(size, seed), *_designs(size, seed),
                   *_gate(size, seed)])  # fmt: skip


def judged(rows: Sequence[Row]) -> pd.DataFrame:
    """The table of `table`, from (figure, value, bounds or None, the plan's value)."""
    frame = []
    for name, value, bounds, plan in rows:
        wanted = f"{bounds[0]:g} to {bounds[1]:g}" if bounds else "shown"
        passed = bool(bounds[0] <= value <= bounds[1]) if bounds else None
        frame.append({"figure": name, "value": round(float(value), 3), "wanted": wanted,
                      "passed": passed, "plan": plan})  # fmt: skip
    return pd.DataFrame(frame)


def _blind(size: Size, seed: int) -> list[Row]:
    """Section 1: what mixtures of few sources find where no example matters."""
    rows: list[Row] = []
    plans = {4: ("0.993", "65"), 8: ("0.90", "13"), 12: ("0.84", "4.5")}
    for s, (three, vif) in plans.items():
        null = null_r2(s, size.null, seed)
        rows += [
            (f"median R² without any effect, {s} sources", null["r2"].median(), None,
             "0.27-0.60" if s == 4 else ""),
            (f"every term 'significant', {s} sources", null["all_significant"].mean(), None,
             "0.82-0.98" if s == 4 else ""),
            (f"rank correlation of two repeats, {s} sources",
             null["repeat_rank_correlation"].median(), None, "0.25" if s == 4 else ""),
            (f"variance in three components, {s} sources", null["first_three"].median(), None,
             three),
            (f"median VIF, {s} sources", null["vif"].median(), None, vif),
        ]  # fmt: skip
    noise = studies.pure_noise(size.noise, seed)
    return [
        *rows,
        ("median R² of the best four, no effect of anything", noise["r2"].median(), None, "0.06"),
        ("a 'significant' term, no effect of anything", noise["any_significant"].mean(), None,
         "0.44"),
    ]  # fmt: skip


def _levels(size: Size, seed: int) -> list[Row]:
    """Section 4: coverage of the intervals and size of the permutation test."""
    covered = studies.coverage(size.designs, 2 * size.studies, seed).mean()
    level = studies.permutation_size(size.designs, size.studies, seed, size.permutations).mean()
    return [
        ("HC3 coverage, even noise", covered["hc3"], (0.94, 0.98), ""),
        ("HC3 coverage, noise fourfold", covered["hc3_uneven"], (0.90, 1.0), ""),
        ("jackknife coverage, slopes vary over sources", covered["jackknife"], (0.93, 0.99), ""),
        ("H0b rejects, only sources differ", level["h0b"], (0.03, 0.07), ""),
        ("H0a rejects, only sources differ", level["h0a"], (0.90, 1.0), ""),
        ("H0b rejects, rows differ too: runs taken as unrelated", level["rows_plain"], None,
         "not in it"),
        ("H0b rejects, rows differ too: shared rows counted", level["rows_counted"],
         (0.0, 0.07), "not in it"),
        ("HC3 coverage, rows differ too", covered["hc3_rows"], (0.90, 1.0), "not in it"),
    ]  # fmt: skip


def _designs(size: Size, seed: int) -> list[Row]:
    """Sections 1, 4 and 5: what the designed arm gains, and the planner's band."""
    both = studies.design_comparison(size.designs, size.studies, seed)
    median = both.groupby("design")[["rank_correlation", "half_width"]].median()
    width = median["half_width"]
    rank = "rank correlation with the true score, unseen source"
    band = studies.planner_band(size.band, seed).mean()
    plans = {"fusion, paper's procedure": "0.39"}
    return [
        (f"{rank}: designed with shares",
         median.loc["designed with shares", "rank_correlation"], (0.85, 1.0), "0.93"),
        *[(f"{rank}: {name}", median.loc[name, "rank_correlation"], None, plans.get(name, ""))
          for name in ("fusion, paper's procedure", "fusion, nine terms", "fusion with shares")],
        ("half-width, designed / fusion with shares",
         width["designed with shares"] / width["fusion with shares"], (0, 0.25), "0.125"),
        ("half-width, designed / fusion, nine terms",
         width["designed with shares"] / width["fusion, nine terms"], None, ""),
        ("planner's 80 % band holds the half-width", band["classical"], (0.75, 0.85), ""),
        ("the same, half-width by HC3", band["hc3"], None, ""),
    ]  # fmt: skip


def _gate(size: Size, seed: int) -> list[Row]:
    """Section 6: the beat-random gate, `size.gate` simulated comparisons a figure."""

    def rate(name: str, **design: float) -> float:
        return studies.simulate_gate(size.gate, seed, **design)[name]

    crossed = studies.simulate_crossed(max(size.gate // 10, 100), seed)
    return [
        ("gate: false better, 10 v 10", rate("better"), (0.0, 0.035), ""),
        ("gate: false better in any of 3 pools, 10 v 10", rate("any_better", pools=3),
         (0.0, 0.035), ""),
        ("gate: false better, 5 v 5, draws 3 × noisier", rate("better", runs=5, draw_sd=0.03),
         (0.0, 0.035), ""),
        ("gate: power at 1.6 seed sd, 10 v 10", rate("better", effect=-0.016), (0.75, 1.0), ""),
        ("gate: the same under Holm over 3 pools", rate("better", effect=-0.016, pools=3), None,
         ""),
        ("gate: coverage of 95 % intervals, 10 v 10", rate("covered", effect=-0.016),
         (0.94, 0.96), ""),
        ("gate: coverage, new prompts, crossed", crossed["crossed"], (0.93, 0.99), ""),
        ("gate: coverage, new prompts, runs only", crossed["runs_only"], None, ""),
    ]  # fmt: skip


def command(argv: Sequence[str] | None = None) -> int:
    """Write the acceptance table to a CSV or JSON file; exit status 1 where a figure fails."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to write, .csv or .json")
    parser.add_argument("--full", action="store_true", help="all studies (minutes)")
    parser.add_argument("--seed", type=int, default=20261123)
    options = parser.parse_args(argv)
    found = table(FULL if options.full else Size(), options.seed)
    if options.out.endswith(".json"):
        found.to_json(options.out, orient="records", indent=2, force_ascii=False)
    else:
        found.to_csv(options.out, index=False)
    return int(found["passed"].eq(False).any())


if __name__ == "__main__":
    raise SystemExit(command())
