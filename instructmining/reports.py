"""Pages in Markdown: a rule card, the verdict on a selection, and the book's front page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.weightstats import DescrStatsW

from instructmining_core.regression.rule_card import RuleCard

from .experiments.comparisons import welch_interval
from .experiments.gate import MATCHED
from .study import Study

KIND_WORDS = {
    "within": "slopes *within* sources: usable to rank rows inside a source or a mixed pool",
    "between": "slopes *between* sources: they rank sources, not rows",
    "pooled": "slopes *pooled* over rows and sources: what the paper's regression gives; they "
              "can't be told from differences between the sources it was fitted on",
}
INTERVALS = (
    "Both intervals hold the slope with 95 % confidence, each of something else. "
    "*These sources*: the slope of the sources that the rule was fitted on, had other sets been "
    "drawn and trained (HC3). "
    "*New sources*: the slope of sources like these that were not seen, by leaving out one source "
    "at a time (jackknife); this is the one to read before using the rule on other data. "
    "VIF tells how many times wider collinearity makes a slope's variance. "
    "An interval that holds 0 does not tell the direction of an effect."
)
FITTED, KNOWN, UNSEEN, UNTOLD = (
    "fitted rows", "unseen rows of a fitted source", "unseen source", "origin unknown",
)  # fmt: skip
NOT_ASKED = "not asked in this run"
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


def card_markdown(card: RuleCard) -> str:
    """The card in Markdown: what it is, coefficients, held-out fit, reach, models, limits."""
    lines = ["# Rule card", "", f"- Kind: **{card.kind}** ({KIND_WORDS[card.kind]}).",
             f"- Fitted on: {_text(fitted_on(card))}", f"- Not for: {_text(card.not_for)}",
             f"- {_permutation(card.permutation_p)}",
             f"- Content: `{card.content_hash}`, schema `{card.schema_name}`"
             + (f", made {_text(card.made_at)}" if card.made_at else "") + "."]
    if card.auto_size:
        lines.append(f"- Number of rows found best by search: {card.auto_size:,}.")
    parts = (_coefficients, _held_out, _reach, _models)
    return "\n".join([*lines, *(line for part in parts for line in ("", *part(card)))]) + "\n"


def fitted_on(card: RuleCard) -> str:
    """What a card's rule was fitted on, in one line."""
    known = card.fitted_on
    parts = [f"profile {known.profile}" if known.profile else "", known.note]
    line = ", ".join(filter(None, parts))
    if known.sets is None:
        return line
    size = f" of {known.set_size} rows" if known.set_size else ""
    sources = f"{len(known.sources)} sources ({', '.join(known.sources)})"
    return f"{line}{': ' if line else ''}{known.sets} sets{size} from {sources}"


def _coefficients(card: RuleCard) -> list[str]:
    scales = card.standardisation
    unit = "per sd of the pool's rows" if scales else "per raw unit"
    start = ("The card gives no intercept: it ranks, and predicts differences only."
             if card.intercept is None else
             f"The pool's mean row is predicted at {card.intercept:.4g}." if scales else
             f"Intercept {card.intercept:.4g}.")
    lines = ["## Coefficients", "", "Change of the predicted "
             f"{_text(card.outcome.replace('_', ' '))} {unit}; lower loss is better. {start}", ""]
    lines += markdown_table(["indicator", "estimate", "these sources, 95 % (HC3)",
                     "new sources, 95 % (jackknife)", "VIF", "range of fitted set means"],
                    [[_text(c.label or c.name), f"{c.estimate:.4g}",
                      _bounds(c.interval_these_sources), _bounds(c.interval_new_sources),
                      _number(c.vif, ".1f"), _bounds(c.range)] for c in card.coefficients])
    lines += ["", INTERVALS]
    if scales:
        lines += ["", "An indicator enters as (value − mean) / sd of the fitting pool's rows.", ""]
        lines += markdown_table(["indicator", "mean", "sd", "version"],
                        [[_text(c.name), f"{scales[c.name].mean:.4g}", f"{scales[c.name].sd:.4g}",
                          _text(c.version or "not given")] for c in card.coefficients])
    return lines


def _held_out(card: RuleCard) -> list[str]:
    if not card.held_out:
        return ["## Held out", "", "No held-out fit is known for this rule."]
    lines = ["## Held out", "", "Fitted without the source, tested on the sets inside it. R² is 1 "
             "for a perfect prediction, 0 for one no better than the source's mean, below 0 where "
             "the rule does harm; the calibration slope is 1 where effects are of the right size, "
             "and its interval is for that source's own sets.", ""]
    return lines + markdown_table(["source", "sets", "R²", "calibration slope", "of it, 95 %"],
                          [[_text(h.source), _number(h.n_sets, "d"), _number(h.r2, ".2f"),
                            _number(h.slope, ".2f"), _bounds(h.slope_interval)]
                           for h in card.held_out])


def _reach(card: RuleCard) -> list[str]:
    design, known = card.design, card.uncertainty
    lines = ["## Reach and noise", ""]
    if not (design and known):
        return [*lines, "The card does not say how far its rule reaches: no distance, no "
                "prediction interval."]
    lines.append(f"Fitted on {design.sets:,} sets; the furthest lies "
                 f"{design.largest_distance:.2f} from their centre (Mahalanobis). "
                 f"What the rule leaves unexplained has an sd of {known.sigma:.3g} "
                 f"({known.df} degrees of freedom).")
    if known.source_sd is not None:
        lines.append(f"The constants of its {known.sources} sources have an sd of "
                     f"{known.source_sd:.3g}, which enters every prediction for a source that "
                     "is not among them.")
    return lines


def _models(card: RuleCard) -> list[str]:
    lines = ["## Models", ""]
    lines += markdown_table(["role", "id", "revision", "stand-in"],
                    [[_text(m.role), _code(m.id), _code(m.revision) if m.revision else
                      "not given", "**stand-in**" if m.stand_in else
                      "trained here" if m.id.startswith("head:") else "no"] for m in card.models]
                    ) if card.models else ["No indicator of this rule needs a model."]
    if any(m.stand_in for m in card.models):
        lines += ["", "A **stand-in** is a small model built on the spot: its values are no guide "
                  "to those of a real model."]
    reference = card.knn_reference
    if reference:
        lines += ["", f"Neighbour distances are measured against {reference.size:,} reference "
                  f"rows, hash `{reference.hash}`."]
    return lines


def _permutation(p: float | None) -> str:
    if p is None:
        return "Permutation test: none is known."
    says = "the indicators add to the source shares" if p <= 0.05 else \
        "**no evidence** that the indicators add anything to the source shares"
    return f"Permutation of the whole procedure: p = {p:.3g}; {says}."


def _bounds(pair: Sequence[float] | None) -> str:
    return "not known" if pair is None else f"{pair[0]:.3g} … {pair[1]:.3g}"


def _number(value: float | None, form: str) -> str:
    return "not known" if value is None else format(value, form)


def _text(words: str) -> str:
    """Text of others in one line, with nothing in it that Markdown would read as its own."""
    return re.sub(r"([\\`*\[\]<>|$])", r"\\\1", " ".join(str(words).split()))


def _code(words: str) -> str:
    """As code; a table's cell can't hold a bar or a backtick even there."""
    return "`" + " ".join(str(words).split()).replace("`", "'").replace("|", "\\|") + "`"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; its cells hold no line break and no bar."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


class PoolKind(NamedTuple):
    """What a pool is to a rule, and what was compared."""

    name: str  # FITTED, KNOWN, UNSEEN or UNTOLD
    why: str


def pool_kind(
    scores: pd.DataFrame, card: RuleCard, fitted: pd.DataFrame | None = None
) -> PoolKind:
    """Whether the rule has seen a pool's rows, their sources, or neither.

    scores : the pool, columns source and row_hash; fitted : the rows that the rule's sets were
    drawn from, the same columns, where they can be had. Sources are compared by name, rows by
    hash. One fitted row makes the pool "fitted rows".
    """
    sources = set(card.fitted_on.sources)
    rows = "the fitted rows are not at hand"
    if fitted is not None:
        if same := int(scores["row_hash"].isin(set(fitted["row_hash"]) - {""}).sum()):
            return PoolKind(FITTED, f"{same} of {len(scores)} rows are among those that the rule's "
                                    "sets came from")  # fmt: skip
        sources |= set(fitted["source"])
        rows = "no row is the same"
    if not sources:
        return PoolKind(UNTOLD, "the card names no source, and its rows are not at hand")
    met = sorted(set(scores["source"]) & sources)
    if met:
        return PoolKind(KNOWN, f"the rule was fitted on rows of {', '.join(met)}; {rows}")
    return PoolKind(UNSEEN, f"none of its sources is among the {len(sources)} that the rule was "
                            f"fitted on; {rows}")  # fmt: skip


def verdict_markdown(
    table: pd.DataFrame, kinds: Mapping[str, PoolKind], card: RuleCard
) -> str:
    """The page, in Markdown; its first line is the answer.

    table : contrasts of `compare_budgets`; kinds : of each pool, see `pool_kind`
    """
    lines = [headline(table), ""]
    lines += [f"- Pool {_text(pool)}: **{kind.name}** ({_text(kind.why)})."
              for pool, kind in kinds.items()]
    lines += [f"- Rule: {card.kind}; fitted on {_text(fitted_on(card))}.",
              f"- Not for: {_text(card.not_for)}.", *_what_it_means(table), ""]  # fmt: skip
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
    primary, failing, found = table[table["role"] == "primary"], [], []
    better = primary["verdict"].str.startswith("better")
    for budget, part in primary.groupby("budget", sort=False):
        found.append(f"at {budget} {_found(part)}")
        if not better[part.index].all():
            failing.append(budget)
    numbers, whole = "; ".join(found), "the selected rows train a better model than random rows"
    if not failing:
        all_tiny = primary["verdict"].str.contains("within").all()
        tiny = ", but by less than 1 %" if all_tiny else ""
        return f"{whole[0].upper()}{whole[1:]}{tiny}: {numbers}."
    if not better.any():
        return f"No evidence that {whole}: {numbers}."
    where = " in every pool" if primary["pool"].nunique() > 1 else ""
    return f"No evidence that {whole}{where} at {' and at '.join(failing)}: {numbers}."


def contrast_line(row: Mapping) -> str:
    """One contrast in a line: verdict, difference, interval, and what could have been seen."""
    difference, low, high = (_signed(row[name]) for name in ("difference", "low", "high"))
    return (f"{row['verdict']}: {difference} [{low}, {high}], could have seen "
            f"{_percent(row['detectable'])}")  # fmt: skip


def _found(part: pd.DataFrame) -> str:
    if len(part) == 1:
        return contrast_line(part.iloc[0])
    better, worse = (part["verdict"].str.startswith(word).sum() for word in ("better", "worse"))
    least, most = _signed(part["difference"].min()), _signed(part["difference"].max())
    return (f"better in {better} and worse in {worse} of {len(part)} pools, differences {least} to "
            f"{most}, could have seen {_percent(part['detectable'].max())} in each")  # fmt: skip


def _what_it_means(table: pd.DataFrame) -> list[str]:
    part = table[table["role"] == "primary"]
    if part["verdict"].str.startswith("better").all():
        return []
    seen = part["detectable"].max()
    if not np.isfinite(seen):
        return ["- With one run a side there is no interval, and nothing could be detected."]
    return [f"- What this rules out: an advantage of {_percent(seen)} or more would have been "
            "found with 80 % power. A smaller one may be there. Until it is seen, random rows are "
            "as good a choice, and cost nothing."]  # fmt: skip


def _rows(part: pd.DataFrame) -> list[str]:
    head = ["pool", "contrast", "runs", "difference", "other prompts", "could have seen",
            "within ±1 %", "verdict"]  # fmt: skip
    rows = [[
        _text(row.pool),
        f"{row.method} against {row.versus}{' (primary)' if row.role == 'primary' else ''}",
        f"{row.n} against {row.n_versus}",
        f"{_signed(row.difference)} {_interval(row.low, row.high)}",
        _interval(row.low_prompts, row.high_prompts), _percent(row.detectable),
        "yes" if row.p_margin < 0.05 else "not shown", f"**{row.verdict}**",
    ] for row in part.itertuples()]  # fmt: skip
    return markdown_table(head, [[cell.replace("|", "/") for cell in row] for row in rows])


def _interval(low: float | None, high: float | None) -> str:
    return f"[{_signed(low)}, {_signed(high)}]" if np.isfinite(low) else "none"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f} %" if np.isfinite(value) else "none"


def _percent(value: float) -> str:
    if not np.isfinite(value):
        return "nothing (one run a side)"
    return f"{100 * value:.{1 if value >= 0.001 else 2}f} %"


EFFECTS = "front.parquet"  # of a run: `gate_effects`, with `facts` beside
AVERAGINGS = {"prompts": "loss_eval_2", "tokens": "loss_eval_2_token"}
POOLED = "all pools"


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
    for (averaging, loss), versus in product(AVERAGINGS.items(), ("random", MATCHED)):
        pools = [_pool(pool, part, loss, versus) for pool, part in runs.groupby("pool")
                 if {"selected", versus} <= set(part["method"])]  # fmt: skip
        if len(pools) > 1:
            pools.append(_together(pd.DataFrame(pools)))
        more = {"versus": versus, "averaging": averaging, "spread": spread_between(sweep, loss)}
        rows += [row | more for row in pools]
    return pd.DataFrame(rows)


def _pool(pool: str, part: pd.DataFrame, loss: str, versus: str) -> dict:
    def arm(method: str, column: str = loss) -> np.ndarray:
        return part.loc[part["method"] == method, column].dropna().to_numpy(float)

    own, other, chance = arm("selected"), arm(versus), arm("random").mean()
    (low, high), worst = welch_interval(other, own), arm("worst")
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
        ends = DescrStatsW(pools[column]).tconfint_mean() if known else (np.nan, np.nan)
        found[f"{start}low"], found[f"{start}high"] = ends
    return found


def _pooled(effects: pd.DataFrame, versus: str) -> pd.DataFrame:
    return effects[(effects["pool"] == POOLED) & (effects["versus"] == versus)]


def verdict_of(effects: pd.DataFrame, versus: str) -> str:
    """"lower", "higher", "depends" on the averaging, or "unclear": of the loss, over all pools.

    A word about the loss needs both averagings, each with an interval off zero (section 7).
    """
    whole = _pooled(effects, versus)
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
    facts = {name: escape(text, quote=False) for name, text in effects.attrs["facts"].items()}
    lines = [
        f"**Does a rule learned as InstructMining learns it pick better rows than chance?** "
        f"{ANSWERS[verdict_of(effects, 'random')]}.", "",
        f"A rule was fitted to {facts['rule']}, and picked rows from {facts['pools']}; "
        f"{facts['base']} was finetuned on them and on rows drawn at random.", "",
        f"- Against random rows they {_against(effects, 'random')}.",
    ]  # fmt: skip
    if (effects["versus"] == MATCHED).any():
        lines.append(f"- Against random rows of the same length they {_against(effects, MATCHED)}.")
    lines += [_followed(effects), "- Whether answers are true this study cannot tell.", ""]
    return "\n".join(lines) + "\n" + _claims(verdict)


def _against(effects: pd.DataFrame, versus: str) -> str:
    told = []
    for row in _pooled(effects, versus).itertuples():
        word, sign = ("lower", 1) if row.effect > 0 else ("raise", -1)
        size, ends = abs(row.effect), sorted(sign * end / row.spread for end in (row.low, row.high))
        told.append(f"{word} the loss averaged over {row.averaging} by {size / row.spread:.2f} "
                    f"[{ends[0]:.2f}, {ends[1]:.2f}] of the spread between collections "
                    f"({size:.3f} nats)")  # fmt: skip
    return ", and ".join(told) or "were not compared"


def _followed(effects: pd.DataFrame) -> str:
    whole = _pooled(effects, "random")
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
    head = ["claim, and *the paper's number*", "this run", "verdict"]
    table = "\n".join(markdown_table(head, cells))
    return f"````{{dropdown}} Claim by claim\n{table}\n````\n"
