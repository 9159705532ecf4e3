"""Figures of the data: indicators by source, their correlations, losses by source."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from .style import (
    BLUE,
    GREY,
    INK,
    LOG_SCALED,
    LOSSES,
    MUTED,
    PAPER,
    WIDTH,
    arm_colours,
    draw_interval,
    grid,
    label_of,
    losses_in,
    mean_interval,
    name_of,
    rows_axis,
    styled,
    wrap,
)


@styled("source")
def plot_indicator_distributions(scores: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Spread of each indicator by source: box = quartiles, whiskers = 5th to 95th percentile.

    scores : one row an example, `source` and the indicator columns in their own units; NaN is left
    out. Lengths and perplexity on a log axis; the dotted line is the median over all rows.
    """
    source = scores["source"].astype(str)
    names = sorted(source.unique())
    figure, axes = grid(len(columns), 3, 0.85 + 0.2 * len(names), sharey=True)
    for ax, column in zip(axes, columns, strict=True):
        ax.boxplot(
            [scores.loc[source == n, column].dropna().to_numpy() for n in names],
            positions=range(len(names)), orientation="horizontal", widths=0.62, whis=(5, 95),
            showfliers=False, patch_artist=True, manage_ticks=False,
            boxprops={"facecolor": BLUE, "alpha": 0.45, "edgecolor": BLUE},
            medianprops={"color": INK, "lw": 1.4}, whiskerprops={"color": BLUE},
            capprops={"color": BLUE},
        )
        ax.axvline(scores[column].median(), color=MUTED, ls=":", lw=1.2, zorder=0)
        if column in LOG_SCALED and scores[column].min() > 0:
            _log_axis(ax)
        ax.set_title(label_of(column, 30))
        rows_axis(ax, names)
    return figure


def _log_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    few = np.log10(high / low) < 1.3
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1, 3), numticks=12))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())


@styled("source")
def plot_correlation_map(scores: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Spearman correlations: above the diagonal over all rows, below it within sources.

    scores : one row an example, `source` and the indicator columns. Within sources: of ranks taken
    over all rows, less their mean in the source. A rule for single rows lives below the diagonal.
    """
    ranks = scores[columns].rank()
    over_all = ranks.corr().to_numpy()
    inside = (ranks - ranks.groupby(scores["source"]).transform("mean")).corr().to_numpy()
    values = np.triu(over_all, 1) + np.tril(inside, -1)
    np.fill_diagonal(values, np.nan)
    names = [wrap(name_of(c), 20) for c in columns]
    side = 0.46 * len(names)
    figure, ax = plt.subplots(figsize=(min(WIDTH, side + 2.9), side + 1.2))
    sns.heatmap(
        values, ax=ax, cmap="vlag", vmin=-1, vmax=1, annot=True, fmt=".2f",
        annot_kws={"size": 7}, linewidths=0.8, linecolor=PAPER, square=True,
        xticklabels=names, yticklabels=names,
        cbar_kws={"label": "Spearman correlation", "shrink": 0.6},
    )
    ax.grid(False)
    ax.tick_params(axis="x", rotation=40, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    ax.set_title("above the diagonal: all rows; below: within sources")
    return figure


@styled("source")
def plot_loss_by_source(runs: pd.DataFrame) -> Figure:
    """Loss after finetuning on sets of a single source: each run, and mean with 95 % interval.

    runs : one row a run, `source` ("" or missing for mixtures, which are left out of the rows and
    shown as one row "mixtures") and the losses in nats per token. Rows are in order of the first
    loss. The axis holds every run; the interval of a source with two or three runs may leave it.
    """
    losses = losses_in(runs)
    source = runs["source"].fillna("").astype(str).replace("", "mixtures")
    means = runs.groupby(source)[losses[0]].mean().sort_values()
    order = [n for n in means.index if n != "mixtures"]
    order += ["mixtures"] * ("mixtures" in means.index)
    figure, axes = grid(len(losses), 2, 0.9 + 0.24 * len(order), sharey=True)
    rng = np.random.default_rng(0)
    for ax, loss in zip(axes, losses, strict=True):
        for y, name in enumerate(order):
            values = runs.loc[source == name, loss].dropna()
            colour = GREY if name == "mixtures" else BLUE
            shift = rng.uniform(-0.22, 0.22, len(values))
            ax.scatter(values, y + shift, s=11, color=colour, alpha=0.4, lw=0)
            draw_interval(ax, y, *mean_interval(values), colour)
        room = 0.08 * float(np.ptp(runs[loss].dropna())) or 0.1
        ax.set(xlabel=label_of(loss), xlim=(runs[loss].min() - room, runs[loss].max() + room))
        rows_axis(ax, order)
    return figure


@styled("arm", *LOSSES)
def plot_two_losses(runs: pd.DataFrame) -> Figure:
    """Loss on one evaluation set against loss on the other, a point a run, coloured by arm.

    runs : `arm` and the two losses (nats per token).
    """
    figure, ax = plt.subplots(figsize=(4.6, 4.0))
    scatter_arms(ax, runs, *LOSSES, "best")
    ax.set_title(f"{len(runs)} runs, correlation {runs[list(LOSSES)].corr().iloc[0, 1]:.2f}")
    ax.set(xlabel=label_of(LOSSES[0]), ylabel=label_of(LOSSES[1]))
    return figure


def scatter_arms(ax: Axes, runs: pd.DataFrame, x: str, y: str, corner: str) -> None:
    """A point a run, in the colour of its arm; the arms' names in a corner if there are several."""
    palette = arm_colours(runs)
    for arm, colour in palette.items():
        part = runs[runs["arm"] == arm]
        ax.scatter(part[x], part[y], s=22, color=colour, alpha=0.75, ec=PAPER, lw=0.5, label=arm)
    if len(palette) > 1:
        ax.legend(title="arm", loc=corner)
