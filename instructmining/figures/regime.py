"""Figures of what the loss can see: settings of the regime, and answers made worse by dose."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import BLUE, MUTED, ORANGE, colours, grid, name_of, rows_axis, styled, wrap

AVERAGINGS = {"prompts": BLUE, "tokens": ORANGE}  # of the loss


@styled("kind", "layers", "rows", "learning_rate", "loss_regime", "base_regime")
def plot_regime(runs: pd.DataFrame) -> Figure:
    """Gain over the base (nats/token) of every set under every setting, a panel a depth and size.

    runs : from `regime.regime_runs`; full marks are means over prompts, hollow ones over tokens, a
    colour is a learning rate. Right of the line the set lowers the loss.
    """
    first = ("mixture", "other_answer")
    kinds = [*first, *sorted(set(runs["kind"]) - set(first))]
    settings = list(runs.groupby(["layers", "rows"], sort=True))
    figure, axes = grid(len(settings), 2, 0.85 + 0.22 * len(kinds), "gain over the base (nats)",
                        sharey=True, sharex=True)  # fmt: skip
    rates = sorted(runs["learning_rate"].unique())
    palette = colours([f"{rate:g}" for rate in rates])
    for ax, ((layers, rows), part) in zip(axes, settings, strict=True):
        ax.axvline(0, color=MUTED, lw=1)
        for i, rate in enumerate(rates):
            own = part[part["learning_rate"] == rate]
            place = own["kind"].map(kinds.index) + 0.3 * ((i + 0.5) / len(rates) - 0.5)
            for end, face in (("", palette[f"{rate:g}"]), ("_token", "none")):
                ax.scatter(own[f"base_regime{end}"] - own[f"loss_regime{end}"], place, s=22,
                           facecolors=face, edgecolors=palette[f"{rate:g}"],
                           label="" if end else f"rate {rate:g}")  # fmt: skip
        ax.set_title(f"{f'top {layers} layers' if layers else 'all layers'}, {rows} rows")
        rows_axis(ax, [name_of(kind) for kind in kinds])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right",
                  ncols=len(rates))  # fmt: skip
    return figure


@styled("kind", "dose", "rows", "averaging", "left", "clean", "share")
def plot_dose_shares(table: pd.DataFrame) -> Figure:
    """What remains of the gain over the base as more answers are made worse, a panel a kind.

    table : from `planted_defects.dose_shares`. In per cent of the clean sets' gain; in nats where
    that gain is not resolved everywhere. 0 is the base; below it a set harms. A colour is an
    averaging of the loss, a line style a number of rows.
    """
    told = table["share"].notna().all()
    kinds, sizes = list(dict.fromkeys(table["kind"])), sorted(table["rows"].unique())
    figure, axes = grid(len(kinds), 3, 2.1, "answers made worse (%)", sharex=True, sharey=True)
    for i, (ax, kind) in enumerate(zip(axes, kinds, strict=True)):
        ax.axhline(0, color=MUTED, lw=1)
        for (rows, averaging), part in table[table["kind"] == kind].groupby(["rows", "averaging"]):
            part = part.sort_values("dose")
            whole = part["clean"].iloc[0]
            y = 100 * part["share"] if told else part["left"]
            ax.plot(np.r_[0, 100 * part["dose"]], np.r_[100 if told else whole, y], "o",
                    ls=("-", "--", ":")[sizes.index(rows) % 3], ms=4, color=AVERAGINGS[averaging],
                    label=f"{rows} rows, mean over {averaging}")  # fmt: skip
        ax.set_title(wrap(name_of(kind), 26))
        if i % 3 == 0:
            ax.set_ylabel("gain that remains (%)" if told else "gain over the base (nats)")
    handles = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(),
                                                              strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2)
    return figure
