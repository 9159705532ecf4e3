"""Figures of a study before its results: the procedure, the precision to expect, one training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    TEAL,
    WIDTH,
    arm_colours,
    grid,
    name_of,
    styled,
)

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
