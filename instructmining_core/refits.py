"""The rule's own uncertainty: rules refitted on bootstrapped ledgers, each with its own selection.

A contrast of one rule's rows against random rows speaks of that one rule. The rule came out of a
sweep that could have come out otherwise; rules refitted on resampled runs select other rows, and
a contrast over them carries that uncertainty too (statistical plan, section 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .card import RuleCard
from .card_making import make_card
from .ols import RankError
from .runs import DESIGNED, RunsError, Standardisation, pick_arms
from .selection import choose
from .study import Plan, Study
from .within import fit_within

TRIES = 100  # resamples that may fail to tell the set means apart, before it is an error


def refit_cards(study: Study, n: int, seed: int = 0) -> list[RuleCard]:
    """`n` rules, each fitted to the study's sweep with its sets drawn again.

    Sets are resampled with replacement within their source, the mixed ones among themselves, so
    that every refit has the design's sources; estimator, indicators and standardising constants
    are those of the study's rule. A resample whose set means can't be told apart (too few
    distinct sets) is drawn again. Raises RunsError where `TRIES` of them in a row can't.
    """
    columns, scores = study.profile.rule_columns(), study.candidate_scores
    constants = Standardisation.fit(scores, columns)
    sweep = study.sweep()
    runs = pick_arms(sweep, DESIGNED)
    rng = np.random.default_rng(seed)
    cards = []
    for i in range(n):
        fit = _fitted(runs, columns, constants, rng)
        cards.append(make_card(
            fit, scores,
            fitted_on=f"bootstrap {i} (seed {seed}) of the sweep of profile {study.profile.name}: "
            f"{len(fit.runs)} sets drawn again from {fit.runs['drawn'].nunique()} "
            f"({', '.join(fit.sources)})",
            not_for="selecting: it shows how far the study's own rule is uncertain",
        ))  # fmt: skip
    return cards


def resampled(runs: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """One bootstrap of a sweep: rows drawn with replacement within `arm` and `source`.

    runs : one row a set. Copies get set ids of their own, since a fit takes one run a set_id; the
    id that was drawn is in `drawn`.
    """
    parts = [
        part.iloc[rng.integers(len(part), size=len(part))]
        for _, part in runs.groupby(["arm", "source"], sort=True)
    ]
    drawn = pd.concat(parts, ignore_index=True)
    names = [f"{one}#{i}" for i, one in enumerate(drawn["set_id"])]
    return drawn.assign(drawn=drawn["set_id"], set_id=names)


def _fitted(
    runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation,
    rng: np.random.Generator,
):
    for _ in range(TRIES):
        try:
            return fit_within(resampled(runs, rng), columns, constants, arms=None)
        except RankError:
            continue
    raise RunsError(
        f"{TRIES} resamples of {len(runs)} sets left too few distinct ones for "
        f"{len(columns)} slopes beside the source shares: more sets a source are needed"
    )


def refit_plans(study: Study, cards: Sequence[RuleCard]) -> list[Plan]:
    """For every pool one finetune a refitted rule, on its own best rows; method "refit".

    The refit's number is the seed of its finetune, so that runs differ by rule *and* seed, as
    random draws do by rows and seed.
    """
    size = study.profile.selection.size
    return [
        Plan(
            tuple(choose(study.pool_scores(pool), "selected", size, rule=card)["row_hash"]),
            {"pool": pool, "method": "refit", "size": size, "seed": i},
            init_seed=i,
            order_seed=i,
        )
        for pool in study.data.pools
        for i, card in enumerate(cards)
    ]


def agreement(plans: Sequence[Plan], chosen: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How much of the rule's selection the refits choose too, a row a pool.

    chosen : pool -> row hashes that the study's rule selects. Columns refits, shared_mean,
    shared_least : share of those rows that a refit selects, in [0, 1].
    """
    rows = []
    for pool, own in chosen.items():
        shares = [len(set(own) & set(plan.row_hashes)) / len(set(own))
                  for plan in plans if plan.label["pool"] == pool]  # fmt: skip
        rows.append({"pool": pool, "refits": len(shares), "shared_mean": np.mean(shares),
                     "shared_least": min(shares)})  # fmt: skip
    return pd.DataFrame(rows)
