"""`instructmining select --verify`: the selection against random draws and rivals, finetuned.

The gate of the statistical plan, section 6, for one pool: the user's own file. Base model,
evaluation sets, training and the number of repeats are those of a profile.
"""

from __future__ import annotations

import argparse
import json

import pandas as pd

from instructmining_core.card import RuleCard
from instructmining_core.cli_models import opened_study
from instructmining_core.selection import BASELINES, Selection, SelectionError, choose
from instructmining_core.source_rows import SourceRows

LARGEST_FULL = 10_000  # rows above which the "full data" rival is left out, for its time


def verified(
    args: argparse.Namespace,
    scores: pd.DataFrame,
    rule: RuleCard,
    selection: Selection,
    sources: SourceRows,
) -> dict:
    """Finetune, compare, and return the contrasts as plain records.

    Raises SelectionError without --profile, or where the pool is too small for a random draw of
    another kind than the selection.
    """
    from instructmining_core.study import Plan
    from instructmining_core.verify import compare

    if not args.profile:
        raise SelectionError(
            "--verify needs --profile: it names the base model that is finetuned "
            "and the evaluation sets"
        )
    study = opened_study(args.profile)
    size, repeats = len(selection.kept), study.profile.selection
    pool = ", ".join(sources.files)
    plans, needed = [], []
    for method, seeds in _counts(scores, repeats).items():
        for seed in range(seeds):
            rows = (
                selection.kept
                if method == "selected"
                else choose(scores, method, size, rule=rule, seed=seed)
            )
            label = {"pool": pool, "method": method, "size": len(rows), "seed": seed}
            plans.append(Plan(tuple(rows["row_hash"]), label, init_seed=seed, order_seed=seed))
            needed.append(rows)
    rows = pd.concat(needed).drop_duplicates("row_hash")
    # The study encodes training rows from its pools; this one is the user's.
    study.data.pools[pool] = rows.assign(messages=sources.fetch(rows))
    runs = study.run("verify", plans, progress=not args.quiet)
    table = compare(runs, primary_size=size)
    records = json.loads(table.to_json(orient="records"))
    return {"profile": args.profile, "finetunes": len(plans), "contrasts": records}


def _counts(scores: pd.DataFrame, repeats) -> dict[str, int]:
    """Method -> number of finetunes."""
    rivals = [name for name, (column, _) in BASELINES.items() if column in scores]
    if len(scores) <= LARGEST_FULL:
        rivals.append("full")
    return {"selected": repeats.seeds, "random": repeats.draws} | dict.fromkeys(
        rivals, repeats.baseline_seeds
    )
