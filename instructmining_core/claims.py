"""From a result to a verdict on a claim: what was seen, and what could have been."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from . import paper
from .study import Study
from .study_files import MissingInput
from .verify import LengthAnswer

HOLDS, FAILS, UNDECIDED, NOT_ASKED = "holds", "does not hold", "undecided", "not asked in this run"


def percent(value: float, low: float, high: float) -> str:
    """A relative change with its interval, in per cent.

    >>> percent(-0.0123, -0.02, -0.004)
    '-1.2 % [-2.0, -0.4]'
    """
    return f"{100 * value:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"


def overall(verdicts: Sequence[str]) -> str:
    """One verdict of several contrasts: unanimous, or how many of each."""
    counts = pd.Series(list(verdicts)).value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items())


def contrasts_claim(contrasts: pd.DataFrame) -> dict[str, str]:
    """Selected against random, one primary contrast a pool (`verify.compare`)."""
    primary = contrasts[contrasts["role"] == "primary"]
    return {
        "ours": "; ".join(f"{r.pool}: {percent(r.difference, r.low, r.high)}"
                          for r in primary.itertuples()),
        "detectable": f"{100 * primary['detectable'].max():.1f} % of the loss",
        "verdict": overall(primary["verdict"]),
    }  # fmt: skip


def length_claim(against: Mapping[str, LengthAnswer]) -> dict[str, str]:
    """The rule against the longest and against the shortest rows (`verify.beats_length`).

    The verdict is that against the end of length which serves better on these pools.
    """
    hardest = max(against.values(), key=lambda answer: answer.difference)
    return {
        "ours": "; ".join(f"{percent(a.difference, a.low, a.high)} against the {name} rows"
                          for name, a in against.items()),
        "detectable": f"{100 * hardest.table['detectable'].max():.1f} % of the loss in one pool",
        "verdict": hardest.answer,
    }  # fmt: skip


def rule_claim(fit, permutation, noise) -> dict[str, str]:
    """Do the indicators add to the source shares? (H0b, `inference.permutation`)"""
    found = permutation.p < 0.05
    return {
        "ours": f"R² {permutation.statistic:.2f} beyond the source shares, p = {permutation.p:.3f}",
        "detectable": f"R² {np.quantile(permutation.null, 0.95):.2f} would have sufficed; the sd "
        f"of a seed is {noise.sd:.4f} [{noise.low:.4f}, {noise.high:.4f}] in log loss",
        "verdict": HOLDS if found else UNDECIDED,
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
        "detectable": f"a slope of {(slope['high'] - slope['low']) / 2:.2f}",
        "verdict": verdict,
    }


def size_claim(means: pd.DataFrame, best: int, rows: int) -> dict[str, str]:
    """Is the size that the search found better than the largest one? From `search.size_means`."""
    chosen = means[means["method"] == "selected"].set_index("size")
    largest = int(chosen.index.max())
    here, there = chosen.loc[best], chosen.loc[largest]
    gap = there["mean"] / here["mean"] - 1
    half = float(np.hypot(here["high"] - here["mean"], there["high"] - there["mean"])
                 / there["mean"])  # fmt: skip
    verdict = UNDECIDED if abs(gap) < half or best == largest else HOLDS if gap > 0 else FAILS
    return {
        "ours": f"search: {best} of {rows} rows; the loss at {largest} rows differs from that at "
        f"{best} by {percent(gap, gap - half, gap + half)}",
        "detectable": f"{100 * half:.1f} % of the loss",
        "verdict": verdict,
    }


def bump_claim(test, power: float, bump: float) -> dict[str, str]:
    """The size curve's test (`search.size_curve_test`) and its power at a bump of given size."""
    return {
        "ours": f"largest rise {100 * test.rise:+.1f} % of the loss, p = {test.p:.2f}",
        "detectable": f"a rise of {bump:.0f} seed-sd with power {power:.2f}",
        "verdict": HOLDS if test.p < 0.05 else UNDECIDED,
    }


def judge_claim(net) -> dict[str, str]:
    """The net win over prompts and pairs of models (`judge.net_win`)."""
    verdict = HOLDS if net.low > 0 else FAILS if net.high < 0 else UNDECIDED
    return {
        "ours": f"net win {net.net:+.2f} [{net.low:+.2f}, {net.high:+.2f}]",
        "detectable": f"a net win of {1.4 * (net.high - net.low) / 2:.2f}",
        "verdict": verdict,
    }


def dose_claim(effects: pd.DataFrame) -> dict[str, str]:
    """Which planted defects raise the loss (`embedded.truth`)."""
    harmful = effects[effects["low"] > 0]
    helpful = effects[effects["high"] < 0]
    names = ", ".join(harmful.index) or "none"
    verdict = HOLDS if len(harmful) == len(effects) else f"{len(harmful)} of {len(effects)} kinds"
    if len(helpful):
        verdict += f"; {', '.join(helpful.index)} lower the loss"
    half = (effects["high"] - effects["low"]).max() / 2
    return {
        "ours": f"the loss rises with the dose of: {names}",
        "detectable": f"{100 * half:.1f} % of the loss",
        "verdict": verdict,
    }


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
    length = next((row for row in rows if row["claim"] == "beats_length"), None)
    lines = [f"This copy shows the profile `{profile}`: {description}", ""]
    if length:
        lines += ["**Does the rule beat length alone?** "
                  f"{str(length['verdict']).capitalize()}: {length['ours']}.", ""]  # fmt: skip
    lines += ["| claim | the paper | this run | could have seen | verdict |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        cells = [row["statement"], row["paper_value"], row["ours"], row["detectable"],
                 f"**{row['verdict']}**"]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
