"""Figures of the rule: how indicators and loss go together, and how far that may be believed."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ..paper import R_SQUARED
from .data import scatter_arms
from .style import (
    BLUE,
    GREY,
    INK,
    KINDS,
    MUTED,
    ORANGE,
    OTHERS,
    PAPER,
    WIDTH,
    arm_colours,
    draw_interval,
    grid,
    label_of,
    name_of,
    rows_axis,
    styled,
    wrap,
)


@styled("log_loss", "arm")
def plot_regression_panels(
    runs: pd.DataFrame, columns: Sequence[str], fit: pd.DataFrame
) -> Figure:
    """One panel an indicator: log loss of each set against the set's mean, line with 95 % band.

    runs : one row a run, `log_loss` (log nats/token), the indicator columns (set means), `arm`,
    and `share_<source>`. Both axes are freed of the source shares (added-variable plot), so the
    slope is that within sources.
    fit : by column, estimate, low, high (per sd of a row): printed in the panel's title. For the
    line to be that of a table, give the runs that the table was fitted to.
    """
    shares = runs.filter(regex="^share_")
    palette = arm_colours(runs)
    y = _given(runs["log_loss"], shares)
    figure, axes = grid(len(columns), 3, 2.15, sharey=True)
    for ax, column in zip(axes, columns, strict=True):
        x = _given(runs[column], shares)
        for arm, colour in palette.items():
            own = runs["arm"] == arm
            ax.scatter(x[own], y[own], s=9, color=colour, alpha=0.6, lw=0, label=arm)
        _line(ax, x.to_numpy(), y.to_numpy(), shares.shape[1])
        ax.set_xlabel(label_of(column, 30))
        found = fit.loc[column]
        ax.set_title(f"{found['estimate']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] per sd",
                     fontsize=8)
    if len(palette) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right",
                      ncols=len(palette), markerscale=1.6)  # fmt: skip
    figure.supylabel("log loss (log nats/token), less what the source shares explain", fontsize=9)
    return figure


def _given(values: pd.Series, shares: pd.DataFrame) -> pd.Series:
    design = shares.fillna(0).to_numpy(float)
    known = values.notna().to_numpy()
    beta, *_ = np.linalg.lstsq(design[known], values[known].astype(float), rcond=None)
    return values.astype(float) - design @ beta


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, spent: int) -> None:
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    df = len(x) - 1 - spent
    if df < 1 or x.std() == 0:
        return
    slope, intercept = np.polyfit(x, y, 1)
    at = np.linspace(x.min(), x.max(), 50)
    noise = np.sqrt(((y - intercept - slope * x) ** 2).sum() / df)
    spread = 1 / len(x) + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    reach = stats.t.isf(0.025, df) * noise * np.sqrt(spread)
    middle = intercept + slope * at
    ax.plot(at, middle, color=INK, lw=1.5)
    ax.fill_between(at, middle - reach, middle + reach, color=INK, alpha=0.15, lw=0)


@styled("name", "estimate", "low", "high", "kind")
def plot_coefficients(estimates: pd.DataFrame) -> Figure:
    """Coefficients with 95 % intervals, one row an indicator, one colour a kind of estimate.

    estimates : columns name, estimate, low, high (log loss per sd of the indicator) and kind.
    Indicators that a procedure did not choose have no mark.
    """
    kinds, names = (list(dict.fromkeys(estimates[column])) for column in ("kind", "name"))
    height = 1.1 + len(names) * (0.16 + 0.1 * len(kinds))
    figure, ax = plt.subplots(figsize=(WIDTH, height))
    ax.axvline(0, color=MUTED, lw=1)
    palette = kind_colours(kinds)
    for k, kind in enumerate(kinds):
        shift = (k - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
        for row in estimates[estimates["kind"] == kind].itertuples():
            y = names.index(row.name) + shift
            draw_interval(ax, y, row.estimate, row.low, row.high, palette[kind])
        ax.plot([], [], "o-", color=palette[kind], lw=2.2, ms=5.5, label=wrap(kind, 34))
    rows_axis(ax, [name_of(n) for n in names], 26)
    ax.set_xlabel("change of log loss per sd of the indicator (95 % interval)")
    figure.legend(loc="outside upper center", ncols=min(len(kinds), 3))
    return figure


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """Orange for whatever the paper's procedure gives, the other kinds in the house order."""
    ours = iter(dict.fromkeys(c for c in (*KINDS, *OTHERS) if c != ORANGE))
    return {k: ORANGE if "paper" in k.lower() else next(ours, GREY) for k in kinds}


@styled("predicted", "log_loss", "arm")
def plot_predicted_measured(runs: pd.DataFrame, title: str) -> Figure:
    """Measured log loss against the predicted one, a point a run, with the line of equality.

    runs : columns predicted and log_loss, both log nats/token, and `arm`. The title counts runs,
    and says whether they were held out. No R² is printed: one number without an interval, and in
    sample, is what this study argues against.
    """
    figure, ax = plt.subplots(figsize=(4.7, 4.4))
    both = runs[["predicted", "log_loss"]]
    ends = [both.min(axis=None), both.max(axis=None)]
    ax.plot(ends, ends, color=MUTED, lw=1.2, ls="--", zorder=1)
    scatter_arms(ax, runs, "predicted", "log_loss", "upper left")
    ax.set_title(f"{title}: {len(runs)} runs")
    ax.set_xlabel("predicted log loss (log nats/token)")
    ax.set_ylabel("measured log loss (log nats/token)")
    ax.set_aspect("equal", adjustable="datalim")
    return figure


@styled("fitted", "residual", "studentised", "leverage", "cook", "arm")
def plot_residual_page(page: pd.DataFrame) -> Figure:
    """Residuals against fit, normal quantiles, leverage, and Cook's distance by run.

    page : columns fitted, residual (log loss), studentised, leverage, cook, and `arm`
    (`inference.influence_table`). A page to look at; nothing is dropped for what it shows.
    """
    palette = arm_colours(page)
    tint = page["arm"].map(palette).tolist()
    figure, axes = grid(4, 2, 2.5)
    dots = {"s": 13, "alpha": 0.7, "lw": 0}
    axes[0].scatter(page["fitted"], page["residual"], c=tint, **dots)
    axes[0].axhline(0, color=MUTED, lw=1)
    axes[0].set(xlabel="fitted log loss", ylabel="residual (log loss)")
    order = np.argsort(page["studentised"].to_numpy())
    places = stats.norm.ppf((np.arange(len(page)) + 0.5) / len(page))
    axes[1].scatter(places, page["studentised"].to_numpy()[order],
                    c=[tint[i] for i in order], **dots)
    axes[1].axline((0, 0), slope=1, color=MUTED, lw=1)
    axes[1].set(xlabel="normal quantile", ylabel="studentised residual")
    axes[2].scatter(page["leverage"], page["studentised"], c=tint, **dots)
    axes[2].axhline(0, color=MUTED, lw=1)
    axes[2].set(xlabel="leverage", ylabel="studentised residual")
    axes[3].vlines(np.arange(len(page)), 0, page["cook"], colors=tint, lw=1.2)
    axes[3].set(xlabel="run, in order", ylabel="Cook's distance", ylim=(0, None))
    if len(palette) > 1:
        marks = [plt.Line2D([], [], marker="o", ls="", color=c) for c in palette.values()]
        figure.legend(marks, list(palette), loc="outside upper right", ncols=len(palette))
    return figure


@styled("n_sources", "r2", "all_significant", "repeat_rank_correlation")
def plot_design_failure(null: pd.DataFrame) -> Figure:
    """R² of the paper's procedure over simulated studies in which no indicator has any effect.

    null : from `null_r2`, one row a simulated study. Right: how often everything chosen is
    "significant" (p < 0.05), and how well two repeats agree on new sources.
    """
    counts = sorted(null["n_sources"].unique())
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.35 + 0.75 * len(counts)), width_ratios=(1.9, 1), sharey=True
    )
    sns.violinplot(
        data=null, x="r2", y="n_sources", orient="h", order=counts, ax=left, color=ORANGE,
        alpha=0.45, inner="quart", cut=0, linewidth=1, density_norm="width", width=0.8,
    )
    left.axvline(R_SQUARED, color=INK, lw=1.6)
    left.annotate(f"paper: {R_SQUARED}", (R_SQUARED, 1), (4, 3), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=8)
    left.set(xlim=(0, 1), xlabel="R² of the chosen rule, with no effect to find")
    groups = null.groupby("n_sources")
    shares = groups["all_significant"].mean().reindex(counts)
    right.barh(range(len(counts)), shares, height=0.45, color=ORANGE, alpha=0.7)
    for y, share in enumerate(shares):
        right.annotate(f"{100 * share:.0f} %", (0, y), (4, 0), textcoords="offset points",
                       va="center", ha="left", fontsize=8)
    agree = groups["repeat_rank_correlation"].median().reindex(counts)
    right.plot(agree, range(len(counts)), "D", color=BLUE, ms=6, mec=PAPER,
               label="median rank correlation of two repeats, on new sources")
    right.plot([], [], "s", color=ORANGE, ms=7, alpha=0.7,
               label="share of studies with every chosen term “significant”")
    figure.legend(loc="outside lower center", ncols=1)
    right.set(xlim=(min(0, right.get_xlim()[0]), 1.02), xlabel="share, correlation")
    rows_axis(right, counts)
    rows_axis(left, [f"{n} sources" for n in counts])
    return figure
