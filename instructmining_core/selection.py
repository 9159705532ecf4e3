"""From scores to rows: rank by a rule, drop near duplicates, keep the best; and the baselines.

A rule predicts the log loss after training on rows like this one, so the lowest score is the best
row (InstructMining v3, arXiv 2307.06290, section 3). The paper takes the top rows as they come;
dropping repeats among them is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from instructmining_core.near_duplicates import THRESHOLD, first_of_each
from instructmining_core.ranked_walk import SelectionError, Texts, distinct_from_the_top

if TYPE_CHECKING:
    from instructmining_core.card import RuleCard

# Baseline -> (column, True where the lowest value is taken). The least compressible first: Yin et
# al. 2024 (arXiv 2407.06645) prefer data of a low raw/compressed ratio.
BASELINES = {
    "longest": ("len_out", False),
    "shortest": ("len_out", True),  # which end of length is the better one depends on the pool
    "lowest_ppl": ("ppl", True),
    "reward": ("reward", False),
    "compression": ("compression", True),
}
METHODS = ("selected", "random", *BASELINES, "full")
TOKENS = "_tokens"  # ends a method's name where its rows hold the selected rows' tokens
NO_SCORE, DUPLICATE, BELOW = "no score", "near duplicate", "below the cut"

TokensOf = Callable[[pd.DataFrame], Sequence[float]]


@dataclass(frozen=True)
class Selection:
    """What was kept and what was not.

    kept : the score table's rows, best first, with `score` (predicted log loss, lower is better),
        `rank` (1-based among all rows with a score) and `percentile` (share of rows with a score
        that are no better, in %, 100 is best).
    dropped : all other rows, with `score`, `rank`, `why` ("no score", "near duplicate", "below
        the cut") and `reason` in words.
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
    ranked = scores.assign(score=np.where(np.isfinite(score), score, np.nan))
    ranked.attrs = dict(scores.attrs)
    ranked = ranked.sort_values("score", kind="stable", na_position="last")
    scored = int(ranked["score"].notna().sum())
    ranked["rank"] = np.where(ranked["score"].notna(), np.arange(1, len(ranked) + 1.0), np.nan)
    ranked["percentile"] = 100 * (scored - ranked["rank"] + 1) / max(scored, 1)
    unscored = ranked.iloc[scored:].to_dict(orient="records")
    ranked["reason"] = [""] * scored + [why_unscored(row, rule.columns) for row in unscored]
    return ranked


def why_unscored(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Why a row has no score: each missing indicator of the rule with its recorded reason."""
    recorded = json.loads(row.get("reasons") or "{}")
    if "row" in recorded:
        return recorded["row"]
    missing = [c for c in columns if not np.isfinite(float(row[c]))]
    said = "; ".join(f"{c}: {recorded.get(c, 'no value')}" for c in missing)
    return said or "the rule gives no finite number"


def top_rows(rule: RuleCard, top_k: int | str) -> int:
    """How many rows to keep: the number itself, or for "auto" the size that the rule's search
    found (`auto_size` on its card). Raises SelectionError.
    """
    if top_k != "auto":
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise SelectionError(f"top_k is {top_k!r}; it is a number of rows above 0, or 'auto'")
        return top_k
    size = rule.data.get("auto_size")
    if not isinstance(size, int) or size < 1:
        raise SelectionError(
            "this rule card carries no `auto_size`: search the size on your own data first "
            "(notebook 09, `search.blendsearch`) and write it on the card, or name a number"
        )
    return size


def select(
    scores: pd.DataFrame,
    rule: RuleCard,
    top_k: int | str,
    *,
    texts: pd.DataFrame | Texts | None = None,
    threshold: float = THRESHOLD,
) -> Selection:
    """The best `top_k` rows without near duplicates.

    scores : a score table, columns as `scoring.score` gives them
    top_k : rows to keep, or "auto" (see `top_rows`)
    texts : where the conversations are, to find near duplicates: the record table, matched on
        (file, row, part); or a function from rows of the ranking to their conversations, asked
        for a few at a time from the best on. None: only exact duplicates (by row hash) are found.
    threshold : see `near_duplicates`

    Keeps fewer than `top_k` where there are no more rows. Raises SelectionError where no row has a
    score.
    """
    wanted = top_rows(rule, top_k)
    ranked = rank(scores, rule).reset_index(drop=True)
    scored = ranked[ranked["score"].notna()]
    if scored.empty:
        example = f", for example {ranked['reason'].iloc[0]}" if len(ranked) else ""
        raise SelectionError(f"none of the {len(ranked)} rows has a score{example}")
    kept, twins = distinct_from_the_top(scored, wanted, texts, threshold)
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


def remove_near_duplicates(
    table: pd.DataFrame, order: Sequence[int], threshold: float = THRESHOLD
) -> tuple[list[int], dict[int, int]]:
    """Walk a record table's rows (positions, best first): (kept, {dropped: the one it repeats})."""
    messages = table["messages"].tolist()
    return first_of_each(((row, messages[row]) for row in order), threshold)


def choose(
    scores: pd.DataFrame,
    method: str,
    size: int,
    *,
    rule: RuleCard | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`size` rows of a pool by one method: "selected" (needs `rule`), or a baseline.

    method : "selected", "random" (by `seed`), "longest", "shortest", "lowest_ppl", "reward",
        "compression", or "full" (every row; `size` is not asked). For every method exact
        duplicates count once and unreadable rows not at all; rows without a value are left to
        "random" and "full".
    Raises SelectionError where the pool has fewer rows with a value.
    """
    pool = _distinct(scores)
    if method == "full":
        return pool
    chosen = _in_order(pool, method, rule, seed).iloc[:size]
    if len(chosen) < size:
        raise SelectionError(f"{method!r} can choose {len(chosen)} rows, {size} were asked for")
    return chosen


def choose_tokens(
    scores: pd.DataFrame,
    method: str,
    tokens: float,
    *,
    rule: RuleCard | None = None,
    seed: int = 0,
    tokens_of: TokensOf | None = None,
) -> pd.DataFrame:
    """A pool's rows by one method until they hold `tokens` target tokens, as nearly as possible.

    At a fixed number of rows a method that likes long answers trains on more tokens; this is the
    comparison without that advantage. method : as for `choose`, but "full".
    tokens : target tokens of one pass over the rows; tokens_of : rows -> target tokens of each,
    asked for a few rows at a time; None: `len_out`, which counts words, stands in for them.

    The last row is kept where that comes nearer to `tokens`; at least one row is chosen. Raises
    SelectionError where all the method's rows together hold fewer.
    """
    if not tokens > 0:
        raise SelectionError(f"{tokens} target tokens were asked for; it must be above 0")
    rows = _in_order(_distinct(scores), method, rule, seed)
    summed, batch = np.zeros(0), 64
    while len(summed) < len(rows) and (not len(summed) or summed[-1] < tokens):
        more = rows.iloc[len(summed) : len(summed) + batch]
        own = more["len_out"].fillna(0) if tokens_of is None else tokens_of(more)
        before = summed[-1] if len(summed) else 0.0
        summed, batch = np.r_[summed, before + np.cumsum(np.asarray(own, float))], 2 * batch
    if not len(summed) or summed[-1] < tokens:
        held = summed[-1] if len(summed) else 0
        raise SelectionError(
            f"{method!r} can choose rows of {held:.0f} target tokens, {tokens:.0f} were asked for"
        )
    return rows.iloc[: int(np.argmin(np.abs(summed - tokens))) + 1]


def _distinct(scores: pd.DataFrame) -> pd.DataFrame:
    if "row_hash" not in scores:
        return scores
    # "" where the row could not be read: nothing to train on
    return scores[scores["row_hash"] != ""].drop_duplicates("row_hash")


def _in_order(pool: pd.DataFrame, method: str, rule: RuleCard | None, seed: int) -> pd.DataFrame:
    """All rows that a method can choose, the first choice first."""
    if method == "random":
        return pool.iloc[np.random.default_rng(seed).permutation(len(pool))]
    if method == "selected":
        if rule is None:
            raise SelectionError("'selected' needs a rule")
        ranked = rank(pool, rule)
        return ranked[ranked["score"].notna()]
    if method in BASELINES:
        column, lowest = BASELINES[method]
        if column not in pool:
            raise SelectionError(f"{method!r} needs the column {column!r}: score it first")
        known = pool.dropna(subset=column)
        return known.sort_values(column, ascending=lowest, kind="stable")
    raise SelectionError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def baselines(scores: pd.DataFrame, k: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Every baseline that the table's columns allow: name -> its rows, as `choose` gives them."""
    able = [name for name, (column, _) in BASELINES.items() if column in scores]
    return {name: choose(scores, name, k, seed=seed) for name in ("random", *able, "full")}
