"""Search the size of the selected set by BlendSearch, as the paper does.

Source: paper v3, section on BlendSearch (Wang et al. 2021, in FLAML): one variable, the size of the
top-k by rule, log-uniform 512 … 10,000, trial cost = size, objective = loss on the second
evaluation set. Its trials and budget are unknown: ours are counted in trials, never in seconds, so
that a search gives the same answer on any machine.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd

from ..config import InstructMiningError


def blendsearch(
    evaluate: Callable[[int], float], low: int, high: int, trials: int, seed: int
) -> pd.DataFrame:
    """Search the set size with the lowest loss, between `low` and `high` rows, both included.

    evaluate : size in rows -> loss in nats (NaN or inf: the run diverged, kept as the worst); it
    should remember what it has trained, as the ledger does: then a stopped search goes on where it
    was, since its path depends on seed and losses alone. trials : the most sizes tried; fewer when
    the range holds fewer.

    Returns one row a trial, in order: trial (from 1), size, loss (nats), best_loss, best_size
    (so far), cost (rows trained so far).

    The best loss of a search is the least of many noisy ones: it flatters. Evaluate the size found
    anew, on other seeds and the other evaluation set, before reporting it.
    """
    if not 1 <= low < high or trials < 1:
        raise InstructMiningError(
            f"need 1 <= low < high and trials >= 1, got {low}, {high}, {trials}"
        )
    rows: list[dict[str, float]] = []

    def one(config: dict[str, int]) -> dict[str, float]:
        size = int(config["size"])
        loss = float(evaluate(size))
        rows.append({"size": size, "loss": loss})
        return {"loss": loss if math.isfinite(loss) else np.inf, "cost": size}

    with _quiet():
        _run(one, low, high, trials, seed)
    return _trial_table(rows)


def _run(one: Callable, low: int, high: int, trials: int, seed: int) -> None:
    from flaml import tune
    from flaml.tune.searcher.blendsearch import BlendSearch

    mean_size = (high - low) / math.log(high / low)
    searcher = BlendSearch(
        metric="loss",
        mode="min",
        # lograndint leaves its upper end out
        space={"size": tune.lograndint(low, high + 1)},
        low_cost_partial_config={"size": low},
        cost_attr="cost",
        # in rows, as the cost: what that many log-uniform draws would train on
        cost_budget=trials * mean_size,
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


def _trial_table(rows: list[dict[str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["size", "loss"])
    table.insert(0, "trial", np.arange(1, len(table) + 1))
    losses = table["loss"].fillna(np.inf).replace(-np.inf, np.inf)
    table["best_loss"] = losses.cummin()
    first = [int(np.argmin(losses.to_numpy()[: i + 1])) for i in range(len(table))]
    table["best_size"] = table["size"].to_numpy()[first]
    table["cost"] = table["size"].cumsum()
    return table
