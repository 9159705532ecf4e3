"""Loss against set size: intervals, and the test of "falls, rises, falls".

Source: the paper (v3, Figs. 1 and 4) claims a double descent from few points and without a test.
The test is ours (statistical plan, section 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ..config import InstructMiningError

LEVEL = 0.95  # of the intervals of the means
ALPHA = 0.05  # of the test
DRAWS = 20_000  # simulated curves a boundary shape
STUDIES = 4_000  # simulated studies of a power
_CHUNK = 2_000
_FAR = 100.0  # a step "as large as you like", in standard errors


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
    those of all such shapes, so the test holds its level at every curve that is not of the shape
    (shown by simulation, for equal numbers of draws).
    """
    sizes, means, counts, variance, df = _curve(runs, loss)
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

    runs : columns pool, method, size (rows), seed, `loss` (nats). The noise of one curve is pooled
    over its sizes (on log loss), so few draws a size still give an interval; with one draw at
    every size it is NaN. Returns pool, method, size, n, mean, low, high (nats).
    """
    rows = []
    for (pool, method), part in runs.groupby(["pool", "method"], sort=False):
        logs = np.log(part[loss]).groupby(part["size"]).agg(["mean", "count", "var"])
        df = int((logs["count"] - 1).sum())
        pooled = ((logs["count"] - 1) * logs["var"].fillna(0)).sum() / df if df else np.nan
        reach = stats.t.isf((1 - LEVEL) / 2, max(df, 1)) * np.sqrt(pooled / logs["count"])
        rows.append(pd.DataFrame({
            "pool": pool, "method": method, "size": logs.index, "n": logs["count"].to_numpy(),
            "mean": np.exp(logs["mean"]).to_numpy(),
            "low": np.exp(logs["mean"] - reach).to_numpy(),
            "high": np.exp(logs["mean"] + reach).to_numpy(),
        }))
    return pd.concat(rows, ignore_index=True)


def _curve(runs: pd.DataFrame, loss: str) -> tuple:
    kept = runs.dropna(subset=[loss])
    groups = np.log(kept[loss]).groupby(kept["size"])
    counts = groups.count().to_numpy()
    df = int((counts - 1).sum())
    if len(counts) < 4 or df < 2:
        raise InstructMiningError(
            f"the test needs at least 4 sizes and repeats at them, got {len(counts)} sizes and "
            f"{len(kept)} runs"
        )
    variance = float(((counts - 1) * groups.var().fillna(0).to_numpy()).sum() / df)
    return groups.mean().index.to_numpy(), groups.mean().to_numpy(), counts, variance, df


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
