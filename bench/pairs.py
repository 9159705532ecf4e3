"""What every benchmark shares: sides in turn, the row they give, when they are not comparable."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np


class Disagreement(RuntimeError):
    """The two sides do not compute the same thing: their times may not be compared."""


class Skipped(RuntimeError):
    """The benchmark cannot be measured on this machine; the text says why."""


ENOUGH = 60.0  # seconds after which no further repetition is begun


def full_size() -> bool:
    """Whether benches that do fewer runs and scale them shall do them all: `BENCH_FULL=1`."""
    return bool(os.environ.get("BENCH_FULL"))


def in_turn(sides: dict[str, Callable], repeats: int) -> tuple[dict[str, float], dict, int]:
    """Run the sides one after the other, `repeats` times or until `ENOUGH` seconds have passed.

    returns : median seconds of each side, its last value, and how many repetitions there were
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values, done, begun = {}, 0, time.perf_counter()
    while done < repeats and (not done or time.perf_counter() - begun < ENOUGH):
        done += 1
        for name, side in sides.items():
            start = time.perf_counter()
            values[name] = side()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}, values, done


def largest_difference(ours, theirs, limit: float, what: str) -> float:
    """The largest absolute difference; NaN must stand in the same places.

    Raises Disagreement beyond `limit` or where one side alone has no value.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        raise Disagreement(f"{what}: one side has values where the other has none")
    if np.isnan(ours).all():
        raise Disagreement(f"{what}: no value to compare")
    worst = float(np.nanmax(np.abs(ours - theirs)))
    if not worst <= limit:
        raise Disagreement(f"{what} differ by {worst:.3g}, more than {limit:g}")
    return worst


def row(bench: str, peer: str, ours: float, theirs: float, unit: str, **more) -> dict:
    """A row of results where more is better; `more`: on, data, dtype, template, note, ..."""
    return {
        "bench": bench, "peer": peer, "ours": four(ours), "theirs": four(theirs),
        "ratio": four(ours / theirs), "unit": unit, **more,
    }  # fmt: skip


def limit_row(bench: str, peer: str, ours: float, limit: float, unit: str, **more) -> dict:
    """A row against a limit that `ours` shall stay below."""
    return row(bench, peer, ours, limit, unit, **more) | {"ratio": four(limit / ours)}


def four(number: float) -> float:
    """Four significant digits."""
    return float(f"{number:.4g}")
