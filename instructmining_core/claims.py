"""From a result to a verdict on a claim: what was seen, and what could have been."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import t as student

from . import paper
from .contrasts import detectable_shift
from .gate_claims import (
    FAILS,
    HOLDS,
    NOT_ASKED,
    UNDECIDED,
    bump_claim,
    contrasts_claim,
    judge_claim,
    length_claim,
    overall,
    percent,
    size_claim,
)
from .intervals import r2_detectable, r2_of
from .study import Study
from .study_files import MissingInput

__all__ = [
    "FAILS", "HOLDS", "NOT_ASKED", "UNDECIDED", "bump_claim", "clean_pool_claim",
    "contrasts_claim", "defects_claim", "dose_claim", "front_page", "judge_claim", "length_claim",
    "overall", "percent", "rule_claim", "size_claim", "transfer_claim", "verdicts",
]  # fmt: skip

QUESTIONS = {  # claims that the front page answers before its table
    "beats_length": "Does the rule beat length alone?",
    "finds_defects": "Does the rule find planted defects better than length does?",
}


def rule_claim(fit, permutation, noise) -> dict[str, str]:
    """Do the indicators add to the source shares? (H0b, `inference.permutation`)

    R² and its interval are of all indicators together, p of the search over subsets.
    """
    r2, low, high = r2_of(fit)
    terms = min(4, len(fit.columns))
    needed = r2_detectable(float(np.quantile(permutation.null, 0.95)), terms,
                           fit.ols.df + len(fit.columns) - terms)  # fmt: skip
    return {
        "ours": f"R² {r2:.2f} [{low:.2f}, {high:.2f}] beyond the source shares (these sources); "
        f"permutation of the whole search p = {permutation.p:.2g}",
        "detectable": f"an R² of {needed:.2f}; the sd of a seed is {noise.sd:.4f} "
        f"[{noise.low:.4f}, {noise.high:.4f}] in log loss",
        "verdict": HOLDS if permutation.p < 0.05 else UNDECIDED,
    }


def transfer_claim(summary: pd.DataFrame) -> dict[str, str]:
    """Held-out sources (`inference.summary`): does the rule fitted elsewhere predict them?"""
    if summary["sources"].max() < 2:
        return {"ours": "too few sets within a source to hold one out", "detectable": "-",
                "verdict": NOT_ASKED}  # fmt: skip
    r2, slope = summary.loc["r2"], summary.loc["slope"]
    verdict = HOLDS if slope["low"] > 0 and r2["low"] > 0 else UNDECIDED
    if slope["high"] < 0:
        verdict = FAILS
    return {
        "ours": f"held-out R² {r2['mean']:.2f} [{r2['low']:.2f}, {r2['high']:.2f}], calibration "
        f"slope {slope['mean']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}], "
        f"{slope['sources']:.0f} sources",
        "detectable": f"a slope of {_seen(slope['low'], slope['high'], slope['sources'] - 1):.2f}",
        "verdict": verdict,
    }


def dose_claim(effects: pd.DataFrame) -> dict[str, str]:
    """Which planted defects raise the loss (`embedded.truth`)."""
    harmful = effects[effects["harms"].astype(bool)]
    helpful = effects[effects["high"] < 0]
    verdict = HOLDS if len(harmful) == len(effects) else f"{len(harmful)} of {len(effects)} kinds"
    if len(helpful):
        verdict += f"; {', '.join(helpful.index)} lower the loss"
    seen = max(_seen(r.low, r.high, r.df) for r in effects.itertuples())
    changes = [f"{r.Index} {percent(*np.expm1([r.slope, r.low, r.high]))}"
               for r in effects.sort_values("slope", ascending=False).itertuples()]  # fmt: skip
    return {
        "ours": f"change of the loss at a full dose: {'; '.join(changes)}",
        "detectable": f"{100 * np.expm1(seen):.1f} % of the loss" if seen > 0 else "nothing",
        "verdict": verdict,
    }


def defects_claim(found: Mapping) -> dict[str, str]:
    """Does the rule find planted defects better than length? (`truths.defects_found`)"""
    low, high = found["low"], found["high"]
    verdict = HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED
    word = {HOLDS: "better than", FAILS: "worse than"}.get(verdict, "not told from")
    return {
        "ours": f"AUC within twins {found['rule']} ({found['rows']}, kinds that no stand-in saw), "
        f"{word} taking the {found['rival']} row: {found['difference']:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]; {found['why']}",
        "detectable": f"an AUC difference of {_seen(low, high, found['sources'] - 1):.2f}",
        "verdict": verdict,
    }


def clean_pool_claim(pools: pd.DataFrame) -> dict[str, str]:
    """Where no row is defective, is there no win? (`truths.defect_pools`)"""
    clean = pools[pools["defects"] == 0]
    if clean.empty:
        return {"ours": "no pool is free of defects", "detectable": "-", "verdict": NOT_ASKED}
    row = clean.iloc[0]
    better = row["verdict"].startswith("better")
    word = FAILS if better else UNDECIDED if row["verdict"] == "undecided" else HOLDS
    return {
        "ours": f"selected against random without any defect: "
        f"{percent(row['difference'], row['low'], row['high'])}, {row['verdict']}",
        "detectable": f"{100 * row['detectable']:.1f} % of the loss",
        "verdict": word,
    }


def _seen(low: float, high: float, df: float) -> float:
    """What a t test finds with 80 % power, from a 95 % interval on df degrees of freedom."""
    if not (np.isfinite([low, high]).all() and df > 0):
        return float("nan")
    return detectable_shift((high - low) / 2 / student.isf(0.025, df), df)


def verdicts(study: Study) -> pd.DataFrame:
    """Every claim of the paper with this run's finding; claims that no notebook asked are named."""
    found = {}
    try:
        folder = study.find("claims")
    except MissingInput:
        folder = None
    for path in sorted(folder.glob("*.json")) if folder else []:
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for claim in paper.claims().to_dict("records"):
        ours = found.get(claim["claim"], {"ours": "-", "detectable": "-", "verdict": NOT_ASKED})
        rows.append({**claim, **{k: ours[k] for k in ("ours", "detectable", "verdict")}})
    return pd.DataFrame(rows)


def front_page(verdict: pd.DataFrame, profile: str, description: str) -> str:
    """The front page's generated part, in Markdown: whose run it is, the answer, every verdict."""
    rows = verdict.fillna("-").to_dict("records")
    lines = [f"This copy shows the profile `{profile}`: {description}", ""]
    for row in rows:
        if row["claim"] in QUESTIONS and row["verdict"] != NOT_ASKED:
            lines += [f"**{QUESTIONS[row['claim']]}** "
                      f"{str(row['verdict']).capitalize()}: {row['ours']}.", ""]  # fmt: skip
    lines += ["| claim | this run | could have seen | verdict |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"**{row['statement']}**<br>the paper: {row['paper_value']}",
                 str(row["ours"]).replace("; ", "<br>"),
                 row["detectable"], f"**{row['verdict']}**"]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
