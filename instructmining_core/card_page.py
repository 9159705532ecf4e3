"""A rule card as a page that a reader can judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .card import RuleCard

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


def card_markdown(card: RuleCard) -> str:
    """The card in Markdown: what it is, coefficients, held-out fit, reach, models, limits."""
    data = card.data
    lines = ["# Rule card", "", f"- Kind: **{card.kind}** ({KIND_WORDS[card.kind]}).",
             f"- Fitted on: {_text(data['fitted_on'])}", f"- Not for: {_text(data['not_for'])}",
             f"- {_permutation(data['permutation_p'])}",
             f"- Content: `{card.content_hash}`, schema `{data['schema']}`"
             + (f", made {_text(data['made_at'])}" if data.get("made_at") else "") + "."]
    if data.get("auto_size"):
        lines.append(f"- Number of rows found best by search: {data['auto_size']:,}.")
    parts = (_coefficients, _held_out, _reach, _models)
    return "\n".join([*lines, *(line for part in parts for line in ("", *part(card)))]) + "\n"


def _coefficients(card: RuleCard) -> list[str]:
    data, constants = card.data, card.data["standardisation"]
    unit = "per sd of the pool's rows" if constants else "per raw unit"
    start = (f"The pool's mean row is predicted at {data['intercept']:.4g}." if "intercept" in data
             and constants else f"Intercept {data['intercept']:.4g}." if "intercept" in data
             else "The card gives no intercept: it ranks, and predicts differences only.")
    lines = ["## Coefficients", "", f"Change of the predicted {_text(_outcome(data))} {unit}; "
             f"lower loss is better. {start}", ""]
    lines += _table(["indicator", "estimate", "these sources, 95 % (HC3)",
                     "new sources, 95 % (jackknife)", "VIF", "range of fitted set means"],
                    [[_text(c.get("label") or c["name"]), f"{c['estimate']:.4g}",
                      _bounds(c["interval_these_sources"]), _bounds(c["interval_new_sources"]),
                      _number(c["vif"], ".1f"), _bounds(c["range"])]
                     for c in data["coefficients"]])
    lines += ["", INTERVALS]
    if constants:
        lines += ["", "An indicator enters as (value − mean) / sd of the fitting pool's rows.", ""]
        lines += _table(["indicator", "mean", "sd", "version"],
                        [[_text(c["name"]), *(f"{constants[c['name']][k]:.4g}"
                                              for k in ("mean", "sd")),
                          _text(c.get("version") or "not given")] for c in data["coefficients"]])
    return lines


def _held_out(card: RuleCard) -> list[str]:
    if not card.data["held_out"]:
        return ["## Held out", "", "No held-out fit is known for this rule."]
    lines = ["## Held out", "", "Fitted without the source, tested on the sets inside it. R² is 1 "
             "for a perfect prediction, 0 for one no better than the source's mean, below 0 where "
             "the rule does harm; the calibration slope is 1 where effects are of the right size, "
             "and its interval is for that source's own sets.", ""]
    return lines + _table(["source", "sets", "R²", "calibration slope", "of it, 95 %"],
                          [[_text(h["source"]), _number(h.get("n_sets"), "d"),
                            _number(h["r2"], ".2f"), _number(h["slope"], ".2f"),
                            _bounds(h.get("slope_interval"))]
                           for h in card.data["held_out"]])


def _reach(card: RuleCard) -> list[str]:
    design, known = card.data.get("design"), card.data.get("uncertainty")
    lines = ["## Reach and noise", ""]
    if not (design and known):
        return [*lines, "The card does not say how far its rule reaches: no distance, no "
                "prediction interval."]
    lines.append(f"Fitted on {design['sets']:,} sets; the furthest lies "
                 f"{design['largest_distance']:.2f} from their centre (Mahalanobis). "
                 f"What the rule leaves unexplained has an sd of {known['sigma']:.3g} "
                 f"({known['df']} degrees of freedom).")
    if known["source_sd"] is not None:
        lines.append(f"The constants of its {known['sources']} sources have an sd of "
                     f"{known['source_sd']:.3g}, which enters every prediction for a source that "
                     "is not among them.")
    return lines


def _models(card: RuleCard) -> list[str]:
    lines = ["## Models", ""]
    lines += _table(["role", "id", "revision", "stand-in"],
                    [[_text(m["role"]), _code(m["id"]), _code(m["revision"]) if m["revision"] else
                      "not given", "**stand-in**" if m["stand_in"] else "no"]
                     for m in card.data["models"]]
                    ) if card.data["models"] else ["No indicator of this rule needs a model."]
    if any(m["stand_in"] for m in card.data["models"]):
        lines += ["", "A **stand-in** is a small model built on the spot: its values are no guide "
                  "to those of a real model."]
    reference: Mapping[str, Any] | None = card.data["knn_reference"]
    if reference:
        lines += ["", f"Neighbour distances are measured against {reference['size']:,} reference "
                  f"rows, hash `{reference['hash']}`."]
    return lines


def _outcome(data: Mapping[str, Any]) -> str:
    return str(data.get("outcome", "log_loss")).replace("_", " ")


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
