"""How many rows? Loss against set size, its test, and searches for the best size.

Source: paper v3. Figs. 1 and 4 claim a double descent from few points and without a test; the test
is ours (statistical plan, section 9). Its section on BlendSearch (Wang et al. 2021, in FLAML): one
variable, the size of the top-k by rule, log-uniform 512 … 10,000, trial cost = size, objective =
loss on the second evaluation set, which is then reported; trials and budget are unknown. Ours are
counted in trials and rows, never in seconds, so that a search gives the same answer on any machine;
the first trials span the range, as a search that starts at the smallest size spends a small budget
there; and the set searched on is not the one reported.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ..config import InstructMiningError
from .contrasts import ALPHA, LEVEL

DRAWS = 20_000  # simulated curves a boundary shape
STUDIES = 4_000  # simulated studies of a power
_CHUNK = 2_000
_FAR = 100.0  # a step "as large as you like", in standard errors
BLEND, RANDOM = "BlendSearch", "random search"
SPAN = 5  # of the first trials, geometrically from the lowest to the highest size, at most
Evaluate = Callable[[int], float]


@dataclass(frozen=True)
class SizeCurveTest:
    """Does the curve fall, rise and fall again?

    statistic : the largest, over four sizes a < b < c < d, of the *smallest* of the three steps
    (fall a→b, rise b→c, fall c→d), in standard errors; critical, p : simulated at the worst shape
    that is no such curve; sizes : the four, in rows; rise : of the loss from b to c, relative
    (0.03 is 3 %), the largest of many and so flattering. sd : pooled sd of log loss, with df.
    """

    statistic: float
    critical: float
    p: float
    falls_rises_falls: bool
    sizes: tuple[int, int, int, int]
    rise: float
    sd: float
    df: int


def size_curve_test(runs: pd.DataFrame, loss: str, *, seed: int = 0) -> SizeCurveTest:
    """Test one curve for "falls, rises, falls" by a max–min contrast.

    runs : one method and pool, columns size (rows) and `loss` (nats), several draws at each of at
    least 4 sizes. Works on log loss with one pooled variance.

    Null: the curve is anything else. At the boundary one of the three steps is nil over a flat
    stretch while the other two are as large as you like; the critical value is the greatest of
    those of all such shapes.
    """
    logs, variance, df = _pooled(runs.dropna(subset=[loss]), loss)
    sizes, means, counts = logs.index, logs["mean"].to_numpy(), logs["count"].to_numpy()
    if len(sizes) < 4 or df < 2:
        raise InstructMiningError(f"the test needs at least 4 sizes and repeats at them, got "
                                  f"{len(sizes)} sizes and {counts.sum()} runs")
    quads = np.array(list(combinations(range(len(sizes)), 4)))
    scale = np.sqrt(variance)
    statistic, where = _max_min(means[None] / scale, counts, quads)
    rng = np.random.default_rng(seed)
    null = [
        _simulate(shape, counts, df, quads, DRAWS, rng) for shape in _boundary_shapes(len(sizes))
    ]
    critical = max(float(np.quantile(t, 1 - ALPHA)) for t in null)
    p = max(float((1 + (t >= statistic[0]).sum()) / (1 + len(t))) for t in null)
    best = quads[where[0]]
    return SizeCurveTest(
        float(statistic[0]), critical, p, bool(statistic[0] > critical),
        tuple(int(sizes[i]) for i in best), float(np.expm1(means[best[2]] - means[best[1]])),
        float(scale), df,
    )


def size_curve_power(bump: float, *, sizes: int, draws_each: int) -> float:
    """Power of the test at a bump of `bump` seed standard deviations, in [0, 1].

    The curve falls by `bump` from each size to the next, but for one size in the middle where it
    rises by as much: the narrowest bump there is.
    """
    counts = np.full(sizes, draws_each)
    df = sizes * (draws_each - 1)
    quads = np.array(list(combinations(range(sizes), 4)))
    rng = np.random.default_rng(0)
    critical = max(
        float(np.quantile(_simulate(shape, counts, df, quads, 2 * STUDIES, rng), 1 - ALPHA))
        for shape in _boundary_shapes(sizes)
    )
    steps = np.full(sizes - 1, -bump, float)
    steps[(sizes - 1) // 2] = bump
    truth = np.r_[0.0, np.cumsum(steps)]
    return float((_simulate(truth, counts, df, quads, STUDIES, rng) > critical).mean())


def size_means(runs: pd.DataFrame, loss: str) -> pd.DataFrame:
    """Mean loss with a 95 % t interval at each size, per pool and method.

    runs : columns pool, method, size (rows), `loss` (nats). The noise of one curve is pooled
    over its sizes (on log loss), so few draws a size still give an interval; with one draw at
    every size it is NaN. Returns pool, method, size, n, mean, low, high (nats).
    """
    rows = []
    for (pool, method), part in runs.groupby(["pool", "method"], sort=False):
        logs, variance, df = _pooled(part, loss)
        reach = stats.t.isf((1 - LEVEL) / 2, max(df, 1)) * np.sqrt(variance / logs["count"])
        rows.append(pd.DataFrame({
            "pool": pool, "method": method, "size": logs.index, "n": logs["count"],
            "mean": np.exp(logs["mean"]), "low": np.exp(logs["mean"] - reach),
            "high": np.exp(logs["mean"] + reach),
        }))
    return pd.concat(rows, ignore_index=True)


def _pooled(runs: pd.DataFrame, loss: str) -> tuple[pd.DataFrame, float, int]:
    """By size mean, count and var of the log loss; the variance over all sizes, and its df."""
    logs = np.log(runs[loss]).groupby(runs["size"]).agg(["mean", "count", "var"])
    df = int((logs["count"] - 1).sum())
    total = ((logs["count"] - 1) * logs["var"].fillna(0)).sum()
    return logs, float(total / df) if df else np.nan, df


def _max_min(
    scaled: np.ndarray, counts: np.ndarray, quads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The max–min statistic of each row of means, and which four sizes gave it."""
    step = np.sqrt(1 / counts[:, None] + 1 / counts[None, :])
    a, b, c, d = quads.T
    least = np.minimum(
        np.minimum((scaled[:, a] - scaled[:, b]) / step[a, b],
                   (scaled[:, c] - scaled[:, b]) / step[c, b]),
        (scaled[:, c] - scaled[:, d]) / step[c, d],
    )
    return least.max(1), least.argmax(1)


def _boundary_shapes(k: int) -> list[np.ndarray]:
    """Curves that just fail to fall, rise, fall: one step is nil on the longest flat stretch."""
    flat_rise = np.r_[_FAR, np.zeros(k - 2), -_FAR]
    flat_last_fall = np.r_[_FAR, 0.0, np.full(k - 2, _FAR)]
    flat_first_fall = np.r_[np.zeros(k - 2), _FAR, 0.0]
    return [flat_rise, flat_last_fall, flat_first_fall]


def _simulate(
    truth: np.ndarray, counts: np.ndarray, df: int, quads: np.ndarray, draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    out = []
    for start in range(0, draws, _CHUNK):
        n = min(_CHUNK, draws - start)
        means = truth + rng.normal(size=(n, len(truth))) / np.sqrt(counts)
        noise = np.sqrt(rng.chisquare(df, n) / df)
        out.append(_max_min(means / noise[:, None], counts, quads)[0])
    return np.concatenate(out)


def blendsearch(evaluate: Evaluate, low: int, high: int, trials: int, seed: int) -> pd.DataFrame:
    """Search the set size with the lowest loss, between `low` and `high` rows, both included.

    evaluate : size in rows -> loss in nats (NaN or inf: the run diverged, kept as the worst); it
    should remember what it has trained, so that a stopped search goes on where it was. trials : the
    most sizes tried. Half of them, from two to `SPAN`, span the range.

    Returns one row a trial, in order: search, trial (from 1), size, loss (nats), best_loss,
    best_size (so far), cost (rows trained so far). The best loss flatters: see `search_report`.
    """
    _check(low, high, trials)
    rows: list[dict[str, float]] = []

    def one(config: dict[str, int]) -> dict[str, float]:
        size = int(config["size"])
        loss = float(evaluate(size))
        rows.append({"size": size, "loss": loss})
        return {"loss": loss if math.isfinite(loss) else np.inf, "cost": size}

    first = np.geomspace(low, high, min(trials, SPAN, max(2, trials // 2))).round().astype(int)
    with _quiet():
        from flaml import tune
        from flaml.tune.searcher.blendsearch import BlendSearch

        searcher = BlendSearch(
            metric="loss", mode="min", seed=seed, num_samples=trials, cost_attr="cost",
            space={"size": tune.lograndint(low, high + 1)},  # its upper end is left out
            low_cost_partial_config={"size": low},
            points_to_evaluate=[{"size": int(size)} for size in dict.fromkeys(first)],
        )  # fmt: skip
        tune.run(one, search_alg=searcher, metric="loss", mode="min", num_samples=trials,
                 verbose=0, use_ray=False)  # fmt: skip
    return _trial_table(BLEND, rows)


def random_search(evaluate: Evaluate, low: int, high: int, budget: int, seed: int) -> pd.DataFrame:
    """The same by log-uniform draws without repetition, until `budget` rows are trained.

    The draw that reaches the budget still counts, so that no cheaper search is favoured.
    """
    _check(low, high, budget)
    rng, rows, tried = np.random.default_rng(seed), [], set()
    while sum(tried) < budget and len(tried) <= high - low:
        # as BlendSearch's own space: each whole number has its part of the logarithmic range
        size = int(min(high, np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
        if size not in tried:
            tried.add(size)
            rows.append({"size": size, "loss": float(evaluate(size))})
    return _trial_table(RANDOM, rows)


def search_report(
    searches: Mapping[str, pd.DataFrame], runs: pd.DataFrame, *, searched: str, reported: str
) -> pd.DataFrame:
    """What each search found, seen anew on other seeds: how much did it flatter?

    searches : tables of trials by name; runs : of one pool's selected rows on seeds that no search
    used, at each winner's size too, columns pool, method, size, seed and both losses.
    One row a search: trials, cost (rows), best_size, found (the loss it saw), anew with low and
    high (mean of the same loss over the other seeds, `size_means`), optimism (anew - found),
    reported with reported_low and reported_high: the loss that no search saw (all nats).
    """
    anew, other = (size_means(runs, loss).set_index("size") for loss in (searched, reported))
    rows = []
    for name, table in searches.items():
        last = table.iloc[-1]
        here, there = anew.loc[last["best_size"]], other.loc[last["best_size"]]
        rows.append({
            "search": name, "trials": len(table), "cost": last["cost"],
            "best_size": last["best_size"], "found": last["best_loss"], "anew": here["mean"],
            "low": here["low"], "high": here["high"], "optimism": here["mean"] - last["best_loss"],
            "reported": there["mean"], "reported_low": there["low"],
            "reported_high": there["high"],
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("search")


def simulated_searches(
    means: pd.DataFrame, sd: float, low: int, high: int, trials: int, repeats: int
) -> pd.DataFrame:
    """Both searches at equal cost, many times, on a measured curve with its measured noise.

    means : columns size and mean (nats), taken for the truth, log-linear between its sizes; sd : of
    one run's log loss. One row a search, means over the repeats with their standard errors:
    optimism (loss of the winner less the loss that the search saw), excess (loss of the winner less
    the lowest of the curve), cost (rows).
    """
    curve = means.sort_values("size")
    places, logs = np.log(curve["size"].to_numpy(float)), np.log(curve["mean"].to_numpy())

    def truth(size: int) -> float:
        return float(np.exp(np.interp(np.log(size), places, logs)))

    lowest = min(truth(size) for size in range(low, high + 1))
    rows = []
    for repeat in range(repeats):
        rng, seen = np.random.default_rng(repeat), {}

        def noisy(size: int, rng=rng, seen=seen) -> float:
            return seen.setdefault(size, truth(size) * math.exp(rng.normal(0, sd)))

        first = blendsearch(noisy, low, high, trials, repeat)
        for table in (first, random_search(noisy, low, high, int(first["cost"].iloc[-1]), repeat)):
            last = table.iloc[-1]
            won = truth(last["best_size"])
            rows.append({"search": last["search"], "optimism": won - last["best_loss"],
                         "excess": won - lowest, "cost": last["cost"]})  # fmt: skip
    return pd.DataFrame(rows).groupby("search", sort=False).agg(["mean", "sem"])


def _check(low: int, high: int, trials: int) -> None:
    if not 1 <= low < high or trials < 1:
        raise InstructMiningError(
            f"need 1 <= low < high and trials >= 1, got {low}, {high}, {trials}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what FLAML and Optuna log, and give both back their levels afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flaml.automl is not available")
        import flaml.tune  # noqa: F401  (its import sets its loggers up)
        import optuna  # noqa: F401

        theirs = [logging.getLogger(name) for name in logging.root.manager.loggerDict
                  if name.split(".")[0] in ("flaml", "optuna")]  # fmt: skip
        levels = {logger: logger.level for logger in theirs}
        try:
            for logger in levels:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def _trial_table(search: str, rows: list[dict[str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["size", "loss"])
    table.insert(0, "search", search)
    table.insert(1, "trial", np.arange(1, len(table) + 1))
    losses = table["loss"].fillna(np.inf).replace(-np.inf, np.inf)
    table["best_loss"] = losses.cummin()
    first = [int(np.argmin(losses.to_numpy()[: i + 1])) for i in range(len(table))]
    table["best_size"] = table["size"].to_numpy()[first]
    table["cost"] = table["size"].cumsum()
    return table
