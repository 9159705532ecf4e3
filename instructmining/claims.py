"""From a result to a verdict on a claim: what was seen, and what could have been."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd
from scipy.stats import t as student

from instructmining_core.regression.inference import r2_detectable, r2_of
from instructmining_core.selection.beat_random import LengthAnswer
from instructmining_core.selection.contrasts import detectable_difference, detectable_shift
from instructmining_core.selection.judge import ABOVE

from . import paper
from .reports import NOT_ASKED
from .study import MissingInput, Study

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
NOT_JUDGED = "no judge was good enough"


def unasked(why: str, verdict: str = NOT_ASKED) -> dict[str, str]:
    """A claim that this run can't judge."""
    return {"ours": why, "detectable": "-", "verdict": verdict}


def _by_interval(low: float, high: float) -> str:
    return HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED


def percent(value: float, low: float, high: float) -> str:
    """A relative change with its interval, in per cent; a narrow one with a second decimal.

    >>> percent(-0.0123, -0.02, -0.004)
    '-1.2 % [-2.0, -0.4]'
    >>> percent(-0.0029, -0.0033, -0.0026)
    '-0.29 % [-0.33, -0.26]'
    >>> percent(0.004, float("nan"), float("nan"))
    '+0.4 % (one run a side, no interval)'
    """
    if not np.isfinite([low, high]).all():
        return f"{100 * value:+.1f} % (one run a side, no interval)"
    digits = 2 if high - low < 0.002 else 1
    value, low, high = (f"{100 * x:+.{digits}f}" for x in (value, low, high))
    return f"{value} % [{low}, {high}]"


def overall(verdicts: Sequence[str]) -> str:
    """One verdict of several contrasts: unanimous, or how many of each."""
    counts = pd.Series(list(verdicts)).value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    return "; ".join(f"{number} {verdict}" for verdict, number in counts.items())


def contrasts_claim(
    contrasts: pd.DataFrame, with_refits: pd.DataFrame | None = None
) -> dict[str, str]:
    """Selected against random, one primary contrast a pool (`compare_with_random`).

    With both budgets of `beat_random.compare_budgets` the verdict names both where they differ.
    with_refits : the same of rules refitted on bootstrapped sweeps, told beside it, since the claim
    is about what the procedure selects and not about one rule.
    """
    primary = contrasts[contrasts["role"] == "primary"]
    budgets = primary["budget"] if "budget" in primary else pd.Series("", primary.index)
    parts = {budget: {
        "ours": "; ".join(f"{r.pool}: {percent(r.difference, r.low, r.high)}"
                          for r in part.itertuples()) + _other_prompts(part),
        "detectable": _of_loss(part["detectable"].max()), "verdict": overall(part["verdict"]),
    } for budget, part in primary.groupby(budgets, sort=False)}  # fmt: skip
    found = next(iter(parts.values())).copy()
    for key in found if len(parts) > 1 else ():
        if key != "verdict" or len({part[key] for part in parts.values()}) > 1:
            found[key] = "; ".join(f"at {budget} {part[key]}" for budget, part in parts.items())
    if with_refits is not None:
        again = with_refits[with_refits["role"] == "primary"]
        least, most = again["low"].min(), again["high"].max()
        found["ours"] += (f"; with the rule refitted {overall(again['verdict'])}, intervals from "
                          f"{100 * least:+.1f} to {100 * most:+.1f} %")  # fmt: skip
    return found


def _other_prompts(primary: pd.DataFrame) -> str:
    """How many of the intervals leave out 0 once the prompts too are taken as drawn at random."""
    if "low_prompts" not in primary or primary["low_prompts"].isna().any():
        return ""
    clear = (primary["low_prompts"] * primary["high_prompts"] > 0).sum()
    return f"; for other prompts too {clear} of {len(primary)} intervals leave out 0"


def length_claim(
    against: Mapping[str, LengthAnswer], at_tokens: Mapping[str, LengthAnswer] | None = None
) -> dict[str, str]:
    """The rule against the longest and against the shortest rows (`beats_length`).

    at_tokens : the same at equal training tokens. The verdict is that against the end of length
    which serves better on these pools; where equal rows and equal tokens give different ones, it
    names both.
    """
    hardest = max(against.values(), key=lambda answer: answer.difference)
    ends = [f"{percent(a.difference, a.low, a.high)} against the {name} rows"
            + (f" ([{100 * a.low_prompts:+.1f}, {100 * a.high_prompts:+.1f}] for other prompts)"
               if np.isfinite(a.low_prompts) else "") for name, a in against.items()]  # fmt: skip
    found = {"ours": "; ".join(ends), "detectable": _of_loss(hardest.detectable),
             "verdict": hardest.answer}  # fmt: skip
    if at_tokens:
        there = length_claim(at_tokens)
        found["ours"] += f"; at equal tokens {there['ours']}"
        found["detectable"] += f", at equal tokens {there['detectable']}"
        if there["verdict"] != found["verdict"]:
            found["verdict"] += f" at equal rows; {there['verdict']} at equal tokens"
    return found


def _of_loss(difference: float) -> str:
    if not np.isfinite(difference):
        return "nothing"
    return f"{100 * difference:.{1 if difference >= 0.001 else 2}f} % of the loss"


def size_claim(
    means: pd.DataFrame, best: int, rows: int, trials: pd.DataFrame | None = None,
    limit: int | None = None,
) -> dict[str, str]:
    """Is the size that the search found better than the largest one of the curve?

    means : `size_means`; best : rows, the search's winner; rows : of the pool; trials, limit :
    `blendsearch`'s table and its largest allowed size, in rows. A search whose best was among the
    largest sizes it tried, below the limit, has found no smallest loss: undecided.
    """
    chosen = means[means["method"] == "selected"].set_index("size")
    largest = int(chosen.index.max())
    here, there = chosen.loc[best], chosen.loc[largest]
    gap = float(np.log(there["mean"] / here["mean"]))
    df = int((chosen["n"] - 1).sum())  # one pooled variance a curve, as in size_means
    half = float(np.hypot(*(np.log(end["high"] / end["mean"]) for end in (here, there))))
    early = _ended_early(best, trials, limit)
    verdict = UNDECIDED if early or best == largest or not abs(gap) > half else (
        HOLDS if gap > 0 else FAILS)  # fmt: skip
    numbers = percent(*(float(np.expm1(x)) for x in (gap, gap - half, gap + half)))
    se = half / student.isf(0.025, df) if df else float("nan")
    against = "no larger set was trained to hold it against" if best == largest else (
        f"the loss at {largest} rows differs from that at {best} by {numbers}")  # fmt: skip
    return {
        "ours": f"search: {best} of {rows} rows{early}; {against}; epochs are fixed, so more rows "
        "also mean more steps",
        "detectable": _of_loss(detectable_difference(se, df)),
        "verdict": f"{verdict}: the search ended early" if early else verdict,
    }


def _ended_early(best: int, trials: pd.DataFrame | None, limit: int | None) -> str:
    """Words for a search whose best size lies within a fifth of the largest tried; "" if not."""
    if trials is None or limit is None:
        return ""
    tried = int(trials["size"].max())
    if tried >= 0.8 * limit or best < 0.8 * tried:
        return ""
    return (f", but its {len(trials)} trials went no higher than {tried} of the {limit} rows "
            "allowed")  # fmt: skip


def bump_claim(test, power: Mapping[float, float]) -> dict[str, str]:
    """The size curve's test (`size_curve_test`) and its power by bump, in seed-sd.

    power : bump -> power (`size_curve_power`); the smallest with 80 % is what could have
    been seen.
    """
    enough = [bump for bump in sorted(power) if power[bump] >= 0.8]
    bump = enough[0] if enough else max(power)
    rise = f"{100 * np.expm1(bump * test.sd):.1f} % of the loss ({bump:g} seed-sd)"
    return {
        "ours": f"largest rise {100 * test.rise:+.1f} % of the loss, p = {test.p:.2f}",
        "detectable": f"a rise of {rise}" if enough
        else f"no rise up to {rise}, where the power is {power[bump]:.2f}",
        "verdict": HOLDS if test.p < 0.05 else UNDECIDED,
    }


def judge_claim(net, checks: pd.DataFrame) -> dict[str, str]:
    """The net win over prompts and pairs of models (`judge.net_win`).

    With fewer than three pairs it is a finding about these models and none about the method.
    checks : of the judge that gave it (`judging.check_judge`). One that is not better than chance
    on each of them, or that no check was made of, judges nothing.
    """
    failed = checks[checks["verdict"] != ABOVE]
    if checks.empty or len(failed):
        why = _agreement(failed) or "not checked against people"
        return unasked(f"the judge is {why}, so that it judges nothing here", NOT_JUDGED)
    verdict = _by_interval(net.low, net.high)
    if verdict != UNDECIDED and net.scope != "the method":
        verdict = f"{verdict}, for {net.scope}"
    return {
        "ours": f"net win {net.net:+.2f} [{net.low:+.2f}, {net.high:+.2f}], of {net.scope}, "
        f"{net.pairs} {'pair' if net.pairs == 1 else 'pairs'} on {net.prompts} prompts; the judge "
        f"is {_agreement(checks)}",
        "detectable": f"a net win of {net.detectable:.2f}",
        "verdict": verdict,
    }


def _agreement(checks: pd.DataFrame) -> str:
    return "; ".join(f"{row.verdict} on {row.check}, agreement {row.agreement:.2f} [{row.low:.2f}, "
                     f"{row.high:.2f}]" for row in checks.itertuples())


def rule_claim(fit, permutation, noise) -> dict[str, str]:
    """Do the indicators add to the source shares? (H0b, `permutation`)

    R² and its interval are of all indicators together, p of the search over subsets.
    """
    (r2, low, high), terms = r2_of(fit), min(4, len(fit.columns))
    needed = r2_detectable(float(np.quantile(permutation.null, 0.95)), terms,
                           fit.df + len(fit.columns) - terms)  # fmt: skip
    return {
        "ours": f"R² {r2:.2f} [{low:.2f}, {high:.2f}] beyond the source shares (these sources); "
        f"permutation of the whole search p = {permutation.p:.2g}",
        "detectable": f"an R² of {needed:.2f}; the sd of a seed is {noise.sd:.4f} "
        f"[{noise.low:.4f}, {noise.high:.4f}] in log loss",
        "verdict": HOLDS if permutation.p < 0.05 else UNDECIDED,
    }


def transfer_claim(held: pd.DataFrame) -> dict[str, str]:
    """Held-out sources (`over_sources`): does the rule fitted elsewhere predict them?"""
    if held["sources"].max() < 2:
        return unasked("too few sets within a source to hold one out")
    r2, slope = held.loc["r2"], held.loc["slope"]
    return {
        "ours": f"held-out R² {r2['mean']:.2f} [{r2['low']:.2f}, {r2['high']:.2f}], calibration "
        f"slope {slope['mean']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}], "
        f"{slope['sources']:.0f} sources",
        "detectable": f"a slope of {_seen(slope['low'], slope['high'], slope['sources'] - 1):.2f}",
        "verdict": _by_interval(slope["low"] if r2["low"] > 0 else -np.inf, slope["high"]),
    }


def dose_claim(effects: pd.DataFrame) -> dict[str, str]:
    """Which planted defects raise the loss (`planted_defects.dose_effects`)."""
    harmful, helpful = int(effects["harms"].sum()), effects[effects["high"] < 0]
    verdict = HOLDS if harmful == len(effects) else f"{harmful} of {len(effects)} kinds"
    if len(helpful):
        verdict += f"; {', '.join(helpful.index)} lower the loss"
    seen = max(_seen(r.low, r.high, r.df) for r in effects.itertuples())
    changes = [f"{r.Index} {percent(*np.expm1([r.slope, r.low, r.high]))}"
               for r in effects.sort_values("slope", ascending=False).itertuples()]  # fmt: skip
    return {
        "ours": f"change of the loss at a full dose: {'; '.join(changes)}",
        "detectable": _of_loss(np.expm1(seen)),
        "verdict": verdict,
    }


def defects_claim(found: Mapping) -> dict[str, str]:
    """Does the rule find planted defects better than length? (`planted_defects.defects_found`)"""
    low, high = found["low"], found["high"]
    verdict = _by_interval(low, high)
    word = {HOLDS: "better than", FAILS: "worse than"}.get(verdict, "not told from")
    # a scorer by length wins a pair where the defective row is at the other end
    end = "longer" if found["rival"] == "shortest" else "shorter"
    harm = "harms" if found["kind_harms"] else "was not seen to harm"
    only = found["harmful"]
    costly = "" if only is None else (
        f"; on the kinds that harm alone the difference is {only['difference']:+.2f} "
        f"[{only['low']:+.2f}, {only['high']:+.2f}]")  # fmt: skip
    return {
        "ours": f"AUC within twins {found['rule']:.2f} [{found['rule_low']:.2f}, "
        f"{found['rule_high']:.2f}] ({found['rows']}, kinds that no stand-in saw), "
        f"{word} taking the {found['rival']} row: {found['difference']:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]; in {found['kind']}, which {harm} the loss, the defective row "
        f"is the {end} one in {100 * found['kind_rival']:.0f} % of the pairs (ties half), and the "
        f"rule finds {100 * found['kind_rule']:.0f} %{costly}",
        "detectable": f"an AUC difference of {_seen(low, high, found['sources'] - 1):.2f}",
        "verdict": verdict,
    }


def clean_pool_claim(pools: pd.DataFrame) -> dict[str, str]:
    """Where no row is defective, is there no win? (`planted_defects.defect_pools`)"""
    clean = pools[pools["defects"] == 0]
    if clean.empty:
        return unasked("no pool is free of defects")
    row, better = clean.iloc[0], clean["verdict"].iloc[0].startswith("better")
    return {
        "ours": f"selected against random without any defect: "
        f"{percent(row['difference'], row['low'], row['high'])}, {row['verdict']}",
        "detectable": _of_loss(row["detectable"]),
        "verdict": FAILS if better else UNDECIDED if row["verdict"] == "undecided" else HOLDS,
    }


def _seen(low: float, high: float, df: float) -> float:
    """What a t test finds with 80 % power, from a 95 % interval on df degrees of freedom."""
    if not (np.isfinite([low, high]).all() and df > 0):
        return float("nan")
    return detectable_shift((high - low) / 2 / student.isf(0.025, df), df)


def verdicts(study: Study) -> pd.DataFrame:
    """Every claim of the paper with this run's finding; claims that no notebook asked are named."""
    paths = []
    with suppress(MissingInput):
        paths = sorted(study.find("claims").glob("*.json"))
    found = pd.DataFrame([json.loads(path.read_text(encoding="utf-8")) for path in paths],
                         columns=["claim", *unasked("-")])  # fmt: skip
    return paper.claims().merge(found, how="left", on="claim").fillna(unasked("-"))
