"""What part of the improvement to be had does a selection bring? With all that it hangs on.

The improvement to be had is what training on random rows gains over the untuned base; a selection
brings (random - selected) / (base - random) more. Numerator and denominator share the random rows,
the pools and the prompts, so they are drawn again together (statistical plan, section 0, "Rules
that follow").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RESOLVED = 8.0  # standard errors of the improvement from which a share of it is told


class Arms(NamedTuple):
    """Losses of one pool's finetunes by prompt, nats per token, shape (finetunes, prompts).

    selected holds those of refitted rules too, where there are any: then the interval carries the
    rule's own uncertainty.
    """

    selected: np.ndarray
    random: np.ndarray


class Improvement(NamedTuple):
    """share : of the improvement; NaN, with its ends, where that is not `RESOLVED`

    gain : base minus random, with its standard error; effect : random minus selected, both in nats
    """

    share: float
    low: float
    high: float
    gain: float
    gain_se: float
    effect: float
    effect_low: float
    effect_high: float


def improvement(
    pools: Mapping[str, Arms], base: np.ndarray, *, weights: np.ndarray | None = None,
    draws: int = 2000, seed: int = 0,
) -> Improvement:  # fmt: skip
    """The share of the improvement over all pools, with a 95 % interval by joint bootstrap.

    base : the untuned base's loss by prompt, shape (prompts,)
    weights : of the prompts: their tokens, for the mean over tokens; None: the mean over prompts

    Each draw takes pools, in each of them the finetunes of either arm, and the prompts, which all
    pools have in common, again with replacement. A pool counts as much as another.
    """
    weights = np.ones(len(base)) if weights is None else np.asarray(weights, float)
    rng, arms = np.random.default_rng(seed), list(pools.values())
    found = [_once(arms, base, weights)]
    for _ in range(draws):
        some = []
        for k in rng.integers(len(arms), size=len(arms)):
            some.append(Arms(*(one[rng.integers(len(one), size=len(one))] for one in arms[k])))
        times = np.bincount(rng.integers(len(base), size=len(base)), minlength=len(base))
        found.append(_once(some, base, weights * times))
    gain, effect = np.array(found).T
    error = gain[1:].std(ddof=1)
    share = np.full(3, np.nan)
    if gain[0] > RESOLVED * error:
        share = np.r_[effect[0] / gain[0], np.quantile(effect[1:] / gain[1:], [0.025, 0.975])]
    return Improvement(*map(float, (*share, gain[0], error, effect[0],
                                    *np.quantile(effect[1:], [0.025, 0.975]))))  # fmt: skip


def _once(arms: list[Arms], base: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(base minus random, random minus selected), the mean over pools."""
    weights = weights / weights.sum()
    random = np.mean([one.random.mean(axis=0) @ weights for one in arms])
    selected = np.mean([one.selected.mean(axis=0) @ weights for one in arms])
    return base @ weights - random, random - selected
