"""The book's one figure: what selecting gains, pool by pool and over all of them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import BLUE, INK, MUTED, ORANGE, PAPER, WIDTH, rows_axis, styled

AVERAGING = {"prompts": (BLUE, -0.16), "tokens": (ORANGE, 0.0)}  # colour, place in the row
MATCHED_SHIFT = 0.34  # the hollow marks stand this much lower than their filled ones
TICKS = -0.36  # place of the grey ticks in the row, above all marks


@styled("pool", "versus", "averaging", "effect", "low", "high", "spread", "relevance")
def plot_forest(effects: pd.DataFrame) -> Figure:
    """Random minus selected, in units of the spread between collections; above, in nats.

    effects : from `front.gate_effects`. Filled: against random rows; hollow: against random rows of
    the same length; a diamond over all pools. Grey ticks: the untuned base and the rule's worst
    rows, both against random rows. At the right: how much more the model heeds its prompt.
    """
    pools = list(dict.fromkeys(effects["pool"]))
    unit = effects.groupby("averaging")["spread"].first()
    figure, ax = plt.subplots(figsize=(WIDTH, 1.1 + 0.78 * len(pools)))
    for row, pool in enumerate(pools):
        part = effects[effects["pool"] == pool]
        for one in part.itertuples():
            colour, shift = AVERAGING[one.averaging]
            y = row + shift + (MATCHED_SHIFT if one.versus != "random" else 0)
            _mark(ax, one, y, colour, pool == pools[-1] and len(pools) > 1)
        first = part[(part["versus"] == "random") & (part["averaging"] == "prompts")].iloc[0]
        for name in ("base", "worst"):
            if np.isfinite(first.get(name, np.nan)):
                place = first[name] / first["spread"], row + TICKS
                ax.plot(*place, "|", color=MUTED, ms=8, mew=1.3)
                ax.annotate(name, place, (4, 0), va="center", textcoords="offset points",
                            color=MUTED, fontsize=7)  # fmt: skip
        ax.annotate(f"{first['relevance']:+.3f}", (1.01, row), xycoords=("axes fraction", "data"),
                    va="center", color=INK, fontsize=8)  # fmt: skip
    ax.axvline(0, color=INK, lw=0.9)
    rows_axis(ax, pools, 26)
    ax.set_xlabel("random − selected, in units of the spread between collections "
                  "(right of 0: the selected rows are better)")  # fmt: skip
    scale = unit["prompts"]
    above = ax.secondary_xaxis("top", functions=(lambda x: x * scale, lambda x: x / scale))
    above.xaxis.set_major_locator(MaxNLocator(6, prune="both"))
    above.set_xlabel("nats a token (mean over prompts)")
    ax.annotate("heeds the\nprompt more\nby (nats)", (1.01, 1.0), (0, 18), va="bottom", fontsize=7,
                xycoords="axes fraction", textcoords="offset points", color=MUTED)  # fmt: skip
    for name, (colour, _) in AVERAGING.items():
        ax.plot([], [], "o", color=colour, label=f"loss averaged over {name}")
    if (effects["versus"] != "random").any():
        ax.plot([], [], "o", mfc=PAPER, mec=MUTED, label="against random rows of the same length")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _mark(ax, one, y: float, colour: str, whole: bool) -> None:
    """One effect with its interval; `whole`: over all pools."""
    x, low, high = (value / one.spread for value in (one.effect, one.low, one.high))
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [y, y], color=colour, lw=2.0, solid_capstyle="butt", zorder=3)
    face = colour if one.versus == "random" else PAPER
    ax.plot(x, y, "D" if whole else "o", mfc=face, mec=colour, ms=7 if whole else 5.5, zorder=4)
