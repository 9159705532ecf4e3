"""Is a selection better than random draws, and than length alone, and by how much?

Source: our statistical plan, section 6. The paper (v3, Table 3) prints one loss a cell, without an
interval; here every contrast carries one, and the difference that it could have detected. The
pools of one seed share the adapter's first values, the rows' order and the evaluation prompts, so
over pools the seeds are what is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from ..config import InstructMiningError
from .contrasts import (
    ALPHA,
    BOUNDS,
    LEVEL,
    contrast,
    crossed_interval,
    detectable_difference,
    verdict,
)
from .select import TOKENS

PER_EXAMPLE = Mapping[tuple[str, str, int], np.ndarray]
LOSS = "loss_eval_2"  # of the evaluation set that was not used for fitting
ENDS = ("longest", "shortest")  # which of them serves better depends on the pool
_INDEX = ["pool", "method", "size"]


def compare_with_random(
    runs: pd.DataFrame, *, loss: str = LOSS, primary_size: int | None = None,
    per_example: PER_EXAMPLE | None = None, selected: str = "selected", random: str = "random",
) -> pd.DataFrame:  # fmt: skip
    """Every contrast of a set of comparison runs, the primary one of each pool first.

    runs : one row a run, columns pool, method, size (rows), seed and `loss` (nats, > 0; a NaN is a
    diverged run, left out and counted in `lost`). loss : take the evaluation set that was *not*
    used for fitting. primary_size : the size fixed beforehand, needed where `selected` has
    several. per_example : losses by prompt, keyed (pool, method, size), shape (runs, prompts);
    they give a second interval, low_prompts to high_prompts (`contrasts.crossed_interval`).

    Primary: selected against random at that size, Holm over pools. Secondary, unadjusted: the
    same at other sizes, each baseline against random, selected against each baseline; a baseline
    at a size of its own ("full") meets the primary size.

    Returns columns pool, role, method, versus, size, size_versus, n, n_versus, lost, mean,
    mean_versus (nats), p_holm, difference, low, high (relative, 95 %), p, p_margin, detectable, df,
    low_prompts, high_prompts, verdict. `detectable` is the relative difference found with
    80 % power; p_margin below 0.05 says that the difference is smaller than the margin of 1 %.
    """
    groups, lost = _groups(runs, loss)
    plan = list(_contrasts(groups, primary_size, selected, random))
    pools = sum(role == "primary" for role, *_ in plan)
    rows = []
    for role, here, there in plan:
        pair = [(per_example or {}).get(key) for key in (here, there)]
        spread = all(part is not None and len(part) > 1 for part in pair)  # one run has none
        low, high = crossed_interval(*pair) if spread else (np.nan, np.nan)
        # With Holm the first pool must pass alpha / pools: that is what the study can promise.
        alpha = ALPHA / (pools if role == "primary" else 1)
        rows.append({
            "pool": here[0], "role": role, "method": here[1], "versus": there[1],
            "size": here[2], "size_versus": there[2], "n": len(groups[here]),
            "n_versus": len(groups[there]), "lost": lost.get(here, 0) + lost.get(there, 0),
            "mean": groups[here].mean(), "mean_versus": groups[there].mean(),
            "p_holm": np.nan,
            **vars(contrast(groups[here], groups[there], alpha=alpha)),
            "low_prompts": low, "high_prompts": high,
        })
    table = pd.DataFrame(rows)
    first = table["role"] == "primary"
    for p, adjusted in (("p", "p_holm"), ("p_margin", "p_margin")):
        table.loc[first, adjusted] = multipletests(table.loc[first, p], method="holm")[1]
    judged = table["p_holm"].where(first, table["p"])
    found = zip(table["difference"], judged, table["p_margin"], strict=True)
    return table.assign(verdict=[verdict(*one) for one in found])


def _groups(runs: pd.DataFrame, loss: str) -> tuple[dict[tuple, np.ndarray], dict[tuple, int]]:
    """Losses by (pool, method, size), and how many runs of each diverged."""
    missing = [c for c in (*_INDEX, loss) if c not in runs]
    if missing:
        raise InstructMiningError(f"comparison runs lack the columns {missing}")
    if (runs[loss] <= 0).any():
        raise InstructMiningError(f"{loss} must be positive, got {runs[loss].min()}")
    groups, lost = {}, {}
    for key, part in runs.groupby(_INDEX, sort=True):
        values = part[loss].dropna().to_numpy(float)
        lost[key] = len(part) - len(values)
        if len(values):
            groups[key] = values
    return groups, lost


def _contrasts(
    groups: dict[tuple, np.ndarray], primary_size: int | None, selected: str, random: str
) -> Iterator[tuple[str, tuple, tuple]]:
    """(role, key of a group, key of what it is held against), the primary ones first."""
    later = []
    for pool in dict.fromkeys(key[0] for key in groups):
        sizes = [size for p, method, size in groups if (p, method) == (pool, selected)]
        main = sizes[0] if primary_size is None and len(sizes) == 1 else primary_size
        if main not in sizes:
            raise InstructMiningError(
                f"pool {pool!r}: primary size {main} is not among the {selected!r} sizes {sizes}; "
                "name it by primary_size (it is to be fixed before the runs are seen)")
        if (pool, random, main) not in groups:
            raise InstructMiningError(f"pool {pool!r} has no {random!r} runs at size {main}")
        yield "primary", (pool, selected, main), (pool, random, main)
        for key in (k for k in groups if k[0] == pool and k[1] != random):
            same = (pool, random, key[2])
            against = same if same in groups else (pool, random, main)
            if key != (pool, selected, main):
                later.append(("secondary", key, against))
            if key[1] != selected:
                mine = (pool, selected, key[2])
                rival = mine if mine in groups else (pool, selected, main)
                later.append(("secondary", rival, key))
    yield from later


def by_budget(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs to compare at equal rows, and those to compare at equal tokens.

    Methods named `<method>_tokens` (`gate.token_plans`) have the selected rows' number of
    target tokens; in the second frame they go by their plain names, beside the selected runs.
    """
    tokens = runs["method"].str.endswith(TOKENS)
    equal = runs[tokens | (runs["method"] == "selected")]
    equal = equal.assign(method=equal["method"].str.removesuffix(TOKENS))
    return {"equal rows": runs[~tokens]} | ({"equal tokens": equal} if tokens.any() else {})


def compare_budgets(
    runs: pd.DataFrame, per_example: PER_EXAMPLE | None = None, **options: object
) -> pd.DataFrame:
    """`compare_with_random` at equal rows and, where there are such runs, at equal tokens.

    Returns its columns after `budget`, "equal rows" or "equal tokens"; Holm's correction is over
    the pools of one budget.
    """
    parts = []
    for budget, part in by_budget(runs).items():
        matrices = _prompts_by_budget(per_example, budget)
        table = compare_with_random(part, per_example=matrices, **options)
        table.insert(0, "budget", budget)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _prompts_by_budget(matrices: PER_EXAMPLE | None, budget: str) -> PER_EXAMPLE | None:
    """The losses by prompt of one budget's runs, under the method names of `by_budget`."""
    if matrices is None or budget == "equal rows":
        return matrices
    return {
        (pool, method.removesuffix(TOKENS), size): values
        for (pool, method, size), values in matrices.items()
        if method == "selected" or method.endswith(TOKENS)
    }


def selection_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The comparison in the shape of the paper's Table 3 (v3), with what it leaves out.

    runs : columns pool, method, size, seed, loss_eval_1 and loss_eval_2 (nats); `rule` (mean
    predicted log loss of the set), `rows`, `steps`, `tokens_trained` (target tokens, all epochs)
    and `seconds` (training) are averaged where they exist. Returns one row per pool, method and
    size: n, size, those, and per loss its mean and the half-width of the 95 % t interval of that
    mean (`<loss>_half`, NaN for one run).
    """
    rows = []
    extra = [c for c in ("rule", "rows", "steps", "tokens_trained", "seconds") if c in runs]
    for key, part in runs.groupby(_INDEX, sort=False):
        row = dict(zip(_INDEX, key, strict=True)) | {"n": len(part)}
        row |= {name: part[name].mean() for name in extra}
        for name in ("loss_eval_1", "loss_eval_2"):
            values, half = part[name].dropna(), float("nan")
            if len(values) > 1:
                low, high = DescrStatsW(values).tconfint_mean(1 - LEVEL)
                half = (high - low) / 2
            row |= {name: values.mean(), f"{name}_half": half}
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class LengthAnswer:
    """Does the rule beat length alone?

    answer : "yes", "no, length alone is better", "no, they are equal within ±1 %" or "undecided";
        a difference that is real but smaller than the margin says that too
    difference, low, high : relative difference of loss, selected minus length, mean over the
        pools, with its interval over seeds
    detectable : relative difference that would have been found with 80 % power
    low_prompts, high_prompts : the interval with the prompts too as drawn at random
    table : one contrast a pool (`compare_with_random`)
    """

    answer: str
    difference: float
    low: float
    high: float
    p: float
    p_margin: float
    detectable: float
    low_prompts: float
    high_prompts: float
    pools: int
    seeds: int
    table: pd.DataFrame


def beats_length(
    runs: pd.DataFrame, per_example: PER_EXAMPLE | None = None, length: str = ENDS[0]
) -> LengthAnswer:
    """Answer "does the rule beat length alone?" over all pools at the size of their selection.

    runs : as for `compare_with_random`, with method `length` at that size, on some of the same
    seeds. per_example : as there; its rows are the runs in the order of their seeds.

    The log-loss difference of each seed that all pools have on both sides is averaged over the
    pools (which are taken as these pools), then a paired t over seeds: whatever a seed does to
    both sides, or to all pools, is in it. One seed alone gives no interval, so "undecided".
    """
    part = runs[runs["method"].isin(["selected", length])].dropna(subset=[LOSS])
    table = compare_with_random(part, per_example=per_example, random=length)
    table = table.query("role == 'primary'")
    sizes = dict(zip(table["pool"], table["size"], strict=True))
    part = part[part["size"] == part["pool"].map(sizes)]
    logs = part.assign(log=np.log(part[LOSS])).pivot_table(
        index="seed", columns=["method", "pool"], values="log").dropna()  # fmt: skip
    by_seed = (logs["selected"] - logs[length]).mean(axis=1).to_numpy()
    n, mean = len(by_seed), float(np.log1p(table["difference"]).mean())
    se = p = p_margin = low = high = float("nan")
    if n > 1 and by_seed.std() > 0:
        seeds = DescrStatsW(by_seed)
        mean, se, p = float(seeds.mean), seeds.std_mean, float(seeds.ttest_mean()[1])
        p_margin = float(seeds.ttost_mean(*BOUNDS)[0])
        low, high = (float(x) for x in np.expm1(seeds.tconfint_mean(1 - LEVEL)))
    elif n > 1 and not by_seed.any():  # the rule chose these very rows: the runs are the same
        mean, p, p_margin, low, high = 0.0, 1.0, 0.0, 0.0, 0.0
    return LengthAnswer(
        _answer(verdict(mean, p, p_margin)), float(np.expm1(mean)), low, high, p, p_margin,
        detectable_difference(se, n - 1), *_pools_by_prompts(part, per_example, length, sizes),
        len(table), n, table,
    )  # fmt: skip


def both_ends(
    runs: pd.DataFrame, per_example: PER_EXAMPLE | None = None
) -> dict[str, dict[str, LengthAnswer]]:
    """`beats_length` against both ends of length: budget ("equal rows", ...) -> end -> answer."""
    return {
        budget: {
            end: beats_length(part, _prompts_by_budget(per_example, budget), end) for end in ENDS
        }
        for budget, part in by_budget(runs).items()
    }


def answers_table(answers: Mapping[str, Mapping[str, LengthAnswer]]) -> pd.DataFrame:
    """The answers of `both_ends` as a table, a row a budget and end of length."""
    rows = [{"budget": budget, "against": end, **vars(one)}
            for budget, ends in answers.items() for end, one in ends.items()]
    return pd.DataFrame(rows).drop(columns="table").set_index(["budget", "against"])


def _answer(called: str) -> str:
    sign, _, tiny = called.partition(", and ")
    answers = {"better": "yes", "worse": "no, length alone is better", "undecided": "undecided"}
    answer = answers.get(sign, f"no, they are equal {sign}")
    return f"{answer}, but {tiny}" if tiny else answer


def _pools_by_prompts(
    part: pd.DataFrame, matrices: PER_EXAMPLE | None, length: str, sizes: Mapping[str, int]
) -> tuple[float, float]:
    """The crossed interval of the pools' mean loss of each (seed, prompt); NaN where there is none.

    Each side's runs are cut to the seeds that every pool of that side has.
    """
    nan = float("nan")
    if matrices is None:
        return nan, nan
    sides = []
    for method in ("selected", length):
        own = [matrices.get((pool, method, size)) for pool, size in sizes.items()]
        runs = part[part["method"] == method].groupby("pool")["seed"].apply(sorted)
        if any(m is None or len(m) < 2 for m in own) or len({tuple(s) for s in runs}) > 1:
            return nan, nan
        sides.append(np.mean(own, axis=0))
    return crossed_interval(*sides)
