"""Several rules on the same rows: how alike they rank, and where they part."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from .card import RuleCard


def compare_rules(rules: Mapping[str, RuleCard], scores: pd.DataFrame,
                  top: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank correlations of the rules, and the rows they disagree on most.

    First frame: pairs of names with spearman, jaccard (of the `top` best rows) and notes (what
    differs from the rule's own models; a rule with notes is "published form, other models").
    Second: the `top` rows with the largest gap between any two rules' ranks: id where there is
    one, row_hash, a rank in [0, 1] by rule (0 is best) and the gap. Rows with a missing
    indicator under any rule are left out.
    """
    predicted = pd.DataFrame({name: rule.predict(scores) for name, rule in rules.items()})
    ranks = predicted.dropna().rank(method="first")
    notes = {name: "; ".join(rule.check(scores.attrs, allow_mismatch=True))
             for name, rule in rules.items()}
    best = {name: set(ranks.index[ranks[name] <= top]) for name in rules}
    names = list(rules)
    pairs = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            pairs.append({"rule_1": a, "rule_2": b, "spearman": ranks[a].corr(ranks[b]),
                          "jaccard": len(best[a] & best[b]) / max(len(best[a] | best[b]), 1),
                          "notes_1": notes[a], "notes_2": notes[b]})
    shared = (ranks - 1) / max(len(ranks) - 1, 1)
    shared = shared.assign(gap=shared.max(axis=1) - shared.min(axis=1))
    worst = shared.nlargest(top, "gap")
    labels = scores.loc[worst.index, [c for c in ("id", "row_hash") if c in scores]]
    return pd.DataFrame(pairs), labels.join(worst)
