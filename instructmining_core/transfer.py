"""Does the rule carry over, to other evaluation prompts and to other bases? Slopes and a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .card import RuleCard
from .experiments import ladder_sweep
from .intervals import r2_of
from .runs import Standardisation
from .screens import transfer_slope
from .study import Study
from .within import Fit, fit_within

SAME_SETS = ("Every slope is taken over the very sets that the rule was fitted on: it says whether "
             "the rule carries to another base or to other prompts, not whether it holds for new "
             "sets, which is what held-out sources are for.")
EVALUATIONS = {"eval_1": "log_loss", "eval_2": "log_loss_eval_2"}

# (base, evaluation set) -> the runs, with `log_loss` and `log_loss_eval_2`
Settings = Mapping[tuple[str, str], pd.DataFrame]


def settings(study: Study) -> Settings:
    """The runs of every base at hand, once for each evaluation set; the first is the rule's own.

    The other evaluation set costs nothing, its losses are in the ledger. The further bases of the
    profile's ladder are finetuned on the designed sets where `robustness.transfer` asks for it.
    """
    by_base = {study.base_of_sweep()["id"]: study.sweep()}
    if study.profile.robustness.transfer:
        for ref in study.profile.models.ladder:
            by_base[ref.id] = study.joined(ladder_sweep(study, ref))
    return {(base, name): runs for base, runs in by_base.items() for name in EVALUATIONS}


def transfer_table(found: Settings, rule: RuleCard) -> pd.DataFrame:
    """The score of the rule against the loss of every setting, beside the source shares.

    One row a setting: base, evaluation, sets, slope (1 where the rule carries over whole, 0 where
    nothing does; the first row's is 1 by construction) with low and high (these sources), r2
    beyond the shares with r2_low and r2_high, carries. `.attrs["note"]` is to be printed with it.
    """
    rows = []
    for (base, name), runs in found.items():
        fit = transfer_slope(rule.predict(runs), runs, outcome=EVALUATIONS[name])
        one = fit.table().iloc[0]
        r2, r2_low, r2_high = r2_of(fit)
        rows.append({
            "base": base, "evaluation": name, "sets": len(fit.runs), "slope": one["estimate"],
            "low": one["low"], "high": one["high"], "r2": r2, "r2_low": r2_low,
            "r2_high": r2_high, "carries": carries(one["low"], one["high"]) if rows else "fitted",
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["note"] = SAME_SETS
    return table


def carries(low: float, high: float) -> str:
    """The interval of a transfer slope in words."""
    if high < 0:
        return "reversed"
    if not low > 0:
        return "not seen"
    return "in part" if high < 1 else "whole" if low <= 1 else "amplified"


def fits(
    found: Settings, columns: Sequence[str], constants: Standardisation
) -> dict[str, Fit]:
    """The rule fitted anew in every setting, by "base, evaluation set"."""
    return {
        f"{base}, {name}": fit_within(runs, columns, constants, outcome=EVALUATIONS[name])
        for (base, name), runs in found.items()
    }


def coefficient_map(fits: Mapping[str, Fit]) -> pd.DataFrame:
    """Which slopes hold, setting by setting; the first of `fits` is the one that makes claims.

    One row a setting and indicator: setting, name, estimate, low, high (these sources),
    same_sign (as in the first), holds: "claims nothing" where the first interval holds zero, else
    "holds" or "reversed" (the interval here leaves out zero too, on the same or the other side), or
    "not seen".
    The first setting's own rows are "claimed" or "claims nothing".
    """
    tables = {name: fit.table() for name, fit in fits.items()}
    first = next(iter(tables.values()))
    claimed = first["low"] * first["high"] > 0
    parts = []
    for name, table in tables.items():
        same = np.sign(table["estimate"]) == np.sign(first["estimate"])
        clear = table["low"] * table["high"] > 0
        holds = np.select([~claimed, clear & same, clear], ["claims nothing", "holds", "reversed"],
                          "not seen")
        if table is first:
            holds = np.where(claimed, "claimed", "claims nothing")
        part = table[["estimate", "low", "high"]].assign(setting=name, same_sign=same, holds=holds)
        parts.append(part.rename_axis("name").reset_index())
    frame = pd.concat(parts, ignore_index=True)
    return frame[["setting", "name", "estimate", "low", "high", "same_sign", "holds"]]


def transfer_said(found: pd.DataFrame) -> str:
    """The map in one sentence: of the slopes claimed, how many hold in every other setting."""
    claimed = list(found.loc[found["holds"] == "claimed", "name"])
    others = found[found["name"].isin(claimed) & (found["holds"] != "claimed")]
    everywhere = [n for n in claimed if (others.loc[others["name"] == n, "holds"] == "holds").all()]
    turned = list(dict.fromkeys(others.loc[others["holds"] == "reversed", "name"]))
    return (f"{len(claimed)} of {found['name'].nunique()} slopes are claimed "
            f"({', '.join(claimed) or 'none'}); of these {len(everywhere)} hold in every other "
            f"setting ({', '.join(everywhere) or 'none'}), and {len(turned)} turn somewhere "
            f"({', '.join(turned) or 'none'}).")
