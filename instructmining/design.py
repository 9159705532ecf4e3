"""The designed arm of a study: drawn plainly, or the D-optimal sets among many candidates; and the
order in which runs are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.finetuning.sets import TrainingSet, designed_sets
from instructmining_core.regression.planner import d_optimal, half_widths
from instructmining_core.regression.run_table import RankError, Standardizer

from .profile import DesignConfig

Plan = TypeVar("Plan")
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie most evenly between 0 and 1


def of_sources(rows: pd.DataFrame, sources: Sequence[str]) -> pd.DataFrame:
    """The rows of the named sources, all where none is named. Raises for a name that has no row."""
    missing = set(sources) - set(rows["source"])
    if missing:
        raise InstructMiningError(f"no row is of source {sorted(missing)[0]!r}; there are "
                                  f"{', '.join(sorted(rows['source'].unique()))}")
    return rows[rows["source"].isin(sources)] if sources else rows


def interleaved(plans: Sequence[Plan], group_of: Callable[[Plan], Hashable]) -> list[Plan]:
    """The plans so ordered that every prefix holds each group in proportion to its size.

    The i-th of a group's n stands at (i + u)/n of the way; u differs by group, so that groups of
    one size take turns, those met near one another far apart. Groups keep their own order. A study
    that is stopped is thus a smaller one.
    """
    sizes = Counter(group_of(plan) for plan in plans)
    start = {group: (i + 0.5) * GOLDEN % 1 for i, group in enumerate(sizes)}
    met: Counter = Counter()
    places = []
    for plan in plans:
        group = group_of(plan)
        places.append((met[group] + start[group]) / sizes[group])
        met[group] += 1
    return [plans[i] for i in np.argsort(places, kind="stable")]


def drawn(scores: pd.DataFrame, config: DesignConfig, columns: Sequence[str],
          times: int = 1) -> list[TrainingSet]:
    """A plain draw of the design; `times` as many sets from the same sources."""
    return designed_sets(
        scores, times * config.within, times * config.mixed, config.size,
        config.strength, config.seed, columns=columns,
        min_sources=min(8, scores["source"].nunique()),
        sets_per_source=times * config.sets_per_source,
    )  # fmt: skip


def chosen(scores: pd.DataFrame, config: DesignConfig, columns: Sequence[str],
           candidates: int) -> list[TrainingSet]:
    """As many sets as a plain draw has of every source and of mixtures, but D-optimal ones.

    scores : the candidate rows with `row_hash`, `source` and the columns
    candidates : sets drawn to choose from (rounded up to a multiple of the design); a fifth of
    the places is filled at random (`planner.d_optimal`). Each source keeps its number of sets, so
    that each can still be tested alone. 0: the plain draw.
    """
    plain = drawn(scores, config, columns)
    if not candidates:
        return plain
    quota, n = Counter(one.source for one in plain), len(plain)
    terms = len({source for one in plain for source in one.shares}) + len(columns)
    if n < terms:  # before the costly draw
        raise RankError(f"{n} designed sets can't fit {terms} coefficients, however chosen")
    sets = drawn(scores, config, columns, times=max(2, -(-candidates // n)))
    found = d_optimal(design_matrix(sets, scores, columns), n, config.seed,
                      groups=[one.source for one in sets], quota=quota)
    return [sets[i] for i in found]


def design_matrix(sets: Sequence[TrainingSet], scores: pd.DataFrame,
                  columns: Sequence[str]) -> np.ndarray:
    """Source shares, then standardised set means: (sets, sources + columns)."""
    shares = pd.DataFrame([dict(one.shares) for one in sets]).fillna(0.0).sort_index(axis=1)
    rows = scores.drop_duplicates("row_hash")
    place = {one: i for i, one in enumerate(rows["row_hash"])}
    values = Standardizer.fit(scores, columns).transform(rows).to_numpy(float)
    means = [np.nanmean(values[[place[h] for h in one.row_hashes]], axis=0) for one in sets]
    return np.hstack([shares.to_numpy(float), np.array(means)])


def gain(scores: pd.DataFrame, config: DesignConfig, columns: Sequence[str],
         candidates: int = 1000) -> pd.DataFrame:
    """By coefficient, half-width over noise sd: `plain` draw, `chosen` sets, and their ratio.

    95 %, per sd of a row, for the same number of runs; known before any run, whatever the noise
    is. `gain` above 1: choosing makes the interval that many times narrower.
    """
    widths = {
        name: half_widths(design_matrix(sets, scores, columns), 1.0)[-len(columns):]
        for name, sets in (("plain", drawn(scores, config, columns)),
                           ("chosen", chosen(scores, config, columns, candidates)))
    }
    frame = pd.DataFrame(widths, index=pd.Index(list(columns), name="coefficient"))
    return frame.assign(gain=frame["plain"] / frame["chosen"])
