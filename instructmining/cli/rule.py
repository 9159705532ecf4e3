"""`instructmining explain`, `fit` and `plan`: a rule used on one row, made, and planned for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.data.fields import filled
from instructmining_core.data.readers import read_raw
from instructmining_core.indicators.score_table import read_scores
from instructmining_core.regression.inference import held_out
from instructmining_core.regression.permutation import permutation
from instructmining_core.regression.rule import fit_rule
from instructmining_core.regression.rule_card import RuleCard, load_rule, make_card
from instructmining_core.regression.run_table import Standardizer
from instructmining_core.selection.select import rank
from instructmining_core.selection.support import intervals

from ..experiments import pilot
from ..study import Study

SHOWN = 20  # cells that keep a run out, printed


def explanation(row_id: str, table: str, rule_name: str, allow_mismatch: bool) -> str:
    """A row's score as a sum, and where it stands among all rows of a score table.

    Raises InstructMiningError where no row has the id, or where the rule is of other models.
    """
    scores, rule = read_scores(table), load_rule(rule_name)
    differences = rule.check(scores.attrs, allow_mismatch=allow_mismatch)
    if not (scores["id"].astype(str) == row_id).any():
        some = ", ".join(scores["id"].astype(str).head(3))
        raise InstructMiningError(f"no row has the id {row_id!r} in {table}; ids are like {some}")
    ranked = rank(scores, rule)
    found = ranked[ranked["id"].astype(str) == row_id].sort_index()
    scored = int(ranked["score"].notna().sum())
    pages = [explained(row, rule, scored) for _, row in found.iterrows()]
    if len(found) > 1:
        pages.insert(0, f"{len(found)} rows have the id {row_id!r}: it is not unique")
    if differences:
        pages.append("published form, other models or data; a ranking, no conclusion")
    return "\n\n".join(pages)


def explained(row: pd.Series, rule: RuleCard, scored: int) -> str:
    """One row's page: its contributions, their sum, its rank among `scored` rows, its interval."""
    frame = row.to_frame().T
    added = rule.contributions(frame).iloc[0]
    lines = [f"{row['id']}: {row['file']}, row {row['row']}",
             f"  {'indicator':<18}{'value':>12}{'adds to log loss':>19}",
             f"  {'(intercept)':<18}{'':>12}{rule.constant:>+19.4f}"]  # fmt: skip
    for name in rule.columns:
        lines.append(f"  {name:<18}{_number(row[name], '12.4g')}{_number(added[name], '+19.4f')}")
    if not np.isfinite(row["score"]):
        return "\n".join([*lines, f"  no score: {row['reason']}"])
    lines.append(f"  {'predicted log loss':<30}{row['score']:>+19.4f}")
    lines += _interval(frame, rule)
    better = 100 - row["percentile"]
    lines.append(
        f"  rank {int(row['rank']):,} of {scored:,} rows with a score: better than "
        f"{row['percentile'] - 100 / scored:.1f} % of them"
        f"{', worse than ' + format(better, '.1f') + ' %' if better > 0 else ''}"
    )
    noted = json.loads(row.get("reasons") or "{}")
    return "\n".join([*lines, *(f"  note, {name}: {why}" for name, why in noted.items())])


def _interval(frame: pd.DataFrame, rule: RuleCard) -> list[str]:
    if rule.uncertainty is None:  # the published rules have no intervals
        return []
    found = intervals(rule, frame).iloc[0]
    lines = []
    if found["own_source"]:
        lines.append(f"  with the constant of its own source: {found['predicted']:.4f}")
    if np.isfinite(found["low_these"]):
        whose = "its own source" if found["own_source"] else "a source like these"
        lines.append(f"  95 % prediction, {whose}: {found['low_these']:.4f} to "
                     f"{found['high_these']:.4f}")  # fmt: skip
    if np.isfinite(found["low_new"]):
        lines.append(f"  95 % prediction, a new source: {found['low_new']:.4f} to "
                     f"{found['high_new']:.4f}")  # fmt: skip
    if found["outside"]:
        lines.append("  outside the range of the sets that the rule was fitted on")
    return lines


def _number(value: float, form: str) -> str:
    width = int(form.lstrip("+").split(".")[0])
    return f"{value:{form}}" if np.isfinite(float(value)) else f"{'NaN':>{width}}"


class Material(NamedTuple):
    """What a rule is fitted to.

    runs : one row a finetuning run; scores : of the fitting pool's rows; columns : of the rule
    origin : where the runs are from, as `make_card` takes it
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    columns: list[str]
    origin: dict[str, Any]


def study_material(profile: str, names: list[str]) -> Material:
    """The sweep of a profile's study; `names` in place of the profile's own columns."""
    study = Study.open(profile)
    columns = names or study.profile.rule_columns()
    origin = {"profile": study.profile.name, "set_size": study.profile.design.size}
    return Material(study.sweep(), study.candidate_scores, columns, origin)


def table_material(runs: str, scores: str | None, names: list[str]) -> Material:
    """A table of runs beside the score table of the pool that their sets were drawn from."""
    if not scores:
        raise InstructMiningError("RUNS needs --scores, whose rows standardise the rule")
    path = Path(runs)
    table = _table_of_runs(path)
    pool = read_scores(scores)
    columns = names or [c for c in pool.attrs.get("indicators", {}) if c in table]
    missing = [c for c in ("log_loss", *columns) if c not in table]
    if missing or not columns:
        raise InstructMiningError(
            f"{path} lacks {', '.join(missing) or 'every indicator'}: it holds one row a run with "
            f"log_loss, share_<source> and the sets' means; its columns are {', '.join(table)}"
        )
    table, notes = preflight(table, pool, columns)
    absent = [c for c in pool.attrs.get("indicators", {}) if c not in table]
    if absent and not names:
        notes.append(f"the runs have no column {', '.join(absent)}, as the score table has: the "
                     "rule is made without")  # fmt: skip
    sys.stderr.write("".join(f"{note}\n" for note in notes))
    return Material(table, pool, columns, {"note": f"{path.name}, scores of {scores}"})


def _table_of_runs(path: Path) -> pd.DataFrame:
    """Rows of any file that is read; a column of numbers as such, what is malformed is told."""
    rows = []
    for raw in read_raw(path):
        if raw.error or not isinstance(raw.value, dict):
            wrong = raw.error or "expected an object with named fields"
            sys.stderr.write(f"{path}, {raw.unit} {raw.line} is left out: {wrong}\n")
        else:
            rows.append({name.strip(): one for name, one in raw.value.items() if filled(one)})
    table = pd.DataFrame(rows)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    return table.where(numbers.isna() & table.notna(), numbers).infer_objects()


def preflight(
    runs: pd.DataFrame, pool: pd.DataFrame, columns: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The runs that can be fitted, with shares that sum to one, and what a reader must know.

    Raises InstructMiningError where no run is left, or shares are neither parts nor per cent.
    """
    shares = [c for c in runs if str(c).startswith("share_")]
    names = runs.get("set_id", runs.index.to_series()).astype(str)
    needed = ["log_loss", *columns, *shares]
    numbers = runs[needed].apply(pd.to_numeric, errors="coerce")
    numbers[shares] = numbers[shares].where(runs[shares].notna(), 0.0)
    bad = ~np.isfinite(numbers.to_numpy(float))
    cells = np.argwhere(bad)
    notes = [f"run {names.iloc[i]} is left out: its {needed[j]} is {runs[needed[j]].iloc[i]}"
             for i, j in cells[:SHOWN]]  # fmt: skip
    notes += [f"and {len(cells) - SHOWN} more cells that are no numbers"] * (len(cells) > SHOWN)
    keep = ~bad.any(axis=1)
    notes.append(f"{len(runs)} runs read, {int(keep.sum())} used")
    if not keep.any():
        raise InstructMiningError("no run can be fitted:\n" + "\n".join(notes))
    used = runs[keep].assign(**numbers[keep])
    used, found = _shares_of_one(used, shares)
    notes += found
    if "set_id" in used and used["set_id"].duplicated().any():
        repeats = int(used["set_id"].duplicated().sum())
        notes.append(f"{repeats} runs repeat a set_id: the first of each set (by init_seed, "
                     "order_seed) is fitted, the others only tell the noise")
    for name in columns:
        low, high = pool[name].min(), pool[name].max()
        outside = int(((used[name] < low) | (used[name] > high)).sum())
        if outside:
            notes.append(f"{name} of {outside} runs lies outside the pool's rows ({low:.4g} to "
                         f"{high:.4g}): are the set means in the units of the score table?")
    return used, notes


def _shares_of_one(runs: pd.DataFrame, shares: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Runs with shares that sum to one: rounded ones and per cent are mended, others refused."""
    sums = runs[shares].sum(axis=1)
    notes = []
    if shares and (sums - 100).abs().max() < 1:
        notes.append("the shares are per cent: they are divided by 100")
        sums = sums / 100
        runs = runs.assign(**(runs[shares] / 100))
    worst = (sums - 1).abs().max() if shares else 0
    odd = (sums - 1).abs().argmax()
    if worst > 0.01:
        name = runs["set_id"].iloc[odd] if "set_id" in runs else runs.index[odd]
        raise InstructMiningError(f"the shares of run {name} sum to {sums.iloc[odd]:.4g}: they are "
                                  "parts of 1, or of 100 in every run")  # fmt: skip
    if worst > 1e-6:
        notes.append(f"the shares are rounded (off by up to {worst:.2g}): scaled to sum to one")
        runs = runs.assign(**runs[shares].div(sums, axis=0))
    in_one = [c.removeprefix("share_") for c in shares if (runs[c] > 0).sum() == 1]
    if in_one:
        notes.append(f"only one run holds rows of {', '.join(in_one)}: nothing tells its error")
    if sum((runs[c] > 0).any() for c in shares) == 1:
        notes.append("all runs are of one source: no slope between sources can be fitted")
    return runs, notes


def fitted_card(
    material: Material, not_for: str, permutations: int, auto_size: int | None
) -> RuleCard:
    """The within-source rule with its inference, as a card."""
    from ..tables import jackknife

    runs, scores, columns, origin = material
    constants = Standardizer.fit(scores, columns)
    fitted = fit_rule(runs, columns, constants)
    test = permutation(runs, columns, constants, size=min(4, len(columns)),
                       n_permutations=permutations)  # fmt: skip
    return make_card(
        fitted, scores, not_for=not_for, new_sources=jackknife(runs, columns, constants),
        held_out=held_out(runs, columns, constants), permutation_p=test.p,
        auto_size=auto_size, **origin,
    )  # fmt: skip


def planned(profile: str, by_pilot: bool, sigma: float | None, target: float) -> str:
    """The half-widths of a design's slopes by number of runs, and the runs that a target needs."""
    study = Study.open(profile)
    frame = study.set_frame()
    if by_pilot and not study.has_own("sets.parquet"):
        raise InstructMiningError("a pilot needs this profile's own sets: run `make study "
                                  f"PROFILE={profile}`, whose notebook 04 draws them")
    seeds, fit, source = _noise(study, by_pilot, sigma)
    noise = seeds if fit is None else pilot.replan(seeds, fit)
    widths = pilot.in_cells(pilot.planned_half_widths(study, frame, noise))
    sections = [
        f"noise in log loss, {source}:\n{_table(pilot.noise_table(seeds, fit))}",
        "half-widths of 95 % intervals, log loss per sd of a row, by number of runs, with their "
        f"80 % band:\n{_table(widths)}",
    ]  # fmt: skip
    if fit is None:
        sections.append("What a straight line misses comes on top of the noise between seeds: take "
                        "these as the least, and plan anew after 30 runs.")
    sections += (_needed(study, frame, noise, target)
                 if frame["arm"].isin(pilot.ARMS["designed"]).any()
                 else ["no sets within sources: fusion alone gives no slope within them"])
    return "\n\n".join(sections)


def _needed(study: Study, frame: pd.DataFrame, noise, target: float) -> list[str]:
    within = pilot.arm_plan(study, frame, noise, every=10)
    needed, most = pilot.runs_needed(within, target), within.table["runs"].max()
    slopes = within.table["coefficient"].nunique()
    advice = (f"Plan anew after {pilot.REPLAN_EVERY} runs: the noise is known better then."
              if within.sources >= 8 else
              f"{within.sources} sources: slopes within them can be had with more runs, but for "
              "new sources more runs do not help, add sources (8 or more).")
    return [
        f"designed runs for a half-width of {target:g} (safe: with the upper end of the "
        f"band; none: more than the {most} planned):\n{_table(needed)}",
        f"within sources: {advice}",
        f"between sources: Slopes between sources rest on {within.sources} sources, not on runs: "
        f"more runs do not help, add sources (at least {slopes + 2} for {slopes} slopes).",
    ]  # fmt: skip


def _noise(study: Study, by_pilot: bool, sigma: float | None):
    """The noise between seeds, the sweep's fit where there is one, and where they come from."""
    if sigma is not None:
        return pilot.assumed(sigma), None, "assumed by --sigma"
    swept, fit = pilot.sweep_noise(study)
    where = ", and from the sweep that has been run" if fit is not None else ""
    if by_pilot:
        runs, seeds = len(pilot.pilot_plans(study)), pilot.run_pilot(study)
        if seeds is None:
            raise InstructMiningError(
                f"the design of {study.name} repeats no set on further seeds, so that it has no "
                "pilot: set design.anchors, or give --sigma"
            )
        return seeds, fit, f"from a pilot of {runs} runs{where}"
    if swept is not None:
        return swept, fit, "from the sweep that has been run"
    return pilot.assumed(0.01), fit, f"0.01 assumed, for want of --pilot or --sigma{where}"


def _table(frame: pd.DataFrame) -> str:
    return frame.to_string(na_rep="none", float_format=lambda x: f"{x:.5g}")
