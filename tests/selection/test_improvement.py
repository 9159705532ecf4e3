"""The share of the improvement: its value, its interval, and when it is not told."""

from __future__ import annotations

import numpy as np
import pytest

from instructmining_core.selection.improvement import Arms, improvement


def study(rng, pools=8, prompts=120, gain=0.10, effect=0.02, spread=0.01, noise=0.004):
    """Pools whose random rows gain and whose selected rows gain more, each by its own measure."""
    base = rng.normal(1.7, 0.4, prompts)
    hard = rng.normal(1.0, 0.3, prompts)  # of a prompt: how much of a change it takes
    found = {}
    for k in range(pools):
        own = rng.normal(gain, spread), rng.normal(effect, spread)
        random = base - own[0] * hard + rng.normal(0, noise, (5, 1))
        selected = base - (own[0] + own[1]) * hard + rng.normal(0, noise, (5, 1))
        found[f"p{k}"] = Arms(selected + rng.normal(0, 0.02, selected.shape),
                              random + rng.normal(0, 0.02, random.shape))
    return found, base


def test_the_share_is_that_of_the_means():
    pools, base = study(np.random.default_rng(0))
    found = improvement(pools, base, draws=50)
    random = np.mean([one.random.mean() for one in pools.values()])
    selected = np.mean([one.selected.mean() for one in pools.values()])
    assert found.gain == pytest.approx(base.mean() - random)
    assert found.effect == pytest.approx(random - selected)
    assert found.share == pytest.approx(found.effect / found.gain)
    assert found.low < found.share < found.high


def test_the_interval_covers_a_true_share_with_pools_and_prompts_drawn_anew():
    covered, zero = 0, 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        found = improvement(*study(rng), draws=300)
        covered += found.low <= 0.2 <= found.high
        found = improvement(*study(rng, effect=0.0), draws=300)
        zero += found.effect_low <= 0 <= found.effect_high
    # a bootstrap of eight pools is a little narrow: 0.95 would need t
    assert covered >= 0.85 * 120 and zero >= 0.85 * 120


def test_a_share_of_hardly_anything_is_not_told():
    pools, base = study(np.random.default_rng(1), gain=0.002)
    found = improvement(pools, base, draws=200)
    assert np.isnan([found.share, found.low, found.high]).all() and np.isfinite(found.effect)


def test_tokens_weigh_prompts():
    pools, base = study(np.random.default_rng(2))
    tokens = np.zeros(len(base))
    tokens[:10] = 7
    found = improvement(pools, base, weights=tokens, draws=50)
    cut = {name: Arms(one.selected[:, :10], one.random[:, :10]) for name, one in pools.items()}
    assert found.effect == pytest.approx(improvement(cut, base[:10], draws=1).effect)
