"""The gate's verdict as a page: the answer first, a negative one as plainly as a positive one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .card import RuleCard

FITTED, KNOWN, UNSEEN, UNTOLD = (
    "fitted rows", "unseen rows of a fitted source", "unseen source", "origin unknown",
)  # fmt: skip
BUDGETS = ("equal rows", "equal tokens")

READING = """## How to read it

- *Difference*: relative change of the loss on the evaluation set that the rule was not fitted on;
  negative where the selected rows are better. In brackets the 95 % interval: these prompts, other
  seeds and draws.
- *Other prompts*: the 95 % interval that takes the prompts too as drawn at random.
- *Could have seen*: the difference that this many runs find with 80 % power. A smaller one can be
  there and go unseen.
- *Within ±1 %*: two one-sided tests say that the difference is smaller than 1 %, whatever its sign.
- *Equal rows*: the rivals have as many rows. *Equal tokens*: they have as many target tokens as
  the selected rows, so another number of rows and of optimisation steps.
"""


@dataclass(frozen=True)
class PoolKind:
    """What a pool is to a rule. name : one of the four above; why : str, what was compared."""

    name: str
    why: str


def card_sources(card: RuleCard) -> set[str]:
    """Sources that a card says its rule was fitted on; empty where it names none.

    They stand in brackets at the end of `fitted_on`, and in `held_out`.
    """
    named = re.search(r"sources? \(([^()]*)\)$|\d+ \(([^()]*)\)$", card.data["fitted_on"])
    listed = (named.group(1) or named.group(2)).split(", ") if named else []
    return {*listed, *(str(one["source"]) for one in card.data["held_out"])} - {""}


def pool_kind(
    scores: pd.DataFrame, card: RuleCard, fitted: pd.DataFrame | None = None
) -> PoolKind:
    """Whether the rule has seen a pool's rows, their sources, or neither.

    scores : the pool, columns source and row_hash; fitted : the rows that the rule's sets were
    drawn from, the same columns, where they can be had. Sources are compared by name, rows by
    hash. One fitted row makes the pool "fitted rows".
    """
    sources = card_sources(card)
    if fitted is not None:
        hashes = set(fitted["row_hash"]) - {""}
        same = int(scores["row_hash"].isin(hashes).sum())
        if same:
            why = f"{same} of {len(scores)} rows are among those that the rule's sets came from"
            return PoolKind(FITTED, why)
        sources |= set(fitted["source"])
    if not sources:
        return PoolKind(UNTOLD, "the card names no source, and its rows are not at hand")
    met = sorted(set(scores["source"]) & sources)
    rows = "no row is the same" if fitted is not None else "the fitted rows are not at hand"
    if met:
        return PoolKind(KNOWN, f"the rule was fitted on rows of {', '.join(met)}; {rows}")
    why = f"none of its sources is among the {len(sources)} that the rule was fitted on; {rows}"
    return PoolKind(UNSEEN, why)


def verdict_markdown(
    table: pd.DataFrame, pool_kind: PoolKind | Mapping[str, PoolKind], card: RuleCard
) -> str:
    """The page, in Markdown; its first line is the answer.

    table : contrasts of `verify.compare_budgets` (or of `verify.compare`: equal rows); pool_kind :
    of the one pool, or by pool.
    """
    table = table if "budget" in table else table.assign(budget=BUDGETS[0])
    kinds = pool_kind if isinstance(pool_kind, Mapping) else dict.fromkeys(table["pool"], pool_kind)
    data = card.data
    lines = [headline(table), ""]
    lines += [f"- Pool {pool}: **{kind.name}** ({kind.why})." for pool, kind in kinds.items()]
    lines += [f"- Rule: {card.kind}; fitted on {data['fitted_on']}.",
              f"- Not for: {data['not_for']}.", *_what_it_means(table), ""]  # fmt: skip
    for budget in dict.fromkeys(table["budget"]):
        part = table[table["budget"] == budget]
        lines += [f"## Selected rows against rivals, at {budget}", "",
                  *_rows(part[part["method"] == "selected"]), ""]  # fmt: skip
        others = part[part["method"] != "selected"]
        if len(others):
            lines += [f"## Rivals against random rows, at {budget}", "", *_rows(others), ""]
    return "\n".join(lines) + "\n" + READING


def headline(table: pd.DataFrame) -> str:
    """One line: is the selection better than random rows, at equal rows and at equal tokens?

    It begins with "No evidence that" unless every pool is better at every budget that was run.
    """
    primary, better, found = _primary(table), {}, []
    for budget, part in primary.groupby("budget", sort=False):
        better[budget] = int(part["verdict"].str.startswith("better").sum())
        found.append(_found(part, better[budget], budget))
    pools, numbers = primary["pool"].nunique(), "; ".join(found)
    whole = "the selected rows train a better model than random rows"
    if all(number == pools for number in better.values()):
        all_tiny = primary["verdict"].str.contains("within").all()
        tiny = ", but by less than 1 %" if all_tiny else ""
        return f"{whole[0].upper()}{whole[1:]}{tiny}: {numbers}."
    if not any(better.values()):
        return f"No evidence that {whole}: {numbers}."
    failing = " and at ".join(budget for budget, number in better.items() if number < pools)
    where = " in every pool" if pools > 1 else ""
    return f"No evidence that {whole}{where} at {failing}: {numbers}."


def budget_reading(table: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What equal rows and equal tokens say together, in words that follow from the verdicts.

    table : `verify.compare_budgets`; runs : with `tokens_trained`, method and pool.
    """
    tokens = runs.groupby("method")["tokens_trained"].mean()
    ratio = tokens["selected"] / tokens["random"]
    first = f"At equal rows the selected sets hold {100 * ratio:.0f} % of the random draws' tokens."
    primary = _primary(table)
    if BUDGETS[1] not in set(primary["budget"]):
        return f"{first} Nothing was run at equal tokens, so rows and tokens are not told apart."
    wins = {
        budget: set(part.loc[part["verdict"].str.startswith("better"), "pool"])
        for budget, part in primary.groupby("budget")
    }
    pools = primary["pool"].nunique()
    counts = ", ".join(f"{len(wins[b])} of {pools} pools at {b}" for b in BUDGETS)
    only = {b: len(wins[b] - wins[o]) for b, o in (BUDGETS, BUDGETS[::-1])}
    if not any(wins.values()):
        end = "Neither comparison shows an advantage."
    elif not any(only.values()):
        end = "Both agree: the advantage is not one of the number of tokens trained on."
    elif len(wins[BUDGETS[1]]) < len(wins[BUDGETS[0]]):
        end = ("Where only equal rows show it, the advantage may be one of how many tokens are "
               "trained on, and not of which.")  # fmt: skip
    else:
        end = ("At equal tokens the random sets have another number of rows and of optimisation "
               "steps, which can be what is seen there; both are in the table.")  # fmt: skip
    return f"{first} Better than random rows in {counts}. {end}"


def verdict_said(row: Mapping) -> str:
    """One contrast in a line: verdict, difference, interval, and what could have been seen."""
    seen = f"could have seen {_percent(row['detectable'])}"
    return (f"{row['verdict']}: {_signed(row['difference'])} "
            f"[{_signed(row['low'])}, {_signed(row['high'])}], {seen}")  # fmt: skip


def _primary(table: pd.DataFrame) -> pd.DataFrame:
    table = table if "budget" in table else table.assign(budget=BUDGETS[0])
    return table[table["role"] == "primary"]


def _found(part: pd.DataFrame, better: int, budget: str) -> str:
    if len(part) == 1:
        return f"at {budget} {verdict_said(part.iloc[0])}"
    worse = int(part["verdict"].str.startswith("worse").sum())
    return (f"at {budget} better in {better} and worse in {worse} of {len(part)} pools, "
            f"differences {_signed(part['difference'].min())} to "
            f"{_signed(part['difference'].max())}, could have seen "
            f"{_percent(part['detectable'].max())} in each")  # fmt: skip


def _what_it_means(table: pd.DataFrame) -> list[str]:
    part = _primary(table)
    if part["verdict"].str.startswith("better").all():
        return []
    seen = part["detectable"].max()
    if not np.isfinite(seen):
        return ["- With one run a side there is no interval, and nothing could be detected."]
    return [f"- What this rules out: an advantage of {_percent(seen)} or more would have been "
            "found with 80 % power. A smaller one may be there. Until it is seen, random rows are "
            "as good a choice, and cost nothing."]  # fmt: skip


def _rows(part: pd.DataFrame) -> list[str]:
    lines = ["| pool | contrast | runs | difference | other prompts | could have seen "
             "| within ±1 % | verdict |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in part.to_dict("records"):
        main = " (primary)" if row["role"] == "primary" else ""
        cells = [
            row["pool"], f"{row['method']} against {row['versus']}{main}",
            f"{row['n']} against {row['n_versus']}",
            f"{_signed(row['difference'])} {_interval(row['low'], row['high'])}",
            _interval(row["low_prompts"], row["high_prompts"]), _percent(row["detectable"]),
            "yes" if row["p_margin"] < 0.05 else "not shown", f"**{row['verdict']}**",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return lines


def _interval(low: float | None, high: float | None) -> str:
    return f"[{_signed(low)}, {_signed(high)}]" if np.isfinite(low) else "none"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f} %" if np.isfinite(value) else "none"


def _percent(value: float) -> str:
    if not np.isfinite(value):
        return "nothing (one run a side)"
    return f"{100 * value:.{1 if value >= 0.001 else 2}f} %"
