"""How far a study is, and its next runs, so that it can be done over many sittings.

    python -m instructmining.plan show --profile replication
    python -m instructmining.plan run --profile replication --stage regime --hours 2

Any first part of a stage's runs is balanced over what the stage compares, so that a study that is
stopped is a smaller study. The notebooks take up what was done here: the runs are theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import load_rule

from .embedded.defects import KINDS
from .experiments.comparisons import sweep_plans
from .experiments.gate import gate_plans, refit_plans
from .experiments.planted_defects import dose_plans, dose_sets_of, has_doses
from .experiments.regime import regime_plans, regime_sets
from .profile import Profile
from .study import MissingInput, PlannedRun, Study

STAGES = ("regime", "dose", "sweep", "gate", "refit")  # purposes of runs, in the order of doing
FIRST, CHUNK = 4, 16  # runs that are done before the hours left are looked at: at first, then
A_RUN = 420.0  # seconds of a run of the design's size, before any was measured


def stage_plans(study: Study, stage: str) -> tuple[list[PlannedRun], tuple[pd.DataFrame, ...]]:
    """A stage's runs in the order of doing, and the tables with rows that are no candidates.

    Raises MissingInput where an earlier stage must be finished first.
    """
    if stage == "regime":
        table = regime_sets(study)
        return regime_plans(study, table), (table,)
    if stage == "dose":
        table = dose_sets_of(study)
        return dose_plans(table), (table,)
    needed = "sets.parquet" if stage == "sweep" else "rule.json"
    if not study.has_own(needed):
        raise MissingInput(f"{stage} needs {needed}")
    if stage == "sweep":
        return sweep_plans(study), ()
    if stage == "refit":
        return refit_plans(study), ()
    return gate_plans(study, load_rule(study.find("rule.json"))), ()


def asked_stages(profile: Profile) -> list[str]:
    """The stages that a profile has any runs for, but those of notebooks 09 to 11."""
    asked = (profile.regime.rows, has_doses(profile), True, True, profile.selection.refits)
    return [stage for stage, any_runs in zip(STAGES, asked, strict=True) if any_runs]


def expected_runs(profile: Profile, stage: str, sources: int, pools: int) -> int:
    """Runs of a stage as the profile has it, before its inputs are there.

    sources : of the candidates; pools : of the gate
    """
    regime, gate = profile.regime, profile.selection
    if stage == "regime":
        sets = regime.draws + 1 + (len(regime.sources) or sources)
        return len(regime.learning_rates) * len(regime.rows) * len(regime.layers) * sets
    if stage == "dose":
        levels, sizes = set(gate.dose_levels), max(len(gate.dose_rows), 1)
        kinds = gate.dose_kinds or KINDS
        partial = kinds if gate.dose_partial is None else gate.dose_partial
        at_each = len(levels & {0.0}) + len(levels & {1.0}) * len(kinds)
        return gate.dose_seeds * (sizes * at_each + len(levels - {0.0, 1.0}) * len(partial))
    if stage == "sweep":
        return profile.design.runs()
    if stage == "refit":
        return pools * gate.refits
    rows = gate.seeds + gate.draws + gate.matched + gate.baseline_seeds * len(gate.rivals)
    at_tokens = pools if gate.equal_tokens is None else min(gate.equal_tokens, pools)
    rivals = len(set(gate.rivals) - {"full", "worst"})
    return pools * rows + at_tokens * (gate.draws + gate.baseline_seeds * rivals)


def head_count(study: Study, seconds: float = A_RUN) -> pd.DataFrame:
    """One row a stage: runs planned, done and left, hours spent, hours left, and what it waits for.

    seconds : of a run of the design's size where none was done yet; hours are those of the clock,
    for as many processes as have shared this machine so far
    """
    known = study.ledger.load()
    known = known[known["status"] == "done"].set_index("run_id")
    rows = []
    for stage in asked_stages(study.profile):
        try:
            plans, _ = stage_plans(study, stage)
        except MissingInput as error:
            runs = expected_runs(study.profile, stage, study.data.candidates["source"].nunique(),
                                 len(study.data.pools))  # fmt: skip
            rows.append({"stage": stage, "runs": runs, "done": 0, "left": runs, "hours": 0.0,
                         "hours_left": runs * seconds / 3600, "waits_for": str(error)})
            continue
        done = known.reindex(run_ids(study, stage, plans))
        left = [plan for plan, lost in zip(plans, done["seconds"].isna(), strict=True) if lost]
        costs = [seconds_of(study, plan, known, seconds) for plan in left]
        rows.append({"stage": stage, "runs": len(plans), "done": len(plans) - len(left),
                     "left": len(left), "hours": clock(done.dropna(subset="seconds")).sum() / 3600,
                     "hours_left": sum(costs) / 3600, "waits_for": ""})
    return pd.DataFrame(rows).set_index("stage")


def run_ids(study: Study, stage: str, plans: Sequence[PlannedRun]) -> list[str]:
    """The ids under which `Study.run` does the plans of a stage."""
    specs = study.specs(stage, plans, study.lm, study.profile.finetune)
    return [spec.run_id for spec in specs]


def clock(runs: pd.DataFrame) -> pd.Series:
    """Seconds of the clock that finished runs took: several on one machine share its cores."""
    if runs.empty:
        return pd.Series(dtype=float)
    cores = runs["machine"].str.extract(r"(\d+) cores", expand=False).astype(float)
    return runs["seconds"] * (runs["threads"] / cores).fillna(1.0)


def seconds_of(study: Study, plan: PlannedRun, known: pd.DataFrame, seconds: float) -> float:
    """Seconds of the clock that a run will take: as finished ones did with as many rows, at its
    depth and on its evaluation sets; else in proportion to its rows.
    """
    rows, config = len(plan.row_hashes), plan.config or study.profile.finetune
    alike = known[known["rows"] == rows] if len(known) else known
    for name in ("regime", "gate"):
        judged = alike.get(f"loss_{name}", pd.Series(index=alike.index, dtype=float)).notna()
        alike = alike[judged == (name in plan.exams)]
    if "layers" in alike:  # a label of the regime's runs; all others are at the profile's depth
        alike = alike[alike["layers"].fillna(study.profile.finetune.layers) == config.layers]
    if len(alike):
        return float(clock(alike).mean())
    return seconds * rows / study.profile.design.size


def prepare(study: Study, *, pools: bool = False) -> None:
    """Score the candidates and draw the sets, so that the sweep can begin before pools are scored.

    Notebooks 03 and 04 do the same with the pools too, from the same cache of scores.
    pools : now already, as what plans the gate needs
    """
    from instructmining_core.indicators.score_table import write_scores

    if study.has_own("sets.parquet") and not pools:
        return
    rows, roles = study.data.everything, study.data.roles
    if not pools:
        rows, roles = study.data.candidates, roles.query("role == 'candidates'")
    write_scores(study.scorer().score(rows, progress=True), study.folder / "scores.parquet")
    study.save(roles, "roles.parquet")
    sets = study.draw_sets()
    study.save(pd.DataFrame({"set_id": [one.set_id for one in sets],
                             "set": [json.dumps(one.as_dict()) for one in sets]}),
               "sets.parquet")  # fmt: skip


def run_stage(study: Study, stage: str, hours: float) -> int:
    """Do a stage's next runs until the hours are over; how many were done.

    A chunk that has begun is finished; what is killed goes on at the next call.
    """
    if stage == "sweep":
        prepare(study)
    plans, tables = stage_plans(study, stage)
    ids = run_ids(study, stage, plans)
    left = [plan for plan, one in zip(plans, ids, strict=True) if not study.ledger.has(one)]
    begun, done, size = time.monotonic(), 0, FIRST
    while size > 0 and done < len(left):
        chunk = left[done : done + size]
        study.run(stage, chunk, tables=tables)
        done += len(chunk)
        spent = time.monotonic() - begun
        size = min(CHUNK, int((3600 * hours - spent) / (spent / done)))
    return done


def _command() -> None:
    parser = argparse.ArgumentParser(prog="instructmining.plan", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("show", "run"):
        verbs.add_parser(verb).add_argument("--profile", default="laptop")
    verbs.choices["show"].add_argument(
        "--seconds", type=float, default=A_RUN, help="of a run, before any was measured")
    verbs.choices["run"].add_argument("--stage", choices=STAGES, required=True)
    verbs.choices["run"].add_argument("--hours", type=float, default=1.0)
    options = parser.parse_args()
    try:
        study = Study.open(options.profile)
        if options.verb == "run":
            print(f"{run_stage(study, options.stage, options.hours)} runs done")
        print(head_count(study, getattr(options, "seconds", A_RUN)).round(1).to_string())
    except InstructMiningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _command()
