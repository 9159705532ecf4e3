"""One look for every figure: one thing has one colour, one name and one unit everywhere."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from instructmining_core.config import InstructMiningError

WIDTH = 7.2  # inches, a page of the book
INK, MUTED, GRID, PAPER = "#24292f", "#6b7280", "#e3e5e8", "#fcfcfb"
BLUE, ORANGE, GREEN, PURPLE = "#1f6fb2", "#cc7722", "#2a8f6b", "#8250a8"
RED, TEAL, OLIVE, ROSE, GREY = "#c0392b", "#1b8a9c", "#8a7a1f", "#c45a92", "#7f868f"
BROWN, SLATE = "#7a4f2b", "#53597a"

METHODS = {
    "selected": BLUE, "random": GREY, "longest": ORANGE, "shortest": TEAL, "matched": BROWN,
    "worst": RED, "ifd": SLATE, "lowest_ppl": GREEN, "reward": ROSE,
    "compression": OLIVE, "full": PURPLE, "BlendSearch": TEAL, "random search": GREY,
    "rule": BLUE, "oracle": INK, "length": ORANGE, "len_out": ORANGE, "ppl": GREEN,
    "log_ppl": GREEN, "perplexity": GREEN,
}
ARMS = {"fusion": ORANGE, "within": BLUE, "mixed": GREEN}
AVERAGINGS = {"prompts": BLUE, "tokens": ORANGE}  # of the loss
OUTCOMES = {"win": BLUE, "tie": "#c9cdd2", "lose": ORANGE, "none": "#eef0f2"}
# estimates: ours in blue and teal, whatever the paper's procedure gives in orange
KINDS = (BLUE, TEAL, ORANGE, PURPLE, GREY)
OTHERS = (TEAL, PURPLE, RED, OLIVE, ROSE, GREEN, ORANGE)

UNITS = {
    "len_in": ("input length", "tokens"),
    "len_out": ("output length", "tokens"),
    "reward": ("reward", "score"),
    "ppl": ("perplexity", ""),
    "log_ppl": ("log perplexity", "nats/token"),
    "mtld": ("lexical diversity, MTLD", "words"),
    "knn_6": ("6th nearest neighbour", "distance"),
    "naturalness": ("naturalness", "probability"),
    "coherence": ("coherence", "probability"),
    "understandability": ("understandability", "probability"),
    "ifd": ("instruction difficulty", "ratio"),
    "compression": ("compression", "ratio"),
    "turns": ("turns", "count"),
    "loss_eval_1": ("loss, evaluation set 1", "nats/token"),
    "loss_eval_2": ("loss, evaluation set 2", "nats/token"),
}
LOSSES = ("loss_eval_1", "loss_eval_2")
LOG_SCALED = ("len_in", "len_out", "ppl")

_RC = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "figure.dpi": 120, "savefig.dpi": 160, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#9aa1a9",
    "axes.linewidth": 0.8, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "figure.titlesize": 10.5, "axes.titlelocation": "left", "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


def styled(*columns: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Make a figure function run under the house style, whatever the caller's settings are.

    columns : that its frame must have, else InstructMiningError. The figure is closed in pyplot: a
    notebook shows it once, as the value of its cell or by `display`.
    """
    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def wrapped(*args, **kwargs) -> Figure:
            missing = [c for c in columns if c not in args[0]]
            if missing or (args and len(args[0]) == 0):
                problem = f"lacks the columns {missing}" if missing else "has no rows"
                raise InstructMiningError(f"the frame for {draw.__name__} {problem}")
            # Pyplot wakes its backend at the first figure, and in a notebook that sets
            # "interactive": woken inside the context, the setting would be undone for the
            # reader's own figures too.
            plt.draw_if_interactive()
            with sns.axes_style("whitegrid"), plt.rc_context(_RC):
                figure = draw(*args, **kwargs)
                # Ticks made while drawing take the settings of that moment: draw while ours hold.
                figure.draw_without_rendering()
            plt.close(figure)
            return figure

        return wrapped

    return decorate


def losses_in(runs: pd.DataFrame) -> list[str]:
    """Those of the two losses that the runs have; both where they have none, to be told of."""
    return [c for c in LOSSES if c in runs] or list(LOSSES)


def name_of(column: str) -> str:
    """Readable name of a column; an unknown one with spaces for underscores."""
    return UNITS.get(column, (column.replace("_", " "), ""))[0]


def label_of(column: str, width: int = 40) -> str:
    """Readable name with its unit, wrapped to `width` characters."""
    name, unit = UNITS.get(column, (column.replace("_", " "), ""))
    return wrap(f"{name} ({unit})" if unit else name, width)


def wrap(text: object, width: int = 22) -> str:
    """Break a long name into lines; underscores and dots are taken for possible breaks."""
    text = str(text).replace("$", r"\$")  # else matplotlib reads a formula
    if len(text) <= width:
        return text
    spaced = text.replace("_", "_\u200b").replace(".", ".\u200b") if " " not in text else text
    lines = textwrap.wrap(spaced.replace("\u200b", " "), width)
    return "\n".join(lines).replace("_ ", "_").replace(". ", ". " if " " in text else ".")


def colours(names: Sequence[str], known: dict[str, str] = METHODS) -> dict[str, str]:
    """A colour for each name: its own where it has one, else the next spare one."""
    own = {n: known[n] for n in names if n in known}
    spare = cycle(c for c in OTHERS if c not in own.values())
    return own | {n: next(spare) for n in names if n not in known}


def arm_colours(frame: pd.DataFrame, known: dict[str, str] = ARMS) -> dict[str, str]:
    """A colour for each of the frame's arms, in the order in which they come."""
    return colours(list(dict.fromkeys(frame["arm"])), known)


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval; the bounds are NaN for fewer than two values."""
    values = pd.Series(values, dtype=float).dropna()
    mean, n = values.mean(), len(values)
    reach = stats.t.isf(0.025, n - 1) * values.sem() if n > 1 else np.nan
    return mean, mean - reach, mean + reach


def draw_interval(
    ax: Axes, y: float, centre: float, low: float, high: float, colour: str, **point
) -> None:
    """A point with a horizontal interval; a NaN bound leaves the point alone."""
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [y, y], color=colour, lw=2.2, solid_capstyle="butt", zorder=3)
    look = {"marker": "o", "ms": 5.5, "mec": PAPER, "mew": 0.9} | point
    ax.plot(centre, y, color=colour, zorder=4, **look)


def grid(
    n: int, columns: int, height: float, xlabel: str = "", **kwargs
) -> tuple[Figure, list[Axes]]:
    """A figure of page width with `n` panels in `columns` columns; `height` inches a row."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False,
                                **kwargs)  # fmt: skip
    flat = list(axes.ravel())
    for ax in flat[n:]:
        ax.remove()
    for ax in flat[max(n - columns, 0) : n]:
        ax.tick_params(axis="x", labelbottom=True)  # also above a panel that is not there
        ax.set_xlabel(xlabel)
    return figure, flat[:n]


def rows_axis(ax: Axes, names: Sequence[object], width: int = 22) -> None:
    """Name the rows of a panel from the top, without lines between them."""
    ax.set_yticks(range(len(names)), [wrap(n, width) for n in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_ylabel("")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
