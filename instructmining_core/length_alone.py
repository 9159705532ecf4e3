"""Does the rule beat length alone? Selected against the longest or shortest rows, over all pools.

The pools of one seed share the adapter's first values, the rows' order and the evaluation prompts,
so their contrasts are no independent findings: they are averaged within a seed, and the seeds are
what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from .contrasts import MARGIN, crossed_interval, detectable_difference, p_values, verdict
from .verify import PER_EXAMPLE, by_budget, compare, prompts_by_budget

ENDS = ("longest", "shortest")  # which of them serves better depends on the pool


@dataclass(frozen=True)
class LengthAnswer:
    """Does the rule beat length alone?

    answer : "yes", "no, length alone is better", "no, they are equal within ±1 %" or "undecided";
        a difference that is real but smaller than the margin says that too
    difference, low, high : float, relative difference of loss, selected minus length, mean over
        the pools, with its interval over seeds; p, p_margin : float
    detectable : float, relative difference that would have been found with 80 % power
    low_prompts, high_prompts : float, the interval with the prompts too as drawn at random
    pools, seeds : int; table : one contrast a pool (`verify.compare`).
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

    @property
    def sentence(self) -> str:
        """The answer in one line for a front page, with the interval."""
        numbers = (
            f"{100 * self.difference:+.1f} % loss [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        )
        over = "one pool" if self.pools == 1 else f"{self.pools} pools"
        return f"Does the rule beat length alone? {self.answer.capitalize()}: {numbers}, {over}."


def beats_length(
    runs: pd.DataFrame,
    *,
    loss: str = "loss_eval_2",
    primary_size: int | Mapping[str, int] | None = None,
    per_example: PER_EXAMPLE | None = None,
    selected: str = "selected",
    length: str = "longest",
    margin: float = MARGIN,
    level: float = 0.95,
) -> LengthAnswer:
    """Answer "does the rule beat length alone?" over all pools at their primary size.

    runs : as for `compare`, with method `length` at that size, on some of the same seeds.
    per_example : as for `compare`; its rows are the runs in the order of their seeds.

    The log-loss difference of each seed that all pools have on both sides is averaged over the
    pools (which are taken as these pools), then a paired t over seeds: whatever a seed does to
    both sides, or to all pools, is in it. One seed alone gives no interval, so "undecided".
    """
    part = runs[runs["method"].isin([selected, length])].dropna(subset=[loss])
    options = {"selected": selected, "random": length, "margin": margin, "level": level}
    table = compare(
        part, loss=loss, primary_size=primary_size, per_example=per_example, **options
    ).query("role == 'primary'")
    sizes = dict(zip(table["pool"], table["size"], strict=True))
    part = part[part["size"] == part["pool"].map(sizes)]
    by_seed = _differences(part, loss, selected, length)
    n, mean = len(by_seed), float(np.log1p(table["difference"]).mean())
    se = p = p_margin = low = high = float("nan")
    if n > 1 and by_seed.std(ddof=1) > 0:
        mean, se = float(by_seed.mean()), float(by_seed.std(ddof=1) / np.sqrt(n))
        p, p_margin = (float(x) for x in p_values(mean, se, n - 1, margin))
        reach = stats.t.isf((1 - level) / 2, n - 1) * se
        low, high = (float(x) for x in np.expm1([mean - reach, mean + reach]))
    elif n > 1 and not by_seed.any():  # the rule chose these very rows: the runs are the same
        mean, p, p_margin, low, high = 0.0, 1.0, 0.0, 0.0, 0.0
    called = verdict(mean, p, p_margin, alpha=1 - level, margin=margin)
    prompts = _answers_by_prompts(part, per_example, selected, length, sizes, level)
    return LengthAnswer(
        _answer(called), float(np.expm1(mean)), low, high, p, p_margin,
        detectable_difference(se, n - 1, 1 - level), *prompts, len(table), n, table,
    )  # fmt: skip


def both_ends(
    runs: pd.DataFrame, per_example: PER_EXAMPLE | None = None, **options: object
) -> dict[str, dict[str, LengthAnswer]]:
    """`beats_length` against both ends of length: budget ("equal rows", ...) -> end -> answer."""
    return {
        budget: {
            end: beats_length(
                part, length=end, per_example=prompts_by_budget(per_example, budget), **options
            )
            for end in ENDS
        }
        for budget, part in by_budget(runs).items()
    }


def answers_table(answers: Mapping[str, Mapping[str, LengthAnswer]]) -> pd.DataFrame:
    """The answers of `both_ends` as a table, a row a budget and end of length."""
    rows = [
        {"budget": budget, "against": end, **{k: v for k, v in vars(one).items() if k != "table"}}
        for budget, ends in answers.items()
        for end, one in ends.items()
    ]
    return pd.DataFrame(rows).set_index(["budget", "against"])


def _answer(called: str) -> str:
    sign, _, tiny = called.partition(", and ")
    if sign in ("better", "worse"):
        answer = {"better": "yes", "worse": "no, length alone is better"}[sign]
        return f"{answer}, but {tiny}" if tiny else answer
    return "undecided" if sign == "undecided" else f"no, they are equal {sign}"


def _differences(part: pd.DataFrame, loss: str, selected: str, length: str) -> np.ndarray:
    """Log-loss difference of every seed that all pools have on both sides, mean over pools."""
    logs = part.assign(log=np.log(part[loss])).pivot_table(
        index="seed", columns=["method", "pool"], values="log"
    )
    logs = logs.dropna()
    return (logs[selected] - logs[length]).mean(axis=1).to_numpy()


def _answers_by_prompts(
    part: pd.DataFrame, matrices: PER_EXAMPLE | None, selected: str, length: str,
    sizes: Mapping[str, int], level: float,
) -> tuple[float, float]:
    """The crossed interval of the pools' mean loss of each (seed, prompt); NaN where there is none.

    Each side's runs are cut to the seeds that every pool of that side has.
    """
    nan = float("nan")
    if matrices is None:
        return nan, nan
    sides = []
    for method in (selected, length):
        own = [matrices.get((pool, method, size)) for pool, size in sizes.items()]
        runs = part[part["method"] == method].groupby("pool")["seed"].apply(sorted)
        if any(m is None or len(m) < 2 for m in own) or len({tuple(s) for s in runs}) > 1:
            return nan, nan
        sides.append(np.mean(own, axis=0))
    return crossed_interval(*sides, level=level)
