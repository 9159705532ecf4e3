"""What others have said of the same rows: published selections, and answers that experts revised.

A rule that is right about rows ranks what others chose above what they left, and a revised answer
above the original. So may length alone, which stands beside it. Intervals are over rows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata
from statsmodels.stats.weightstats import DescrStatsW

from instructmining_core import files
from instructmining_core.data.records import with_row_hash
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection.select import BASELINES

from ..study import Study
from ..study_data import read_pairs

LENGTH = "longest"  # the rival that a rule has to beat
RIVALS = (LENGTH, "ifd", "lowest_ppl", "reward")
SURE = norm.ppf(0.975)


def orders(scores: pd.DataFrame, rules: Mapping[str, RuleCard]) -> dict[str, np.ndarray]:
    """By name of rule or rival a number for each row, the lowest first; shape (rows,)."""
    found = {name: rule.predict(scores).to_numpy(float) for name, rule in rules.items()}
    for name in RIVALS:
        column, lowest = BASELINES[name]
        if column in scores:
            values = scores[column].to_numpy(float)
            if name == "ifd":  # at 1 and above the prompt does not help: such rows are not chosen
                values = np.where(values < 1, values, -np.inf)
            found[name] = values if lowest else -values
    return found


def placements(order: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each chosen row the share of the others that it is ranked above, ties half, and of each
    other row the share of the chosen that are ranked above it. The mean of either is the AUC.

    order : lowest first; chosen : bool; both shape (rows,). DeLong et al. 1988 (Biometrics 44).
    """
    ranks = rankdata(order)
    above = (ranks[chosen] - rankdata(order[chosen])) / (~chosen).sum()
    below = (ranks[~chosen] - rankdata(order[~chosen])) / chosen.sum()
    return 1 - above, below


def agreement(
    order: np.ndarray, chosen: np.ndarray, rival: np.ndarray | None = None
) -> tuple[float, float, float]:
    """AUC of a selection, or with a rival the difference of the two; and its 95 % interval."""
    parts = placements(order, chosen)
    if rival is not None:
        parts = [one - other for one, other in zip(parts, placements(rival, chosen), strict=True)]
    value = float(parts[0].mean())
    half = SURE * np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return value, value - half, value + half


def chosen_by_others(
    scores: pd.DataFrame, chosen: Mapping[str, np.ndarray], rules: Mapping[str, RuleCard]
) -> pd.DataFrame:
    """One row a selection and scorer: selection, by, auc, low, high; beyond, beyond_low and
    beyond_high, by how much that is more than length's; rows, chosen.

    chosen : name of a selection -> bool, shape (rows,). Rows that a scorer has no value for are
    left out for all.
    """
    made = orders(scores, rules)
    known = np.all([~np.isnan(order) for order in made.values()], axis=0)
    found = []
    for selection, name in ((one, name) for one in chosen for name in made):
        own, rival = made[name][known], made[LENGTH][known]
        is_chosen = chosen[selection][known]
        found.append([selection, name, *agreement(own, is_chosen),
                      *agreement(own, is_chosen, rival), known.sum(), is_chosen.sum()])
    return pd.DataFrame(found, columns=["selection", "by", "auc", "low", "high", "beyond",
                                        "beyond_low", "beyond_high", "rows", "chosen"])  # fmt: skip


def preferred_by_experts(
    better: pd.DataFrame, worse: pd.DataFrame, rules: Mapping[str, RuleCard]
) -> pd.DataFrame:
    """One row a scorer: by, right (share of pairs whose better answer it ranks first, ties half),
    low, high, beyond (more than length), beyond_low, beyond_high, pairs.

    better, worse : score tables of the pairs, in one order
    """
    first, second = orders(better, rules), orders(worse, rules)
    known = np.all([~np.isnan(x) for x in (*first.values(), *second.values())], axis=0)
    right = {name: ((own < second[name]) + 0.5 * (own == second[name]))[known]
             for name, own in first.items()}

    def told(values: np.ndarray) -> list[float]:
        return [values.mean(), *DescrStatsW(values).tconfint_mean()]

    found = [[name, *told(one), *told(one - right[LENGTH]), len(one)]
             for name, one in right.items()]
    return pd.DataFrame(found, columns=["by", "right", "low", "high", "beyond", "beyond_low",
                                        "beyond_high", "pairs"])  # fmt: skip


# Of a study


def published_selections(study: Study, scores: pd.DataFrame) -> dict[str, np.ndarray]:
    """Name of a published selection -> whether it holds each row of `scores` (columns row, ...)."""
    config = study.profile.outside
    path = files.root() / study.profile.data.folder / config.index
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        listed = json.load(stream)
    return {name: scores["row"].isin(set(listed[name])).to_numpy() for name in config.names}


def score_pairs(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score tables of the revised answers and of the originals, `outside.pairs.take` of them."""
    config, data = study.profile.outside, study.profile.data
    pairs = read_pairs(config.pairs, data, files.root())
    if 0 < config.pairs.take < len(pairs):
        pairs = pairs.sample(config.pairs.take, random_state=data.seed)
    tables, scorer = [], study.scorer()
    for side in ("chosen", "rejected"):
        talks = [[*prompt, {"role": "assistant", "content": answer}]
                 for prompt, answer in zip(pairs["prompt"], pairs[side], strict=True)]
        ids = [f"{side}-{i}" for i in pairs.index]
        table = with_row_hash(pd.DataFrame({"id": ids, "source": side, "messages": talks}))
        tables.append(scorer.score(table))
    return tuple(tables)
