"""From scores to rows: rank by a rule, drop near duplicates, keep the best; and the baselines.

A rule predicts the log loss after training on rows like this one, so the lowest score is the best
row (InstructMining v3, arXiv 2307.06290, section 3). The paper takes the top rows as they come;
dropping repeats among them is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from ..config import InstructMiningError
from ..data.duplicates import Kept
from ..data.fields import Messages
from ..indicators.score_table import ScoreTable, parts_of
from ..regression.rule_card import RuleCard

BATCH_ROWS, MOST_ROWS = 1024, 1 << 17  # whose texts are fetched at a time, at least and at most

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
NO_SCORE, DUPLICATE = "no score", "near duplicate"

Texts = Callable[[pd.DataFrame], Sequence[Messages]]
TokensOf = Callable[[pd.DataFrame], Sequence[float]]


@dataclass(frozen=True)
class Selection:
    """What was kept and what was not.

    kept : the score table's rows, best first, with `score` (predicted log loss, lower is better),
        `rank` (from 1, among all rows with a score) and `percentile` (100 is best)
    dropped : the rows dropped for another reason than their rank, with `score`, `rank`, `why`
        (`NO_SCORE`, `DUPLICATE`) and `reason` in words
    rows : of the whole table; the others lie below the cut
    """

    kept: pd.DataFrame
    dropped: pd.DataFrame
    rows: int

    def counts(self) -> dict[str, int]:
        """Rows kept and rows dropped by reason."""
        found = {name: int((self.dropped["why"] == name).sum()) for name in (NO_SCORE, DUPLICATE)}
        below = self.rows - len(self.kept) - len(self.dropped)
        return {"rows": self.rows, "kept": len(self.kept), **found, "below the cut": below}


class _Ranking:
    """A score table's rows by their place, of which some are looked up at a time."""

    def __init__(self, scores: pd.DataFrame | ScoreTable, rule: RuleCard) -> None:
        self.scores, self.columns = scores, rule.columns
        found = [rule.predict(part).to_numpy(float) for part in parts_of(scores, rule.columns)]
        score = np.concatenate(found) if found else np.zeros(0)
        self.score = np.where(np.isfinite(score), score, np.nan)
        self.order = np.argsort(self.score, kind="stable")  # NaN last
        self.scored = int(np.isfinite(self.score).sum())

    def places(self, start: int, stop: int | None = None) -> pd.DataFrame:
        """Rows from a place on, counted from 0, with `score`, `rank`, `percentile` and `reason`."""
        where = self.order[start:stop]
        whole = isinstance(self.scores, ScoreTable)
        frame = self.scores.rows(where) if whole else self.scores.iloc[where]
        rank = np.arange(start + 1.0, start + len(where) + 1)
        rank[rank > self.scored] = np.nan
        unscored = frame.iloc[max(self.scored - start, 0) :].to_dict(orient="records")
        reason = [""] * (len(frame) - len(unscored))
        ranked = frame.assign(
            score=self.score[where], rank=rank,
            percentile=100 * (self.scored - rank + 1) / max(self.scored, 1),
            reason=[*reason, *(_why_unscored(row, self.columns) for row in unscored)],
        )  # fmt: skip
        ranked.attrs = dict(self.scores.attrs)
        return ranked


def rank(scores: pd.DataFrame, rule: RuleCard) -> pd.DataFrame:
    """The score table from best to worst, with `score`, `rank`, `percentile` and `reason`.

    Ties keep the table's order. Rows without a score come last, their rank NaN and the reason in
    words: which indicator is missing and why.
    """
    return _Ranking(scores, rule).places(0)


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


def select(
    scores: pd.DataFrame | ScoreTable, rule: RuleCard, top_k: int | str, texts: Texts
) -> Selection:
    """The best `top_k` rows without near duplicates (`data.duplicates.Kept`).

    scores : a score table, columns as `scorer.score` gives them; rows of one `row_hash`, where it
        is there, count once. Of a table on disk only the rule's columns are gone through, and the
        rows that are looked at.
    top_k : rows to keep, or "auto" (see `top_rows`)
    texts : rows of the ranking -> their conversations; asked for a few rows at a time, from the
        best on

    Keeps fewer than `top_k` where there are no more rows. Raises InstructMiningError where no row
    has a score.
    """
    wanted = top_rows(rule, top_k)
    ranking = _Ranking(scores, rule)
    unscored = ranking.places(ranking.scored)
    if not ranking.scored:
        example = f", for example {unscored['reason'].iloc[0]}" if len(scores) else ""
        raise InstructMiningError(f"none of the {len(scores)} rows has a score{example}")
    kept, twins, near, seen = [], [], Kept(), {}
    # Fetching may mean reading a file again, so the first batch should do and the next ones double.
    start, size, room = 0, max(BATCH_ROWS, wanted + wanted // 4), wanted
    while room and start < ranking.scored:
        batch = ranking.places(start, min(start + size, ranking.scored))
        found = _near_duplicates(batch, room, texts, near, seen)
        batch = batch.iloc[: len(found)].assign(reason=found, why=DUPLICATE)
        kept.append(batch[batch["reason"] == ""].drop(columns=["reason", "why"]))
        twins.append(batch[batch["reason"] != ""])
        start, size, room = start + size, min(2 * size, MOST_ROWS), room - len(kept[-1])
    dropped = pd.concat([*twins, unscored.assign(why=NO_SCORE)])
    return Selection(pd.concat(kept), dropped, len(scores))


def _near_duplicates(
    batch: pd.DataFrame, room: int, texts: Texts, near: Kept, seen: dict[str, str]
) -> list[str]:
    """Why each row is a near duplicate of a better one, "" where it is kept; until `room` are kept.

    near : the kept rows so far; seen : row hash -> the kept row that stands for it
    """
    hashes = batch["row_hash"] if "row_hash" in batch else pd.Series("", batch.index)
    first = hashes.eq("") | ~(hashes.duplicated() | hashes.isin(list(seen)))
    conversations = iter(texts(batch[first]))
    found = []
    rows = zip(batch["id"], batch["rank"], hashes, first, strict=True)
    for row_id, place, own, new in rows:
        name = f"{row_id}, which ranks {place:.0f}"
        twin = near.add(name, next(conversations)) if new else seen[own]
        if own:
            seen[own] = twin or name
        found.append(f"near duplicate of {twin}" if twin else "")
        room -= not twin
        if not room:
            break
    return found


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
