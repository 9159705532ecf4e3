"""Figures of a study before its rule: the data, the design, one training, what the loss can see."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from .style import (
    AVERAGINGS,
    BLUE,
    GREEN,
    GREY,
    INK,
    LOG_SCALED,
    LOSSES,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    TEAL,
    WIDTH,
    arm_colours,
    colours,
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


# text, centre x, centre y, colour; boxes are 2.5 × 1 in a field of 14 × 7
_BOXES = {
    "sources": ("candidate\nsources", 1.6, 5.6, MUTED),
    "sets": ("training sets:\nmixed and tilted", 5.2, 5.6, TEAL),
    "tune": ("finetune the base\non each set", 8.8, 5.6, TEAL),
    "loss": ("loss on a fixed\nevaluation set", 12.4, 5.6, TEAL),
    "scores": ("indicators\nof every row", 1.6, 3.5, GREEN),
    "means": ("mean indicators\nof each set", 5.2, 3.5, GREEN),
    "rule": ("regression:\nthe rule", 10.6, 3.5, BLUE),
    "pool": ("a pool that was\nnot used so far", 1.6, 1.4, MUTED),
    "score": ("score its rows\nby the rule", 5.2, 1.4, BLUE),
    "select": ("the best rows,\nand random ones", 8.8, 1.4, ORANGE),
    "verdict": ("finetune, compare:\nthe verdict", 12.4, 1.4, PURPLE),
}
_ARROWS = [
    ("sources", "sets"), ("sets", "tune"), ("tune", "loss"), ("sources", "scores"),
    ("scores", "means"), ("sets", "means"), ("means", "rule"), ("loss", "rule"),
    ("pool", "score"), ("rule", "score"), ("score", "select"), ("select", "verdict"),
]


@styled()
def plot_procedure() -> Figure:
    """The study's course, from sources to verdict; the upper half is done once, to fit the rule."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.5))
    ax.set(xlim=(0, 14), ylim=(0.5, 6.7))
    ax.axis("off")
    ax.axhline(2.45, color="#c9cdd2", lw=1, ls=(0, (4, 4)), zorder=0)
    ax.text(0.15, 6.4, "fit the rule", color=MUTED, fontsize=8.5, style="italic")
    ax.text(0.15, 2.16, "use it", color=MUTED, fontsize=8.5, style="italic")
    for text, x, y, colour in _BOXES.values():
        ax.add_patch(FancyBboxPatch(
            (x - 1.25, y - 0.5), 2.5, 1.0, boxstyle="round,pad=0.05,rounding_size=0.16",
            fc=PAPER, ec=colour, lw=1.6, zorder=2,
        ))
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color=INK, zorder=3)
    for here, there in _ARROWS:
        (x0, y0), (x1, y1) = _BOXES[here][1:3], _BOXES[there][1:3]
        # from the edge of one box to that of the next: to the right, or down and slanted
        lean = 0.9 if x1 < x0 else 0
        points = (((x0 + 1.33, y0), (x1 - 1.38, y1)) if y0 == y1 else
                  ((x0 - lean, y0 - 0.58), (x1 + lean, y1 + 0.63)))  # fmt: skip
        ax.add_patch(FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=11, color=MUTED,
                                     lw=1.2, shrinkA=0, shrinkB=0))  # fmt: skip
    return figure


@styled("runs", "coefficient", "half_width", "low", "high", "arm")
def plot_design_half_widths(plan: pd.DataFrame) -> Figure:
    """Half-width of each slope's 95 % interval against the number of runs, with its band.

    plan : columns runs, coefficient, half_width, low, high (log loss per sd), and `arm`, from
    `pilot.planned_half_widths`. NaN widths (too few runs to fit) are not drawn.
    """
    names = list(dict.fromkeys(plan["coefficient"]))
    palette = arm_colours(plan, {"fusion": ORANGE, "designed": BLUE})
    figure, axes = grid(len(names), 3, 1.75, "runs", sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        for arm, colour in palette.items():
            part = plan[(plan["coefficient"] == name) & (plan["arm"] == arm)].sort_values("runs")
            part = part.dropna(subset="half_width")
            ax.plot(part["runs"], part["half_width"], "o-", ms=3, color=colour, label=arm)
            ax.fill_between(part["runs"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
        ax.set_yscale("log")
        ax.set_title(name_of(name))
    figure.supylabel("half-width (log loss per sd), log scale", fontsize=9)
    if len(palette) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right",
                      ncols=len(palette))  # fmt: skip
    return figure


@styled("step", "epoch", "loss", "lr")
def plot_training_curve(curve: pd.DataFrame) -> Figure:
    """Training loss and learning rate of one finetune, step by step; dotted lines end an epoch.

    curve : columns step, epoch (from 1), loss (nats per target token) and lr.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), width_ratios=(1.6, 1))
    left.plot(curve["step"], curve["loss"], "o-", ms=3, color=BLUE)
    left.set(xlabel="step", ylabel="training loss (nats/token)")
    right.plot(curve["step"], curve["lr"], color=TEAL)
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for last in curve.groupby("epoch")["step"].max().iloc[:-1]:
        for ax in (left, right):
            ax.axvline(last + 0.5, color=MUTED, ls=":", lw=1)
    return figure


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
    named = {text: line for ax in axes
             for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=2)
    return figure
