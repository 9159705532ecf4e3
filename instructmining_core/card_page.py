"""A rule card as a page that a reader can judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .card import RuleCard

KIND_WORDS = {
    "within": "slopes *within* sources: usable to rank rows inside a source or a mixed pool",
    "between": "slopes *between* sources: they rank sources, not rows",
    "pooled": "slopes *pooled* over rows and sources: what the paper's regression gives; they "
              "can't be told from differences between the sources it was fitted on",
}


def render(card: RuleCard) -> str:
    """The card in Markdown: what it is, coefficients, held-out fit, models, limits."""
    data = card.data
    lines = ["# Rule card", "", f"- Kind: **{card.kind}** ({KIND_WORDS[card.kind]}).",
             f"- Fitted on: {data['fitted_on']}", f"- Not for: {data['not_for']}",
             f"- {_permutation(data['permutation_p'])}",
             f"- Content: `{card.content_hash}`, schema `{data['schema']}`"
             + (f", made {data['made_at']}" if data.get("made_at") else "") + "."]
    if data.get("auto_size"):
        lines.append(f"- Number of rows found best by search: {data['auto_size']:,}.")
    unit = "per sd of the pool's rows" if data["standardisation"] else "per raw unit"
    lines += ["", "## Coefficients", "", f"Change of predicted log loss {unit}; lower loss is "
              f"better. Intercept {data['intercept']:.4g}.", ""]
    lines += _table(["indicator", "estimate", "these sources, 95 % (HC3)",
                     "new sources, 95 % (jackknife)", "VIF", "range of fitted set means"],
                    [[c.get("label") or c["name"], f"{c['estimate']:.4g}",
                      _bounds(c["interval_these_sources"]), _bounds(c["interval_new_sources"]),
                      _number(c["vif"], ".1f"), _bounds(c["range"])]
                     for c in data["coefficients"]])
    lines += ["", "## Held out", ""]
    if data["held_out"]:
        lines += ["Fitted without the source, tested inside it.", ""]
        lines += _table(["source", "R²", "calibration slope"],
                        [[h["source"], _number(h["r2"], ".2f"), _number(h["slope"], ".2f")]
                         for h in data["held_out"]])
    else:
        lines.append("No held-out fit is known for this rule.")
    lines += ["", "## Models", ""]
    lines += _table(["role", "id", "revision", "stand-in"],
                    [[m["role"], f"`{m['id']}`", f"`{m['revision']}`" if m["revision"] else
                      "not given", "**stand-in**" if m["stand_in"] else "no"]
                     for m in data["models"]])
    reference: Mapping[str, Any] | None = data["knn_reference"]
    if reference:
        lines += ["", f"Neighbour distances are measured against {reference['size']:,} reference "
                  f"rows, hash `{reference['hash']}`."]
    return "\n".join(lines) + "\n"


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
