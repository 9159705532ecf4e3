"""From scores to rows: rank by a rule, drop near duplicates, keep the best; and the baselines.

A rule predicts the log loss after training on rows like this one, so the lowest score is the best
row (InstructMining v3, arXiv 2307.06290, section 3). The paper takes the top rows as they come;
dropping repeats among them is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from ..config import InstructMiningError
from ..data.duplicates import Kept
from ..data.fields import Messages
from ..regression.rule_card import RuleCard

BATCH_ROWS = 1024  # rows whose texts are fetched at a time, at least

# Baseline -> (column, True where the lowest value is taken). The least compressible first: Yin et
# al. 2024 (arXiv 2407.06645) prefer data of a low raw/compressed ratio.
BASELINES = {
    "longest": ("len_out", False),
    "shortest": ("len_out", True),  # which end of length is the better one depends on the pool
    "lowest_ppl": ("ppl", True),
    "reward": ("reward", False),
    "compression": ("compression", True),
    "ifd": ("ifd", False),  # the hardest to follow; from 1 on the prompt helps nothing: left out
}
METHODS = ("selected", "worst", "random", *BASELINES, "full")
TOKENS = "_tokens"  # ends a method's name where its rows hold the selected rows' tokens
NO_SCORE, DUPLICATE, BELOW = "no score", "near duplicate", "below the cut"

Texts = Callable[[pd.DataFrame], Sequence[Messages]]
TokensOf = Callable[[pd.DataFrame], Sequence[float]]


@dataclass(frozen=True)
class Selection:
    """What was kept and what was not.

    kept : the score table's rows, best first, with `score` (predicted log loss, lower is better),
        `rank` (from 1, among all rows with a score) and `percentile` (100 is best)
    dropped : all other rows, with `score`, `rank`, `why` (`NO_SCORE`, `DUPLICATE`, `BELOW`) and
        `reason` in words
    """

    kept: pd.DataFrame
    dropped: pd.DataFrame

    def counts(self) -> dict[str, int]:
        """Rows kept and rows dropped by reason."""
        why = self.dropped["why"].value_counts()
        found = {name: int(why.get(name, 0)) for name in (NO_SCORE, DUPLICATE, BELOW)}
        return {"rows": len(self.kept) + len(self.dropped), "kept": len(self.kept), **found}


def rank(scores: pd.DataFrame, rule: RuleCard) -> pd.DataFrame:
    """The score table from best to worst, with `score`, `rank`, `percentile` and `reason`.

    Ties keep the table's order. Rows without a score come last, their rank NaN and the reason in
    words: which indicator is missing and why.
    """
    score = rule.predict(scores).astype(float)
    ranked = scores.assign(score=score.where(np.isfinite(score)))
    ranked.attrs = dict(scores.attrs)
    ranked = ranked.sort_values("score", kind="stable", na_position="last")
    scored = int(ranked["score"].notna().sum())
    ranked["rank"] = np.where(ranked["score"].notna(), np.arange(1, len(ranked) + 1.0), np.nan)
    ranked["percentile"] = 100 * (scored - ranked["rank"] + 1) / max(scored, 1)
    unscored = ranked.iloc[scored:].to_dict(orient="records")
    ranked["reason"] = [""] * scored + [_why_unscored(row, rule.columns) for row in unscored]
    return ranked


def _why_unscored(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Each missing indicator of the rule with its recorded reason."""
    recorded = json.loads(row.get("reasons") or "{}")
    if "row" in recorded:
        return recorded["row"]
    missing = [c for c in columns if not np.isfinite(float(row[c]))]
    said = "; ".join(f"{c}: {recorded.get(c, 'no value')}" for c in missing)
    return said or "the rule gives no finite number"


def top_rows(rule: RuleCard, top_k: int | str) -> int:
    """How many rows to keep: the number itself, or for "auto" the card's `auto_size`."""
    if top_k == "auto":
        if not rule.auto_size:
            raise InstructMiningError(
                "this rule card carries no `auto_size`: search the size on your own data first "
                "(notebook 09) and write it on the card, or name a number"
            )
        return rule.auto_size
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise InstructMiningError(f"top_k is {top_k!r}; it is a number of rows above 0, or 'auto'")
    return top_k


def select(scores: pd.DataFrame, rule: RuleCard, top_k: int | str, texts: Texts) -> Selection:
    """The best `top_k` rows without near duplicates (`data.duplicates.Kept`).

    scores : a score table, columns as `scorer.score` gives them; rows of one `row_hash`, where it
        is there, count once
    top_k : rows to keep, or "auto" (see `top_rows`)
    texts : rows of the ranking -> their conversations; asked for a few rows at a time, from the
        best on

    Keeps fewer than `top_k` where there are no more rows. Raises InstructMiningError where no row
    has a score.
    """
    wanted = top_rows(rule, top_k)
    ranked = rank(scores, rule).reset_index(drop=True)
    scored = ranked[ranked["score"].notna()]
    if scored.empty:
        example = f", for example {ranked['reason'].iloc[0]}" if len(ranked) else ""
        raise InstructMiningError(f"none of the {len(ranked)} rows has a score{example}")
    kept, twins = _distinct_from_the_top(scored, wanted, texts)
    # One change at a time to a column of strings copies all of it: fill arrays of objects.
    ids = ranked["id"].to_numpy(object)
    unscored = ranked["score"].isna().to_numpy()
    why = np.where(unscored, NO_SCORE, BELOW).astype(object)
    reason = np.where(unscored, ranked["reason"], f"rank below the best {wanted}").astype(object)
    for row, twin in twins.items():
        why[row] = DUPLICATE
        reason[row] = f"near duplicate of {ids[twin]}, which ranks {twin + 1}"
    left = ranked.assign(why=why, reason=reason).drop(index=kept)
    return Selection(ranked.loc[kept].drop(columns="reason"), left)


def _distinct_from_the_top(
    scored: pd.DataFrame, wanted: int, texts: Texts
) -> tuple[list[int], dict[int, int]]:
    """Down the ranking until `wanted` rows are kept: (kept labels, {dropped label: kept label})."""
    firsts, repeats = _exact_duplicates(scored)
    kept: list[int] = []
    twins: dict[int, int] = {}
    near = Kept()
    for label, messages in _with_texts(scored.loc[firsts], wanted, texts):
        twin = near.add(label, messages)
        if twin is None:
            kept.append(label)
        else:
            twins[label] = twin
        if len(kept) == wanted:
            break
    # Labels are positions in the ranking: what lies below the last kept row was not looked at.
    for label, first in repeats.items():
        if label < kept[-1] or len(kept) < wanted:
            twins[label] = twins.get(first, first)
    return kept, twins


def _exact_duplicates(scored: pd.DataFrame) -> tuple[list[int], dict[int, int]]:
    """Labels of the first row of each row hash, and {label of a repeat: label of the first}."""
    if "row_hash" not in scored:
        return list(scored.index), {}
    hashes = scored["row_hash"]
    repeated = hashes.duplicated() & hashes.ne("")
    first = scored.index.to_series().groupby(hashes).transform("first")
    return list(scored.index[~repeated]), first[repeated].to_dict()


def _with_texts(
    rows: pd.DataFrame, wanted: int, texts: Texts
) -> Iterator[tuple[int, Messages]]:
    # Fetching may mean reading a file again, so the first batch should do and the next ones double.
    start, size = 0, max(BATCH_ROWS, wanted + wanted // 4)
    while start < len(rows):
        batch = rows.iloc[start : start + size]
        yield from zip(batch.index, texts(batch), strict=True)
        start, size = start + size, 2 * size


def choose_rows(
    scores: pd.DataFrame, method: str, size: int, *, rule: RuleCard | None = None, seed: int = 0
) -> pd.DataFrame:
    """`size` rows of a pool by one method: "selected" or "worst" (need `rule`), or a baseline.

    method : "selected", "worst" (the rule's last rows), "random" (by `seed`), a name of
        `BASELINES`, or "full" (every row; `size` is not asked). Exact duplicates count once and
        unreadable rows not at all; rows without a value are left to "random" and "full".
    Raises InstructMiningError where the pool has fewer rows with a value.
    """
    pool = _distinct(scores)
    if method == "full":
        return pool
    chosen = _in_order(pool, method, rule, seed).iloc[:size]
    if len(chosen) < size:
        text = f"{method!r} can choose {len(chosen)} rows, {size} were asked for"
        raise InstructMiningError(text)
    return chosen


def choose_tokens(
    scores: pd.DataFrame, method: str, tokens: float, *, seed: int = 0, tokens_of: TokensOf
) -> pd.DataFrame:
    """A pool's rows by one baseline until they hold `tokens` target tokens, as nearly as possible.

    method : as for `choose_rows`, but "selected" and "full"; tokens : of one pass over the rows;
    tokens_of : rows -> target tokens of each, asked for a few rows at a time. At least one row is
    chosen. Raises InstructMiningError where all the method's rows together hold fewer.
    """
    rows = _in_order(_distinct(scores), method, None, seed)
    summed, batch = np.zeros(1), 64  # tokens of the first 0, 1, 2, ... rows
    while len(summed) <= len(rows) and summed[-1] < tokens:
        more = rows.iloc[len(summed) - 1 : len(summed) - 1 + batch]
        own = np.cumsum(np.asarray(tokens_of(more), float))
        summed, batch = np.r_[summed, summed[-1] + own], 2 * batch
    if not 0 < tokens <= summed[-1]:
        raise InstructMiningError(f"{method!r} can choose rows of {summed[-1]:.0f} target tokens, "
                                  f"{tokens:.0f} were asked for")
    return rows.iloc[: int(np.argmin(np.abs(summed[1:] - tokens))) + 1]


def _distinct(scores: pd.DataFrame) -> pd.DataFrame:
    if "row_hash" not in scores:
        return scores
    # "" where the row could not be read: nothing to train on
    return scores[scores["row_hash"] != ""].drop_duplicates("row_hash")


def _in_order(pool: pd.DataFrame, method: str, rule: RuleCard | None, seed: int) -> pd.DataFrame:
    """All rows that a method can choose, the first choice first."""
    if method == "random":
        return pool.iloc[np.random.default_rng(seed).permutation(len(pool))]
    if method in ("selected", "worst"):
        if rule is None:
            raise InstructMiningError(f"{method!r} needs a rule")
        ranked = rank(pool, rule)
        ranked = ranked[ranked["score"].notna()]
        return ranked if method == "selected" else ranked.iloc[::-1]
    if method in BASELINES:
        column, lowest = BASELINES[method]
        if column not in pool:
            raise InstructMiningError(f"{method!r} needs the column {column!r}: score it first")
        known = pool.dropna(subset=column)
        if method == "ifd":  # Li et al. 2024, arXiv 2308.12032
            known = known[known[column] < 1]
        return known.sort_values(column, ascending=lowest, kind="stable")
    raise InstructMiningError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def compare_rules(rules: Mapping[str, RuleCard], scores: pd.DataFrame,
                  top: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank correlations of the rules, and the rows they disagree on most.

    First frame: pairs of names with spearman, jaccard (of the `top` best rows) and notes (what
    differs from the rule's own models). Second: the `top` rows with the largest gap between any two
    rules' ranks: id, row_hash, a rank in [0, 1] by rule (0 is best) and the gap. Rows with a
    missing indicator under any rule are left out.
    """
    predicted = pd.DataFrame({name: rule.predict(scores) for name, rule in rules.items()})
    ranks = predicted.dropna().rank(method="first")
    notes = {name: "; ".join(rule.check(scores.attrs, allow_mismatch=True))
             for name, rule in rules.items()}
    best = {name: set(ranks.index[ranks[name] <= top]) for name in rules}
    pairs = [{"rule_1": a, "rule_2": b, "spearman": ranks[a].corr(ranks[b]),
              "jaccard": len(best[a] & best[b]) / max(len(best[a] | best[b]), 1),
              "notes_1": notes[a], "notes_2": notes[b]} for a, b in combinations(rules, 2)]
    shared = (ranks - 1) / max(len(ranks) - 1, 1)
    shared = shared.assign(gap=shared.max(axis=1) - shared.min(axis=1))
    worst = shared.nlargest(top, "gap")
    labels = scores.loc[worst.index, [c for c in ("id", "row_hash") if c in scores]]
    return pd.DataFrame(pairs), labels.join(worst)
