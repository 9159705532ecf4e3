"""Does the rule beat length alone? Selected against the longest or shortest rows, over all pools.

The pools of one seed share the adapter's first values, the rows' order and the evaluation prompts,
so their contrasts are no independent findings: they are averaged within a seed, and the seeds are
what is counted.

The beat-random gate: is a selection better than random draws, and by how much?

Source: our statistical plan, section 6. The paper (v3, Table 3) prints one loss a cell, without an
interval; here every contrast carries one, and the difference that it could have detected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from .contrasts import (
    MARGIN,
    ComparisonError,
    contrast,
    crossed_interval,
    detectable_difference,
    holm,
    p_values,
    verdict,
)
from .select import TOKENS

PER_EXAMPLE = Mapping[tuple[str, str, int], np.ndarray]
_INDEX = ["pool", "method", "size"]


def compare(
    runs: pd.DataFrame,
    *,
    loss: str = "loss_eval_2",
    primary_size: int | Mapping[str, int] | None = None,
    per_example: PER_EXAMPLE | None = None,
    selected: str = "selected",
    random: str = "random",
    margin: float = MARGIN,
    level: float = 0.95,
) -> pd.DataFrame:
    """Every contrast of a set of comparison runs, the primary one of each pool first.

    runs : one row a run, columns pool, method, size (rows), seed and `loss` (nats, > 0; a NaN is a
    diverged run, left out and counted in `lost`). loss : take the evaluation set that was *not*
    used for fitting. primary_size : the size fixed beforehand, needed where `selected` has
    several. per_example : losses by prompt, keyed (pool, method, size), shape (runs, prompts),
    from `experiments.per_example`; they give the second interval, low_prompts to high_prompts,
    which takes the prompts too as drawn at random (`contrasts.crossed_interval`).

    Primary: selected against random at that size, Holm over pools. Secondary, unadjusted: the
    same at other sizes, each baseline against random, selected against each baseline; a baseline
    at a size of its own ("full") meets the primary size.

    Returns columns pool, role, method, versus, size, size_versus, n, n_versus, lost, mean,
    mean_versus (nats), difference, low, high (relative), p, p_holm, p_margin, detectable, df,
    low_prompts, high_prompts, verdict. `detectable` is the relative difference found with 80 %
    power; p_margin below 0.05 says that the difference is smaller than the margin.
    """
    groups, lost = _groups(runs, loss)
    plan = list(_plan(groups, primary_size, selected, random))
    pools = sum(role == "primary" for role, *_ in plan)
    rows = []
    for role, here, there in plan:
        # With Holm the first pool must pass alpha / pools: that is what the study can promise.
        alpha = (1 - level) / (pools if role == "primary" else 1)
        result = contrast(groups[here], groups[there], level=level, margin=margin, alpha=alpha)
        rows.append({
            "pool": here[0], "role": role, "method": here[1], "versus": there[1],
            "size": here[2], "size_versus": there[2], "n": len(groups[here]),
            "n_versus": len(groups[there]), "lost": lost.get(here, 0) + lost.get(there, 0),
            "mean": groups[here].mean(), "mean_versus": groups[there].mean(), **vars(result),
            **_by_prompts(per_example, here, there, level),
        })
    return _judge(pd.DataFrame(rows), 1 - level, margin)


def _groups(runs: pd.DataFrame, loss: str) -> tuple[dict[tuple, np.ndarray], dict[tuple, int]]:
    missing = [c for c in (*_INDEX, loss) if c not in runs]
    if missing:
        raise ComparisonError(f"comparison runs lack the columns {missing}")
    if (runs[loss] <= 0).any():
        raise ComparisonError(f"{loss} must be positive, got {runs[loss].min()}")
    groups, lost = {}, {}
    for key, part in runs.groupby(_INDEX, sort=True):
        values = part[loss].dropna().to_numpy(float)
        lost[key] = len(part) - len(values)
        if len(values):
            groups[key] = values
    return groups, lost


def _plan(
    groups: dict[tuple, np.ndarray],
    primary_size: int | Mapping[str, int] | None,
    selected: str,
    random: str,
) -> Iterator[tuple[str, tuple, tuple]]:
    later = []
    for pool in dict.fromkeys(key[0] for key in groups):
        main = _primary_size(groups, pool, primary_size, selected)
        if (pool, random, main) not in groups:
            raise ComparisonError(f"pool {pool!r} has no {random!r} runs at size {main}")
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


def _primary_size(groups: dict, pool: str, wanted: int | Mapping | None, selected: str) -> int:
    sizes = [size for p, method, size in groups if (p, method) == (pool, selected)]
    size = wanted.get(pool) if isinstance(wanted, Mapping) else wanted
    if size is None and len(sizes) == 1:
        return sizes[0]
    if size not in sizes:
        raise ComparisonError(
            f"pool {pool!r}: primary size {size} is not among the {selected!r} sizes {sizes}; "
            "name it by primary_size (it is to be fixed before the runs are seen)"
        )
    return size


def _by_prompts(
    matrices: PER_EXAMPLE | None, here: tuple, there: tuple, level: float
) -> dict[str, float]:
    low = high = float("nan")
    pair = [(matrices or {}).get(key) for key in (here, there)]
    if all(part is not None and len(part) > 1 for part in pair):  # one run has no spread
        low, high = crossed_interval(*pair, level=level)
    return {"low_prompts": low, "high_prompts": high}


def _judge(table: pd.DataFrame, alpha: float, margin: float) -> pd.DataFrame:
    first = (table["role"] == "primary").to_numpy()
    table["p_holm"] = np.nan
    table.loc[first, "p_holm"] = holm(table.loc[first, "p"])
    table.loc[first, "p_margin"] = holm(table.loc[first, "p_margin"])
    table["verdict"] = [
        verdict(d, h if main else p, m, alpha=alpha, margin=margin)
        for d, p, h, m, main in zip(
            table["difference"], table["p"], table["p_holm"], table["p_margin"], first,
            strict=True,
        )
    ]
    columns = [
        "pool", "role", "method", "versus", "size", "size_versus", "n", "n_versus", "lost",
        "mean", "mean_versus", "difference", "low", "high", "p", "p_holm", "p_margin",
        "detectable", "df", "low_prompts", "high_prompts", "verdict",
    ]
    return table[columns]


def by_budget(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs to compare at equal rows, and those to compare at equal tokens.

    Methods named `<method>_tokens` (`experiments.token_plans`) have the selected rows' number of
    target tokens; in the second frame they go by their plain names, beside the selected runs.
    """
    tokens = runs["method"].str.endswith(TOKENS)
    equal = runs[tokens | (runs["method"] == "selected")]
    equal = equal.assign(method=equal["method"].str.removesuffix(TOKENS))
    return {"equal rows": runs[~tokens], "equal tokens": equal} if tokens.any() else {
        "equal rows": runs
    }


def compare_budgets(
    runs: pd.DataFrame, per_example: PER_EXAMPLE | None = None, **options: object
) -> pd.DataFrame:
    """`compare` at equal rows and, where there are such runs, at equal tokens.

    Returns the columns of `compare` after `budget`, "equal rows" or "equal tokens"; Holm's
    correction is over the pools of one budget.
    """
    parts = []
    for budget, part in by_budget(runs).items():
        matrices = prompts_by_budget(per_example, budget)
        table = compare(part, per_example=matrices, **options)
        table.insert(0, "budget", budget)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def prompts_by_budget(matrices: PER_EXAMPLE | None, budget: str) -> PER_EXAMPLE | None:
    """The losses by prompt of one budget's runs, under the method names of `by_budget`."""
    if matrices is None or budget == "equal rows":
        return matrices
    return {
        (pool, method.removesuffix(TOKENS), size): values
        for (pool, method, size), values in matrices.items()
        if method == "selected" or method.endswith(TOKENS)
    }


def selection_table(
    runs: pd.DataFrame,
    losses: tuple[str, ...] = ("loss_eval_1", "loss_eval_2"),
    level: float = 0.95,
) -> pd.DataFrame:
    """The comparison in the shape of the paper's Table 3 (v3), with what it leaves out.

    runs : columns pool, method, size, seed and the losses (nats); `rule` (mean predicted log loss
    of the set), `rows`, `steps`, `tokens_trained` (target tokens, all epochs) and `seconds`
    (training) are averaged where they exist. Returns one row per pool, method and size: n, size,
    those, and per loss its mean and the half-width of the t
    interval of that mean (`<loss>_half`, NaN for one run).
    """
    rows = []
    extra = [c for c in ("rule", "rows", "steps", "tokens_trained", "seconds") if c in runs]
    for key, part in runs.groupby(_INDEX, sort=False):
        row = dict(zip(_INDEX, key, strict=True)) | {"n": len(part)}
        row |= {name: part[name].mean() for name in extra}
        for name in losses:
            values = part[name].dropna()
            n = len(values)
            half = float("nan")
            if n > 1:
                half = stats.t.isf((1 - level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
            row |= {name: values.mean(), f"{name}_half": half}
        rows.append(row)
    return pd.DataFrame(rows)


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
