"""What runs took and on what, and whether another machine or precision gives the same losses."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pandas as pd
import torch

from instructmining_core import files
from instructmining_core.finetuning.ledger import Ledger
from instructmining_core.finetuning.run_spec import CHOICES, RunSpec
from instructmining_core.finetuning.sweep import run_sweep

from ..study import Study
from .comparisons import LOSSES

NAMES = ["run_id", "purpose", "pool", "method", "seed", "set_id"]
MADE_WITH = ["machine", "dtype", "threads", "commit"]
SETTING = ["machine_again", "dtype_again", "threads_again"]  # what one comparison changes


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Finished runs of each stage (purpose), the hours they computed, and with what.

    runs : `Ledger.load`. A run that shared a pass counts its part of the hours; two processes of
    one thread each count two hours an hour.
    """
    finished = runs[runs["status"].isin(["done", "diverged"])].assign(hours=runs["seconds"] / 3600)
    groups = finished.groupby(["purpose", "machine", "threads", "dtype"], dropna=False)
    return groups.agg(runs=("run_id", "size"), hours=("hours", "sum"),
                      commits=("commit", "nunique")).reset_index()  # fmt: skip


def runs_to_repeat(study: Study, count: int) -> pd.DataFrame:
    """`count` finished runs: half are pairs of the gate, selected and random rows of one pool and
    seed, the low seeds first; the others are sets of the sweep, drawn at random.
    """
    pairs, sweep = pd.DataFrame(), study.runs("sweep")
    if study.has_own("runs/gate.json"):
        gate = study.runs("gate")
        gate = gate[gate["method"].isin(["selected", "random"])].sort_values(["seed", "pool"])
        pairs = gate[gate.duplicated(["pool", "seed"], keep=False)].head(count // 4 * 2)
    rest = min(count - len(pairs), len(sweep))
    return pd.concat([pairs, sweep.sample(rest, random_state=0)], ignore_index=True)


def repeat_runs(study: Study, count: int, *, dtype: str, threads: int) -> pd.DataFrame:
    """Do finished runs of the study again on this machine; both losses of each side by side.

    dtype, threads : in place of those of the first time; "" and 0 leave the first's dtype and
    torch's own number. What is done stays in `results/<profile>/again`, for a stopped comparison.
    One row a run: `NAMES`, then `<column>_first` and `<column>_again` of `MADE_WITH` and `LOSSES`.
    """
    first, ledger = runs_to_repeat(study, count), study.ledger_of(study.find("ledger"))
    records = [ledger.read(run_id) for run_id in first["run_id"]]
    dtype = dtype or records[0]["spec"]["base"]["dtype"]
    lm = study.load(dataclasses.replace(study.profile.models.base, dtype=dtype))
    specs = [RunSpec.from_content(record["spec"], record["label"]) for record in records]
    specs = [dataclasses.replace(spec, base=dataclasses.replace(spec.base, dtype=dtype))
             for spec in specs]
    config = specs[0].finetune
    rows = study.encoded_rows(lm, config, {h for spec in specs for h in spec.row_hashes})
    own = torch.get_num_threads()
    kept = Ledger(study.folder / "again" / f"{dtype}-{threads or own}")
    exams = [tuple(name for name in spec.evals if not name.startswith(CHOICES)) for spec in specs]
    torch.set_num_threads(threads or own)
    try:
        again = pd.concat([
            run_sweep([spec for spec, its in zip(specs, exams, strict=True) if its == names], lm,
                      rows, study.encoded_evals(lm, config, names), kept, workers=0, progress=True)
            for names in dict.fromkeys(exams)
        ]).set_index("run_id").loc[[spec.run_id for spec in specs]].reset_index()  # fmt: skip
    finally:
        torch.set_num_threads(own)
    table = first.reindex(columns=NAMES)
    for name in (*MADE_WITH, *LOSSES):
        table[f"{name}_first"], table[f"{name}_again"] = first[name], again[name]
    return table


def add_comparison(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Write a table of `repeat_runs` into the evidence, beside those of other settings; all of it.

    A run that was compared under the same setting before is replaced.
    """
    path = files.evidence(study.name) / "compared.parquet"
    if path.is_file():
        both = pd.concat([pd.read_parquet(path), table], ignore_index=True)
        table = both.drop_duplicates([*SETTING, "run_id"], keep="last", ignore_index=True)
    with files.being_written(path) as part:
        table.to_parquet(part, index=False)
    return table


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """How far losses move when runs are done again, by setting and loss, in nats per token.

    runs; mean and largest difference (again minus first, the largest of its absolute values);
    spread, the first losses' sd over the runs of the sweep; rank_correlation of both losses there.
    """
    rows = []
    for (setting, part), loss in product(table.groupby(SETTING), LOSSES):
        first, again = part[f"{loss}_first"], part[f"{loss}_again"]
        sweep = part["purpose"] == "sweep"
        rows.append({
            **dict(zip(SETTING, setting, strict=True)), "loss": loss, "runs": len(part),
            "mean": (again - first).mean(), "largest": (again - first).abs().max(),
            "spread": first[sweep].std(),
            "rank_correlation": first[sweep].corr(again[sweep], "spearman"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """What the selected rows gain over random ones, the first time and again, by setting and pool.

    pairs; `first` and `again`, means over the pairs of log loss of random minus selected rows on
    the reporting set; `turned`, whether the sign did.
    """
    gate = table[table["purpose"] == "gate"]
    if gate.empty:
        return gate
    times = {f"loss_eval_2_{when}": when for when in ("first", "again")}
    losses = np.log(gate.pivot(index=[*SETTING, "pool", "seed"], columns="method", values=[*times]))
    gained = losses.xs("random", axis=1, level=1) - losses.xs("selected", axis=1, level=1)
    groups = gained.rename(columns=times).groupby([*SETTING, "pool"])
    means = groups.mean()
    means.insert(0, "pairs", groups.size())
    return means.assign(turned=means["first"] * means["again"] < 0).reset_index()
