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
from .data import known_columns
from .style import (
    ARMS,
    BLUE,
    GREY,
    INK,
    KINDS,
    MUTED,
    ORANGE,
    OTHERS,
    PAPER,
    WIDTH,
    colours,
    draw_interval,
    grid,
    label_of,
    name_of,
    require,
    rows_axis,
    styled,
    wrap,
)


@styled
def plot_regression_panels(
    runs: pd.DataFrame,
    columns: Sequence[str] | None = None,
    fit: pd.DataFrame | None = None,
) -> Figure:
    """One panel an indicator: log loss of each set against the set's mean, line with 95 % band.

    runs : one row a run, `log_loss` (log nats/token), the indicator columns (set means), `arm`,
    and `share_<source>`. Both axes are freed of the source shares (added-variable plot), so the
    slope is that within sources; without share columns the raw values are drawn.
    fit : optional, index or column name, estimate, low, high (per sd of a row): printed in the
    panel's title. For the line to be that of a table, give the runs that the table was fitted to.
    """
    columns = known_columns(runs, columns)
    require(runs, ["log_loss", *columns], "plot_regression_panels")
    shares = [c for c in runs if c.startswith("share_")]
    arms = runs["arm"].astype(str) if "arm" in runs else pd.Series("", runs.index)
    palette = colours(list(dict.fromkeys(arms)), ARMS)
    y = _given(runs["log_loss"], runs[shares])
    figure, axes = grid(len(columns), 3, 2.15, sharey=True)
    for ax, column in zip(axes, columns, strict=True):
        x = _given(runs[column], runs[shares])
        for arm, colour in palette.items():
            ax.scatter(x[arms == arm], y[arms == arm], s=9, color=colour, alpha=0.6, lw=0,
                       label=arm)
        _line(ax, x.to_numpy(), y.to_numpy(), len(shares))
        ax.set_xlabel(label_of(column, 30))
        ax.set_title(_slope_title(fit, column), fontsize=8)
    if len(palette) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(palette),
                      markerscale=1.6)
    given = ", less what the source shares explain" if shares else ""
    figure.supylabel(f"log loss (log nats/token){given}", fontsize=9)
    return figure


def _given(values: pd.Series, shares: pd.DataFrame) -> pd.Series:
    values = values.astype(float)
    if shares.shape[1] == 0:
        return values
    design = shares.fillna(0).to_numpy(float)
    known = values.notna().to_numpy()
    beta, *_ = np.linalg.lstsq(design[known], values[known], rcond=None)
    return values - design @ beta


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, spent: int) -> None:
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    df = len(x) - 1 - max(spent, 1)
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


def _slope_title(fit: pd.DataFrame | None, column: str) -> str:
    if fit is None:
        return ""
    row = fit.set_index("name").loc[column] if "name" in fit else fit.loc[column]
    return f"{row['estimate']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] per sd"


@styled
def plot_coefficients(estimates: pd.DataFrame) -> Figure:
    """Coefficients with 95 % intervals, one row an indicator, one colour a kind of estimate.

    estimates : columns name, estimate, low, high (log loss per sd of the indicator) and, where
    there are several kinds of estimate, `kind`. Indicators that a procedure did not choose have no
    mark.
    """
    frame = estimates if "kind" in estimates else estimates.assign(kind="ours")
    require(frame, ["name", "estimate", "low", "high"], "plot_coefficients")
    kinds, names = list(dict.fromkeys(frame["kind"])), list(dict.fromkeys(frame["name"]))
    height = 1.1 + len(names) * (0.16 + 0.1 * len(kinds))
    figure, ax = plt.subplots(figsize=(WIDTH, height))
    ax.axvline(0, color=MUTED, lw=1)
    palette = kind_colours(kinds)
    for k, kind in enumerate(kinds):
        rows = frame[frame["kind"] == kind].set_index("name")
        shift = (k - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
        for y, name in enumerate(names):
            if name in rows.index:
                row = rows.loc[name]
                draw_interval(ax, y + shift, row["estimate"], row["low"], row["high"],
                              palette[kind])
        ax.plot([], [], "o-", color=palette[kind], lw=2.2, ms=5.5, label=wrap(kind, 34))
    rows_axis(ax, [name_of(n) for n in names], 26)
    ax.set_xlabel("change of log loss per sd of the indicator (95 % interval)")
    figure.legend(loc="outside upper center", ncols=min(len(kinds), 3))
    return figure


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """Orange for whatever the paper's procedure gives, the other kinds in the house order."""
    ours = iter(dict.fromkeys(c for c in (*KINDS, *OTHERS) if c != ORANGE))
    return {k: ORANGE if "paper" in k.lower() else next(ours, GREY) for k in kinds}


@styled
def plot_predicted_measured(predictions: pd.DataFrame, *, title: str = "") -> Figure:
    """Measured log loss against the predicted one, a point a run, with the line of equality.

    predictions : columns predicted and measured (or `log_loss`), both log nats/token, and `arm`
    if there. The title counts runs; say by `title` whether they were held out. No R² is printed:
    one number without an interval, and in sample, is what this study argues against.
    """
    measured = "measured" if "measured" in predictions else "log_loss"
    require(predictions, ["predicted", measured], "plot_predicted_measured")
    arms = predictions.get("arm", pd.Series("", predictions.index)).astype(str)
    palette = colours(list(dict.fromkeys(arms)), ARMS)
    figure, ax = plt.subplots(figsize=(4.7, 4.4))
    x, y = predictions["predicted"], predictions[measured]
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color=MUTED, lw=1.2, ls="--", zorder=1)
    for arm, colour in palette.items():
        here = arms == arm
        ax.scatter(x[here], y[here], s=22, color=colour, alpha=0.75, ec=PAPER, lw=0.5, label=arm)
    if len(palette) > 1:
        ax.legend(title="arm", loc="upper left")
    ax.set_title(f"{title + ': ' if title else ''}{len(x)} runs")
    ax.set_xlabel("predicted log loss (log nats/token)")
    ax.set_ylabel("measured log loss (log nats/token)")
    ax.set_aspect("equal", adjustable="datalim")
    return figure


@styled
def plot_residual_page(page: pd.DataFrame) -> Figure:
    """Residuals against fit, normal quantiles, leverage, and Cook's distance by run.

    page : columns fitted, residual (log loss), studentised, leverage, cook, and `arm` if there
    (`inference.residual_page`). A page to look at; nothing is dropped for what it shows.
    """
    require(page, ["fitted", "residual", "studentised", "leverage", "cook"], "plot_residual_page")
    arms = page.get("arm", pd.Series("", page.index)).astype(str)
    palette = colours(list(dict.fromkeys(arms)), ARMS)
    tint = arms.map(palette).tolist()
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


@styled
def plot_design_failure(null: pd.DataFrame) -> Figure:
    """R² of the paper's procedure over simulated studies in which no indicator has any effect.

    null : one row a simulated study, columns n_sources, r2, all_significant (every chosen term
    has p < 0.05) and, if there, repeat_rank_correlation (from `null_r2`). Right: how often
    everything chosen is "significant", and how well two repeats agree on new sources.
    """
    require(null, ["n_sources", "r2", "all_significant"], "plot_design_failure")
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
    if "repeat_rank_correlation" in null:
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
