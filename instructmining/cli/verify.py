"""`instructmining select --verify`: the selection against random draws and rivals, finetuned.

The gate of the statistical plan, section 6, for one pool: the user's own file. Base model,
evaluation sets, training and the number of repeats are those of a profile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.data.export import SourceRows
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection.select import (
    BASELINES,
    TOKENS,
    Selection,
    choose_rows,
    choose_tokens,
)

from .models import opened_study

if TYPE_CHECKING:
    from ..study import Study

LARGEST_FULL = 10_000  # rows above which the "full data" rival is left out, for its time
TOKEN_RIVALS = ("random", "longest", "shortest")  # chance, and both ends of length


def gate_study(profile: str | None) -> Study:
    """The study whose base model, evaluation sets, training and repeats the gate takes."""
    if not profile:
        raise InstructMiningError(
            "--verify needs --profile: it names the base model that is finetuned "
            "and the evaluation sets"
        )
    return opened_study(profile)


def verified(
    study: Study, scores: pd.DataFrame, rule: RuleCard, selection: Selection, sources: SourceRows,
    *, show: bool,
) -> tuple[dict, str]:
    """Finetune and compare; the contrasts as plain records, and the verdict's page in Markdown.

    Raises InstructMiningError where the pool is too small for a random draw of another kind than
    the selection.
    """
    from instructmining_core.selection.beat_random import compare_budgets

    from ..experiments.comparisons import per_example
    from ..reports import pool_kind, verdict_markdown

    pool = ", ".join(sources.files)
    chosen = _chosen(study, scores, rule, selection, sources)
    plans = _plans(pool, len(selection.kept), chosen)
    rows = pd.concat([rows for _, _, rows in chosen]).drop_duplicates("row_hash")
    # The study encodes training rows from its pools; this one is the user's.
    study.data.pools[pool] = rows.assign(messages=sources.fetch(rows))
    runs = study.run("verify", plans, progress=show)
    table = compare_budgets(
        runs, per_example(study, runs), loss="loss_eval_2", primary_size=len(selection.kept)
    )
    kind = pool_kind(scores, rule, _fitted_rows(study, rule))
    records = json.loads(table.to_json(orient="records"))
    report = {"profile": study.profile.name, "finetunes": len(plans), "pool": kind.name,
              "pool_why": kind.why, "contrasts": records}  # fmt: skip
    return report, verdict_markdown(table, {pool: kind}, rule)


def _chosen(
    study: Study, scores: pd.DataFrame, rule: RuleCard, selection: Selection, sources: SourceRows
) -> list[tuple[str, int, pd.DataFrame]]:
    """(method, seed, rows) of every finetune."""
    size, repeats = len(selection.kept), study.profile.selection
    rivals = [name for name, (column, _) in BASELINES.items() if column in scores]
    if len(scores) <= LARGEST_FULL:
        rivals.append("full")
    counts = {"random": repeats.draws} | dict.fromkeys(rivals, repeats.baseline_seeds)
    found = [("selected", seed, selection.kept) for seed in range(repeats.seeds)]
    found += [
        (method, seed, choose_rows(scores, method, size, rule=rule, seed=seed))
        for method, seeds in counts.items()
        for seed in range(seeds)
    ]
    tokens_of = _counter(study, sources)
    tokens = sum(tokens_of(selection.kept))
    found += [
        (method + TOKENS, seed, choose_tokens(scores, method, tokens, seed=seed,
                                              tokens_of=tokens_of))
        for method in TOKEN_RIVALS
        if method in counts
        for seed in range(counts[method])
    ]  # fmt: skip
    return found


def _counter(study: Study, sources: SourceRows) -> Callable[[pd.DataFrame], Sequence[int]]:
    """Rows of the score table -> target tokens of each as it is trained on; a row once."""
    from instructmining_core.data.tokenization import encode

    known: dict[str, int] = {}
    longest = study.profile.finetune.max_tokens

    def count(rows: pd.DataFrame) -> list[int]:
        new = rows[~rows["row_hash"].isin(known)]
        for own, messages in zip(new["row_hash"], sources.fetch(new), strict=True):
            row = encode(
                study.lm.tokenizer, messages, max_tokens=longest, template=study.lm.template
            )
            known[own] = int(sum(row.targets))
        return [known[own] for own in rows["row_hash"]]

    return count


def _plans(pool: str, size: int, chosen: Sequence[tuple[str, int, pd.DataFrame]]) -> list:
    from ..study import PlannedRun

    plans = []
    for method, seed, rows in chosen:
        # sets of equal tokens are told by the size whose tokens they have
        label = {"pool": pool, "method": method, "seed": seed,
                 "size": size if method.endswith(TOKENS) else len(rows)}  # fmt: skip
        plans.append(PlannedRun(tuple(rows["row_hash"]), label, init_seed=seed, order_seed=seed))
    return plans


def _fitted_rows(study: Study, rule: RuleCard) -> pd.DataFrame | None:
    """Source and row hash of the rows that the rule's sets came from, where this profile has them.
    """
    if rule.fitted_on.profile != study.profile.name:
        return None
    rows = study.data.candidates
    return rows[["source", "row_hash"]]
