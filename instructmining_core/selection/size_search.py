"""Search the size of the selected set by BlendSearch, as the paper does, and by random search.

Source: paper v3, section on BlendSearch (Wang et al. 2021, in FLAML): one variable, the size of the
top-k by rule, log-uniform 512 … 10,000, trial cost = size, objective = loss on the second
evaluation set, which is then reported. Its trials and budget are unknown: ours are counted in
trials and rows, never in seconds, so that a search gives the same answer on any machine. Ours
differs in two points: the first trials span the range, as a search that starts at the smallest size
spends a small budget there; and the set searched on is not the one reported.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pandas as pd

from ..config import InstructMiningError
from .size_curve import size_means

BLEND, RANDOM = "BlendSearch", "random search"
SPAN = 5  # of the first trials, geometrically from the lowest to the highest size, at most
Evaluate = Callable[[int], float]


def blendsearch(evaluate: Evaluate, low: int, high: int, trials: int, seed: int) -> pd.DataFrame:
    """Search the set size with the lowest loss, between `low` and `high` rows, both included.

    evaluate : size in rows -> loss in nats (NaN or inf: the run diverged, kept as the worst); it
    should remember what it has trained, as the ledger does: then a stopped search goes on where it
    was, since its path depends on seed and losses alone. trials : the most sizes tried; fewer when
    the range holds fewer. Half of them, from two to `SPAN`, span the range.

    Returns one row a trial, in order: search, trial (from 1), size, loss (nats), best_loss,
    best_size (so far), cost (rows trained so far).

    The best loss of a search is the least of many noisy ones: it flatters. Evaluate the size found
    anew, on other seeds and the other evaluation set, before reporting it: `search_report`.
    """
    _check(low, high, trials)
    rows: list[dict[str, float]] = []

    def one(config: dict[str, int]) -> dict[str, float]:
        size = int(config["size"])
        loss = float(evaluate(size))
        rows.append({"size": size, "loss": loss})
        return {"loss": loss if math.isfinite(loss) else np.inf, "cost": size}

    with _quiet():
        _run(one, low, high, trials, seed)
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


def _run(one: Callable, low: int, high: int, trials: int, seed: int) -> None:
    from flaml import tune
    from flaml.tune.searcher.blendsearch import BlendSearch

    first = np.geomspace(low, high, min(trials, SPAN, max(2, trials // 2))).round().astype(int)
    searcher = BlendSearch(
        metric="loss",
        mode="min",
        # lograndint leaves its upper end out
        space={"size": tune.lograndint(low, high + 1)},
        low_cost_partial_config={"size": low},
        points_to_evaluate=[{"size": int(size)} for size in dict.fromkeys(first)],
        cost_attr="cost",
        num_samples=trials,
        seed=seed,
    )
    tune.run(
        one, search_alg=searcher, metric="loss", mode="min", num_samples=trials, verbose=0,
        use_ray=False,
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
