"""The book's front page: one question, its answer in a few sentences, one figure.

Effects are in nats, random minus selected, so above zero where the selected rows are better; the
unit beside them is the spread between collections, the sd of the mean losses of sets of one
collection each (statistics, section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining_core.selection.contrasts import ALPHA

from .experiments.gate import MATCHED
from .reports import NOT_ASKED, markdown_table
from .study import Study

EFFECTS = "front.parquet"  # of a run: `gate_effects`, with `facts` beside
AVERAGINGS = {"prompts": "loss_eval_2", "tokens": "loss_eval_2_token"}
POOLED = "all pools"
RIVALS = ("random", MATCHED)


def spread_between(sweep: pd.DataFrame, loss: str) -> float:
    """sd over collections of the mean loss of the sets that come from one alone, in nats."""
    return float(sweep[sweep["arm"] == "within"].groupby("source")[loss].mean().std(ddof=1))


def gate_effects(runs: pd.DataFrame, sweep: pd.DataFrame) -> pd.DataFrame:
    """What the selected rows gain, pool by pool and over all of them.

    runs : the gate's, one row a finetune: pool, method, the losses of `AVERAGINGS`, `relevance`;
    sweep : for the spread between collections.

    Columns pool (the last ones `POOLED`), versus ("random" or "matched"), averaging, effect, low,
    high (nats; 95 %, Welch over repeats; of all pools t over pools, so for other pools like these),
    n, n_versus (finetunes), spread (nats); for the figure's grey ticks `base` and `worst`, random
    minus these, and `relevance`, selected minus `versus`, in nats, over all pools with its ends.
    """
    rows = []
    for averaging, loss in AVERAGINGS.items():
        spread = spread_between(sweep, loss)
        for versus in RIVALS:
            pools = [_pool(pool, part, loss, versus) for pool, part in runs.groupby("pool")
                     if {"selected", versus} <= set(part["method"])]  # fmt: skip
            if len(pools) > 1:
                pools.append(_together(pd.DataFrame(pools)))
            rows += [{**row, "versus": versus, "averaging": averaging, "spread": spread}
                     for row in pools]  # fmt: skip
    return pd.DataFrame(rows)


def _pool(pool: str, part: pd.DataFrame, loss: str, versus: str) -> dict:
    def arm(method: str, column: str = loss) -> np.ndarray:
        return part.loc[part["method"] == method, column].dropna().to_numpy(float)

    own, other, chance = arm("selected"), arm(versus), arm("random").mean()
    low = high = np.nan
    if min(len(own), len(other)) > 1:
        both = CompareMeans(DescrStatsW(other), DescrStatsW(own))
        low, high = both.tconfint_diff(alpha=ALPHA, usevar="unequal")
    worst = arm("worst")
    base = part[loss.replace("loss_", "base_")].mean()
    return {
        "pool": pool, "effect": other.mean() - own.mean(), "low": low, "high": high,
        "n": len(own), "n_versus": len(other), "base": chance - base,
        "worst": chance - worst.mean() if len(worst) else np.nan,
        "relevance": arm("selected", "relevance").mean() - arm(versus, "relevance").mean(),
    }  # fmt: skip


def _together(pools: pd.DataFrame) -> dict:
    """The mean over pools; no interval where one of them has a single finetune."""
    found = {"pool": POOLED, **pools[["effect", "base", "worst", "relevance"]].mean(),
             **pools[["n", "n_versus"]].sum()}  # fmt: skip
    known = pools["low"].notna().all()
    for column, start in (("effect", ""), ("relevance", "relevance_")):
        ends = DescrStatsW(pools[column]).tconfint_mean(ALPHA) if known else (np.nan, np.nan)
        found[f"{start}low"], found[f"{start}high"] = ends
    return found


def verdict_of(effects: pd.DataFrame, versus: str) -> str:
    """"lower", "higher", "depends" on the averaging, or "unclear": of the loss, over all pools.

    A word about the loss needs both averagings, each with an interval off zero (section 7).
    """
    whole = effects[(effects["pool"] == POOLED) & (effects["versus"] == versus)]
    signs = {np.sign(r.low) for r in whole.itertuples() if r.low * r.high > 0}
    if len(signs) == 2:
        return "depends"
    clear = whole["low"] * whole["high"] > 0
    if not len(whole) or not clear.all():
        return "unclear"
    return "lower" if signs == {1.0} else "higher"


ANSWERS = {
    "lower": "Yes: the rows that it picks lower the loss",
    "higher": "No: the rows that it picks raise the loss",
    "depends": "It depends on how the loss is averaged",
    "unclear": "We can't tell: the difference is within the noise of this run",
}


def facts_of(study: Study) -> dict[str, str]:
    """What the rule was fitted to (`rule`), what was finetuned (`base`) and what the rows were
    selected from (`pools`), in words.
    """
    profile, base = study.profile, study.lm.resolved
    pools = [f"{pool} ({len(rows):,} rows)" for pool, rows in study.data.pools.items()]
    sources = study.data.candidates["source"].nunique()
    depth, top = study.lm.config.num_hidden_layers, profile.finetune.layers
    where = f"the top {top} of {depth} layers" if top else f"all {depth} layers"
    stand_in = ", a stand-in made on the spot" if base.stand_in else ""
    return {
        "rule": f"{profile.design.runs()} finetunes on sets of {profile.design.size} rows from "
                f"{sources} collections",
        "base": f"{base.id}{stand_in} ({profile.finetune.method} on {where})",
        "pools": f"each of {len(pools)} pools: {'; '.join(pools)}; {profile.selection.size} rows "
                 "at a time",
        "profile": profile.name,
    }  # fmt: skip


def front_page(effects: pd.DataFrame, verdict: pd.DataFrame) -> str:
    """The generated part of the front page, in Markdown; no text of the data is in it.

    effects : from `gate_effects`, with `facts_of` in `.attrs["facts"]`; verdict : every claim
    """
    facts = effects.attrs["facts"]
    lines = [
        f"**Does a rule learned as InstructMining learns it pick better rows than chance?** "
        f"{ANSWERS[verdict_of(effects, 'random')]}.", "",
        f"A rule was fitted to {escape(facts['rule'], quote=False)}, and picked rows from "
        f"{escape(facts['pools'], quote=False)}; {escape(facts['base'], quote=False)} was "
        "finetuned on them and on rows drawn at random.", "",
        f"- Against random rows they {_against(effects, 'random')}.",
    ]  # fmt: skip
    if (effects["versus"] == MATCHED).any():
        lines.append(f"- Against random rows of the same length they {_against(effects, MATCHED)}.")
    lines += [_followed(effects), "- Whether answers are true this study cannot tell.", ""]
    return "\n".join(lines) + "\n" + _claims(verdict)


def _against(effects: pd.DataFrame, versus: str) -> str:
    told = []
    whole = effects[(effects["pool"] == POOLED) & (effects["versus"] == versus)]
    for row in whole.itertuples():
        word = "lower" if row.effect > 0 else "raise"
        size, ends = abs(row.effect), sorted((row.low, row.high), key=abs)
        sign = 1 if row.effect > 0 else -1
        ends = sorted(sign * end / row.spread for end in ends)
        told.append(f"{word} the loss averaged over {row.averaging} by {size / row.spread:.2f} "
                    f"[{ends[0]:.2f}, {ends[1]:.2f}] of the spread between collections "
                    f"({size:.3f} nats)")  # fmt: skip
    return ", and ".join(told) or "were not compared"


def _followed(effects: pd.DataFrame) -> str:
    whole = effects[(effects["pool"] == POOLED) & (effects["versus"] == "random")]
    if whole.empty or whole["relevance_low"].isna().all():
        return "- Whether the model heeds its prompt more or less was not measured often enough."
    value, low, high = whole[["relevance", "relevance_low", "relevance_high"]].iloc[0]
    word = "more" if low > 0 else "less" if high < 0 else "as much, as far as this run can tell"
    return (f"- The model heeds its prompt {word}: what an answer costs more under another prompt "
            f"changes by {value:+.3f} [{low:+.3f}, {high:+.3f}] nats.")  # fmt: skip


def _claims(verdict: pd.DataFrame) -> str:
    """Claim by claim, behind a click."""
    rows = verdict[verdict["verdict"] != NOT_ASKED].fillna("-")
    cells = [[f"{row.statement}<br>*{row.paper_value}*", str(row.ours).replace("; ", "<br>"),
              f"**{row.verdict}**"] for row in rows.itertuples()]  # fmt: skip
    cells = [[escape(cell, quote=False).replace("&lt;br&gt;", "<br>").replace("|", "/")
              for cell in row] for row in cells]  # fmt: skip
    head: Sequence[str] = ("claim, and *the paper's number*", "this run", "verdict")
    table = "\n".join(markdown_table(head, cells))
    return f"````{{dropdown}} Claim by claim\n{table}\n````\n"
