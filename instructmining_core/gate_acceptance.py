"""Simulated studies of the beat-random gate: how often it is wrong, how often it sees an effect.

Source: our statistical plan, section 6, which accepts at most 3.5 % false "better" and asks for a
power of 75 % at an effect of 1.6 seed standard deviations, 10 runs against 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .contrasts import MARGIN, crossed_interval, p_values, welch


@dataclass(frozen=True)
class GateDesign:
    """One simulated comparison, in log loss (0.01 is 1 %).

    n_selected, n_random : runs a side; seed_sd : between seeds of one set; draw_sd : between
    random draws, beyond the seed; effect : log loss of selected minus random; pools : how many
    pools share Holm's correction, all with the same effect.
    """

    n_selected: int = 10
    n_random: int = 10
    seed_sd: float = 0.01
    draw_sd: float = 0.01
    effect: float = 0.0
    pools: int = 1


def simulate_gate(
    design: GateDesign, *, studies: int = 20_000, alpha: float = 0.05, seed: int = 0
) -> dict[str, float]:
    """Shares of verdicts over simulated studies.

    Returns `better` (one given pool is called better), `any_better` (at least one pool is),
    `worse`, `equal` (within ±1 %), and `covered` (the interval holds the effect), all in [0, 1].
    """
    rng = np.random.default_rng(seed)
    shape = (studies, design.pools)
    selected = design.effect + rng.normal(0, design.seed_sd, (*shape, design.n_selected))
    spread = np.hypot(design.seed_sd, design.draw_sd)
    difference, se, df = welch(selected, rng.normal(0, spread, (*shape, design.n_random)))
    p, p_margin = p_values(difference, se, df, MARGIN)
    significant = _holm_rows(p) < alpha
    better = significant & (difference < 0)
    p_effect, _ = p_values(difference - design.effect, se, df)
    return {
        "better": float(better[:, 0].mean()),
        "any_better": float(better.any(1).mean()),
        "worse": float((significant & (difference > 0))[:, 0].mean()),
        "equal": float(((_holm_rows(p_margin) < alpha) & ~significant)[:, 0].mean()),
        "covered": float((p_effect[:, 0] > alpha).mean()),
    }


def _holm_rows(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, axis=1)
    stepped = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, axis=1), 1)
    return np.minimum(adjusted, 1)


def simulate_crossed(
    *,
    studies: int = 2_000,
    runs: int = 10,
    prompts: int = 80,
    run_sd: float = 0.01,
    prompt_sd: float = 0.4,
    interaction_sd: float = 0.05,
    rest_sd: float = 0.05,
    seed: int = 0,
) -> dict[str, float]:
    """Coverage of a zero difference when runs *and prompts* are drawn anew in each study.

    Standard deviations are of the loss in nats at a mean of 2. Returns `crossed`, the coverage of
    `crossed_interval`, and `runs_only`, that of the Welch interval, at 95 %.
    """
    rng = np.random.default_rng(seed)
    hits = np.zeros((studies, 2), bool)
    for i in range(studies):
        level = 2 + rng.normal(0, prompt_sd, prompts)
        sides = []
        for _ in range(2):
            by_run = rng.normal(0, run_sd, (runs, 1))
            by_prompt = rng.normal(0, interaction_sd, prompts)
            sides.append(level + by_run + by_prompt + rng.normal(0, rest_sd, (runs, prompts)))
        low, high = crossed_interval(*sides)
        p, _ = p_values(*welch(*(np.log(side.mean(1)) for side in sides)))
        hits[i] = low < 0 < high, p > 0.05
    crossed, runs_only = hits.mean(0)
    return {"crossed": float(crossed), "runs_only": float(runs_only)}


def acceptance(*, studies: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """The table of the gate's acceptance figures: name, value, bound, accepted.

    `studies` simulated comparisons a line (a tenth of them for the crossed interval).
    """
    def rate(name: str, **design: float) -> float:
        return simulate_gate(GateDesign(**design), studies=studies, seed=seed)[name]

    crossed = simulate_crossed(studies=max(studies // 10, 100), seed=seed)
    unequal = {"n_selected": 5, "n_random": 5, "draw_sd": 0.03}
    lines = [
        ("false better, 10 v 10", rate("better"), 0.0, 0.035),
        ("false better in any of 3 pools, 10 v 10", rate("any_better", pools=3), 0.0, 0.035),
        ("false better, 5 v 5, draws 3 × noisier", rate("better", **unequal), 0.0, 0.035),
        ("power at 1.6 seed sd, 10 v 10", rate("better", effect=-0.016), 0.75, 1.0),
        ("the same under Holm over 3 pools", rate("better", effect=-0.016, pools=3), 0.0, 1.0),
        ("coverage of 95 % intervals, 10 v 10", rate("covered", effect=-0.016), 0.94, 0.96),
        ("coverage, new prompts, crossed", crossed["crossed"], 0.93, 0.99),
        ("coverage, new prompts, runs only", crossed["runs_only"], 0.0, 1.0),
    ]
    table = pd.DataFrame(lines, columns=["name", "value", "at_least", "at_most"])
    table["accepted"] = table["value"].between(table["at_least"], table["at_most"])
    return table
