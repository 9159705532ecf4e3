"""Which indicator carries the rule? Drop one, refit, select anew, finetune (the paper's Table 5).

The paper (v3, Table 5) prints one loss a cell. Here every contrast has its interval, and a smaller
rule is finetuned only where it selects other rows: where the selections are nearly the same, so is
the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from . import verify
from .card import RuleCard
from .card_making import make_card
from .experiments import repeated, size_pool
from .intervals import r2_of
from .runs import Standardisation
from .selection import choose
from .study import Plan, Study
from .within import Fit, fit_within

SAME = 0.8  # Jaccard index from which two selections count as the same


def smaller_fits(
    runs: pd.DataFrame, scores: pd.DataFrame, columns: Sequence[str]
) -> dict[str, Fit]:
    """The rule without each indicator in turn, fitted on the same runs; empty for one column.

    scores : the rows of the fitting pool, which standardise
    """
    found = {}
    for dropped in columns if len(columns) > 1 else []:
        kept = [c for c in columns if c != dropped]
        found[dropped] = fit_within(runs, kept, Standardisation.fit(scores, kept))
    return found


def smaller_rules(scores: pd.DataFrame, fits: Mapping[str, Fit]) -> dict[str, RuleCard]:
    """A card for each of `smaller_fits`, so that all rules select by the same code."""
    return {dropped: make_card(fit, scores, fitted_on=f"as the study's rule, without {dropped}",
                               not_for="anything but the ablation")
            for dropped, fit in fits.items()}  # fmt: skip


def overlaps(
    pool: pd.DataFrame, size: int, rule: RuleCard, smaller: Mapping[str, RuleCard],
    fits: Mapping[str, Fit],
) -> pd.DataFrame:
    """How much of the full rule's selection each smaller rule keeps.

    One row an indicator: without, jaccard, r2 of the smaller rule beyond the shares with r2_low
    and r2_high (these sources), finetuned (whether the selections differ enough, see `SAME`).
    Both selections are made by `selection.choose`.
    """
    whole = set(choose(pool, "selected", size, rule=rule)["row_hash"])
    rows = []
    for dropped, card in smaller.items():
        part = set(choose(pool, "selected", size, rule=card)["row_hash"])
        jaccard = len(part & whole) / len(part | whole)
        r2, low, high = r2_of(fits[dropped])
        rows.append({"without": dropped, "jaccard": jaccard, "r2": r2, "r2_low": low,
                     "r2_high": high, "finetuned": jaccard < SAME})  # fmt: skip
    return pd.DataFrame(rows)


def plans(study: Study, rule: RuleCard, smaller: Mapping[str, RuleCard]) -> list[Plan]:
    """Finetunes on the largest pool: the full rule, random draws, and each smaller rule given."""
    pool, size = size_pool(study), study.profile.selection.size
    seeds = study.profile.robustness.seeds
    found = [plan for method in ("selected", "random")
             for plan in repeated(study, rule, pool, method, size, seeds)]  # fmt: skip
    scores = study.pool_scores(pool)
    for dropped, card in smaller.items():
        rows = tuple(choose(scores, "selected", size, rule=card)["row_hash"])
        found += [
            Plan(rows, {"pool": pool, "method": f"without {dropped}", "size": len(rows),
                        "seed": seed}, init_seed=seed, order_seed=seed)
            for seed in range(seeds)
        ]  # fmt: skip
    return found


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Each smaller rule against random rows, and the full rule's rows against it.

    runs : of `plans`. Columns of `verify.compare`; the first row is the full rule against random.
    Secondary contrasts, unadjusted: as many as there are indicators.
    """
    return verify.compare(runs, loss="loss_eval_2")


def ablation(study: Study, rule: RuleCard) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Overlaps of every smaller rule; contrasts of those finetuned (`robustness.ablation`).

    The second table is empty where the profile does not ask for the finetunes or no selection
    differs enough.
    """
    fits = smaller_fits(study.sweep(), study.candidate_scores, study.profile.rule_columns())
    smaller = smaller_rules(study.candidate_scores, fits)
    pool = study.pool_scores(size_pool(study))
    table = overlaps(pool, study.profile.selection.size, rule, smaller, fits)
    if not study.profile.robustness.ablation or table.empty or not table["finetuned"].any():
        return table, pd.DataFrame()
    other = {name: smaller[name] for name in table.loc[table["finetuned"], "without"]}
    return table, compared(study.run("ablation", plans(study, rule, other)))
