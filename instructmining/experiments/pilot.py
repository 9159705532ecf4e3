"""A study planned by its pilot: the noise, the half-widths to come, the runs a target needs."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pandas as pd
from scipy.stats import chi2

from instructmining_core.regression.inference import SeedVariance, seed_variance
from instructmining_core.regression.planner import (
    REPLAN_EVERY,
    Precision,
    half_widths,
    plan_runs,
    replan,
)
from instructmining_core.regression.rule import RuleFit, fit_rule
from instructmining_core.regression.run_table import (
    DESIGNED,
    RankError,
    RunsError,
    Standardizer,
    pick_arms,
    share_matrix,
    standardised,
)

from ..study import PlannedRun, Study
from .comparisons import sweep_plans

PILOT_SETS, PILOT_SEEDS = 4, 3
ARMS = {"fusion": ("fusion",), "designed": DESIGNED}


def pilot_plans(study: Study) -> list[PlannedRun]:
    """4 anchors × 3 seeds of the study's own sweep, so that the sweep need not run them again.

    Fewer where the design has fewer anchors or seeds; [] where it repeats no set.
    """
    plans = sweep_plans(study)
    repeated = list(dict.fromkeys(p.label["set_id"] for p in plans if p.label["anchor"]))
    some = np.linspace(0, len(repeated) - 1, min(PILOT_SETS, len(repeated))).round().astype(int)
    names = {repeated[i] for i in some}
    return [p for p in plans if p.label["set_id"] in names and p.init_seed < PILOT_SEEDS]


def run_pilot(study: Study, *, progress: bool = True) -> SeedVariance | None:
    """Run the pilot (what the ledger holds is not run again); None where no set is repeated.

    The runs are the sweep's, under the sweep's own run ids; `runs/pilot.json` lists them.
    """
    plans = pilot_plans(study)
    if not plans:
        return None
    runs = study.run("sweep", plans, listed="pilot", progress=progress)
    return seed_variance(study.joined(runs))


def sweep_noise(study: Study) -> tuple[SeedVariance | None, RuleFit | None]:
    """What this profile's own sweep tells of the noise: between its anchors' seeds, and by its fit.

    None for what it can't tell yet, or where it has not been run.
    """
    if not study.has_own("runs/sweep.json"):
        return None, None
    runs, columns = study.sweep(), study.profile.rule_columns()
    seeds = fit = None
    with suppress(RunsError):
        seeds = seed_variance(runs)
    with suppress(RunsError):
        fit = fit_rule(runs, columns, Standardizer.fit(study.candidate_scores, columns))
    return seeds, fit


def assumed(sigma: float) -> SeedVariance:
    """A noise that was not measured, as uncertain as a pilot of 4 sets × 3 seeds would leave it."""
    df = PILOT_SETS * (PILOT_SEEDS - 1)
    low, high = sigma * np.sqrt(df / chi2.ppf([0.975, 0.025], df))
    return SeedVariance(sigma, df, float(low), float(high))


def noise_table(seeds: SeedVariance, fit: RuleFit | None = None) -> pd.DataFrame:
    """The noise by kind: sd of the log loss, df, 95 % bounds, and which one the plan uses.

    "between seeds" is what training the same set again changes; "left by the line" is the fit's
    residual sd, which also holds what a straight line in the set means misses. The second decides
    the half-widths; the first is its least possible value and all that a pilot can know.
    """
    rows = {"between seeds": seeds}
    if fit is not None:
        rows["left by the line"] = replan(SeedVariance(0.0, 0, 0.0, 0.0), fit)
    used = seeds if fit is None else replan(seeds, fit)
    marks = {(used.sd, used.df): "yes"}
    return pd.DataFrame(
        [{**vars(one), "used": marks.get((one.sd, one.df), "")} for one in rows.values()],
        index=list(rows),
    )


def arm_plan(study: Study, frame: pd.DataFrame, noise: SeedVariance, arm: str = "designed",
             every: int = REPLAN_EVERY) -> Precision:
    """The plan of one arm ("designed" or "fusion") for its first N sets, every `every` runs.

    frame : `Study.set_frame`. Half-widths are of 95 % intervals, log loss per sd of a row, with
    their 80 % band. Errors: RunsError where the design has no such sets.
    """
    columns = study.profile.rule_columns()
    order = running_order(study, frame, arm)
    if order.empty:
        raise RunsError(f"the design has no sets of the {arm} arm: there is nothing to plan")
    shares = share_matrix(order)[0]
    constants = Standardizer.fit(study.candidate_scores, columns)
    sizes = sorted({*range(every, len(order), every), len(order)})
    return plan_runs(shares, standardised(order, columns, constants), columns, noise, sizes)


def running_order(study: Study, frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The sets of one arm as a plan counts them, mixed by the design's seed."""
    rows = frame[frame["arm"].isin(ARMS[arm])]
    return rows.sample(frac=1.0, random_state=study.profile.design.seed)


def planned_half_widths(study: Study, frame: pd.DataFrame, noise: SeedVariance) -> pd.DataFrame:
    """Half-widths of the slopes that each arm would give, before its runs.

    Columns arm, runs, coefficient, half_width, low, high as in `Precision.table`; NaN where so few
    sets can't tell the indicators apart.
    """
    arms = [arm for arm, names in ARMS.items() if frame["arm"].isin(names).any()]
    table = pd.concat([arm_plan(study, frame, noise, arm).table.assign(arm=arm) for arm in arms],
                      ignore_index=True).replace(np.inf, np.nan)
    return table[["arm", "runs", "coefficient", "half_width", "low", "high"]]


def in_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`planned_half_widths` to be read: a row a coefficient, a column an arm and number of runs,
    in a cell the half-width and its band; "none" where so few sets can't be fitted.
    """
    cells = [f"{one.half_width:.4f} [{one.low:.4f}, {one.high:.4f}]"
             if np.isfinite(one.half_width) else "none" for one in table.itertuples()]
    return table.assign(cell=cells).pivot(index="coefficient", columns=["arm", "runs"],
                                          values="cell").loc[table["coefficient"].unique()]


def runs_needed(plan: Precision, target: float) -> pd.DataFrame:
    """By coefficient, the fewest runs with half-width ≤ target: `expected`, and `safe` (with the
    upper end of the band). NaN where all the planned runs do not suffice.
    """
    return pd.DataFrame({"expected": plan.runs_needed(target, safe=False),
                         "safe": plan.runs_needed(target)})


def replanned(study: Study, frame: pd.DataFrame, sweep: pd.DataFrame,
              pilot: SeedVariance) -> pd.DataFrame:
    """Planned against realised half-widths of the designed arm, every 30 runs.

    frame : `Study.set_frame`; sweep : `Study.sweep`. One row a number of runs that can be fitted
    and a coefficient: noise, planned, low, high (by what was known before these runs: the pilot,
    then the fit to the runs that were in); residual_sd, realised (same formula, these runs' own
    residual sd), hc3 (half of the rule's interval); log loss per sd of a row.
    """
    columns = study.profile.rule_columns()
    constants = Standardizer.fit(study.candidate_scores, columns)
    done = pick_arms(sweep, DESIGNED).set_index("set_id", drop=False)
    order = [s for s in running_order(study, frame, "designed")["set_id"] if s in done.index]
    noise, parts = pilot, []
    for N in sorted({*range(REPLAN_EVERY, len(order), REPLAN_EVERY), len(order)}):
        try:
            fit = fit_rule(done.loc[order[:N]].reset_index(drop=True), columns, constants)
        except RankError:
            continue
        plan = plan_runs(fit.controls, fit.indicators, columns, noise, [N]).table
        table = fit.table()
        parts.append(plan.rename(columns={"half_width": "planned"}).assign(
            noise=noise.sd, residual_sd=fit.sigma,
            realised=half_widths(fit.ols.model.exog, fit.sigma)[-len(columns):],
            hc3=((table["high"] - table["low"]) / 2).to_numpy(), runs=N,
        ))  # fmt: skip
        noise = replan(pilot, fit)
    if not parts:
        raise RunsError(f"{len(order)} designed runs are too few to fit {len(columns)} slopes")
    return pd.concat(parts, ignore_index=True)


def in_medians(table: pd.DataFrame) -> pd.DataFrame:
    """`replanned`, one row a number of runs: medians over the coefficients, and `in_band`, the
    share of coefficients whose realised half-width lies in the planned 80 % band.
    """
    held = table["realised"].between(table["low"], table["high"])
    groups = table.assign(in_band=held.astype(float)).groupby("runs")
    frame = groups[["noise", "residual_sd", "planned", "low", "high", "realised", "hc3"]].median()
    return frame.assign(in_band=groups["in_band"].mean())
