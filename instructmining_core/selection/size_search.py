"""How many rows? BlendSearch over the size of the selected set, one finetune a trial.

Source: paper v3, section on BlendSearch (Wang et al. 2021, in FLAML): one variable, the size of the
top-k by rule, log-uniform 512 … 10,000, trial cost = size, objective = loss on the second
evaluation set. Its trials and budget are unknown: ours are counted in trials, never in seconds, so
that a search gives the same answer on any machine.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

import numpy as np
import pandas as pd

from .size_curve import SizeCurveTest, gap_trend, size_curve_power, size_curve_test, size_means

__all__ = [
    "SearchError", "SizeCurveTest", "blendsearch", "gap_trend", "size_curve_power",
    "size_curve_test", "size_means",
]


class SearchError(ValueError):
    """The search space or the number of trials makes no sense."""


def blendsearch(
    evaluate: Callable[[int], float],
    low: int,
    high: int,
    trials: int,
    seed: int,
    *,
    cache: MutableMapping[int, float] | None = None,
    on_trial: Callable[[int, float], None] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Search the set size with the lowest loss, between `low` and `high` rows, both included.

    evaluate : size in rows -> loss in nats (NaN or inf: the run diverged, kept as the worst).
    trials : the most sizes tried; fewer when the range holds fewer. cache : size -> loss; known
    sizes are not evaluated again, new ones are added, so a stopped search goes on where it was
    (its path depends on seed and losses alone). on_trial : called after each *new* evaluation.

    Returns one row a trial, in order: trial (from 1), size, loss (nats), best_loss, best_size
    (so far), cost (rows trained so far), cached.

    The best loss of a search is the least of many noisy ones: it flatters. Evaluate the size found
    anew, on other seeds and the other evaluation set, before reporting it.
    """
    if not 1 <= low < high or trials < 1:
        raise SearchError(f"need 1 <= low < high and trials >= 1, got {low}, {high}, {trials}")
    from tqdm.auto import tqdm

    known = {} if cache is None else cache
    rows: list[dict[str, float]] = []
    with _quiet(), tqdm(total=trials, desc="search", unit="trial", disable=not progress) as bar:

        def one(config: dict[str, int]) -> dict[str, float]:
            size = int(config["size"])
            cached = size in known
            if not cached:
                known[size] = float(evaluate(size))
                if on_trial is not None:
                    on_trial(size, known[size])
            rows.append({"size": size, "loss": known[size], "cached": cached})
            bar.update()
            return {"loss": known[size] if math.isfinite(known[size]) else np.inf, "cost": size}

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
    loggers = [logging.getLogger(name) for name in ("optuna", "flaml")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flaml.automl is not available")
        import flaml.tune  # noqa: F401  (its import sets its loggers up)
        import optuna  # noqa: F401

        levels = [logger.level for logger in loggers]
        loggers += [
            logging.getLogger(name) for name in logging.root.manager.loggerDict
            if name.startswith("flaml.")
        ]
        levels += [logger.level for logger in loggers[len(levels):]]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _trial_table(rows: list[dict[str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["size", "loss", "cached"])
    table.insert(0, "trial", np.arange(1, len(table) + 1))
    losses = table["loss"].fillna(np.inf).replace(-np.inf, np.inf)
    table["best_loss"] = losses.cummin()
    first = [int(np.argmin(losses.to_numpy()[: i + 1])) for i in range(len(table))]
    table["best_size"] = table["size"].to_numpy()[first]
    table["cost"] = table["size"].cumsum()
    return table[["trial", "size", "loss", "best_loss", "best_size", "cost", "cached"]]
