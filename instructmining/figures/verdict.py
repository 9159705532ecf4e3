"""Figures of the verdict: selected against random, size, dose and response, twins, the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from instructmining_core.selection.judge import net_win_of_counts, win_tie_lose
from instructmining_core.selection.size_curve import size_means

from .style import (
    GREY,
    INK,
    MUTED,
    OUTCOMES,
    PAPER,
    PURPLE,
    RED,
    WIDTH,
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


@styled("pool", "method", "size")
def plot_selected_random(runs: pd.DataFrame) -> Figure:
    """Loss of each method's runs by pool, with mean and 95 % interval; grey band: random's.

    runs : one row a run, columns pool, method, size (rows), seed and the losses (nats/token). A
    row of a panel is a method, and its size where the pool has several.
    """
    losses = losses_in(runs)
    pools = list(dict.fromkeys(runs["pool"]))
    lines = {pool: _lines(runs[runs["pool"] == pool]) for pool in pools}
    heights = [0.55 + 0.26 * len(lines[p]) for p in pools]
    figure, axes = plt.subplots(
        len(pools), len(losses), figsize=(WIDTH, sum(heights) + 0.55), squeeze=False,
        height_ratios=heights, sharex="col", sharey="row",
    )
    rng = np.random.default_rng(0)
    for row, pool in zip(axes, pools, strict=True):
        for ax, loss in zip(row, losses, strict=True):
            _method_rows(ax, lines[pool], loss, rng)
        row[0].set_title(wrap(pool, 60))
    for ax, loss in zip(axes[-1], losses, strict=True):
        ax.set_xlabel(label_of(loss))
    return figure


def _lines(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of one pool's panel: selected, random, then the others as they come."""
    order = sorted(
        part.groupby(["method", "size"], sort=False).groups,
        key=lambda key: ({"selected": 0, "random": 1}.get(key[0], 2), key[1]),
    )
    # a size is told where a method has several, or is alone in having it, as "full" is
    usual = part["size"].mode().iloc[0]
    several = part.groupby("method")["size"].nunique()
    return {
        (f"{name_of(method)}, {size:,} rows" if several[method] > 1 or size != usual
         else name_of(method)): part[(part["method"] == method) & (part["size"] == size)]
        for method, size in order
    }


def _method_rows(
    ax: Axes, lines: dict[str, pd.DataFrame], loss: str, rng: np.random.Generator
) -> None:
    for y, part in enumerate(lines.values()):
        values, method = part[loss].dropna(), part["method"].iloc[0]
        colour = colours([method])[method]
        centre, low, high = mean_interval(values)
        if method == "random" and np.isfinite(low):
            ax.axvspan(low, high, color=GREY, alpha=0.16, lw=0, zorder=0)
        shift = rng.uniform(-0.2, 0.2, len(values))
        ax.scatter(values, y + shift, s=11, color=colour, alpha=0.45, lw=0)
        draw_interval(ax, y, centre, low, high, colour)
    rows_axis(ax, list(lines), 24)


@styled("pool", "method", "size")
def plot_size_curve(runs: pd.DataFrame) -> Figure:
    """Loss against set size, selected and random, each run and the mean with 95 % interval.

    runs : columns pool, method, size (rows), seed, and the losses (nats/token). Intervals as in
    `size_means`: the noise of a curve is pooled over its sizes.
    """
    losses = losses_in(runs)
    pools = list(dict.fromkeys(runs["pool"]))
    figure, axes = plt.subplots(
        len(pools), len(losses), figsize=(WIDTH, 2.7 * len(pools) + 0.3), squeeze=False,
        sharex=True,
    )
    palette = colours(list(dict.fromkeys(runs["method"])))
    for row, pool in zip(axes, pools, strict=True):
        for ax, loss in zip(row, losses, strict=True):
            _curves(ax, runs[runs["pool"] == pool], loss, palette)
            ax.set_ylabel(label_of(loss, 26))
        row[0].set_title(wrap(pool, 60))
    for ax in axes[-1]:
        ax.set_xlabel("rows in the training set")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right",
                  ncols=len(palette))  # fmt: skip
    return figure


def _curves(ax: Axes, runs: pd.DataFrame, loss: str, palette: dict[str, str]) -> None:
    finite = runs.dropna(subset=[loss])
    means = size_means(finite, loss)
    for method in dict.fromkeys(runs["method"]):
        colour, part = palette[method], means[means["method"] == method].sort_values("size")
        ax.plot(part["size"], part["mean"], "o-", ms=4, color=colour, label=name_of(method))
        ax.fill_between(part["size"], part["low"], part["high"], color=colour, alpha=0.18, lw=0)
        own = finite[finite["method"] == method]
        ax.scatter(own["size"], own[loss], s=8, color=colour, alpha=0.4, lw=0)
    size_axis(ax, "x")


def size_axis(ax: Axes, which: str) -> None:
    """A log axis of row counts with plain numbers that do not crowd."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 60 else (1, 3) if high / low < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


@styled("search", "trial", "size", "loss", "best_loss", "best_size", "cost")
def plot_search_trials(trials: pd.DataFrame) -> Figure:
    """Searches step by step: the best loss so far by what it cost, and the sizes tried.

    trials : of one or more searches, columns search, trial, size (rows), loss, best_loss
    (nats/token), best_size, cost (rows so far). The paper's Fig. 2 (v3). Diverged trials have a
    size but no loss.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    palette = colours(list(dict.fromkeys(trials["search"])))
    for name, colour in palette.items():
        part = trials[trials["search"] == name]
        best = part["best_loss"].replace(np.inf, np.nan)
        chosen = part["best_size"].iloc[-1]
        left.step(part["cost"], best, where="post", color=colour,
                  label=f"{name}: {chosen:,.0f} rows")  # fmt: skip
        left.plot(part["cost"], part["loss"], "o", color=colour, ms=4, mec=PAPER)
        right.plot(part["trial"], part["size"], "o-", color=colour, ms=5, mec=PAPER, lw=0.8)
        right.axhline(chosen, color=colour, lw=1.4, ls=":")
    left.set(xlabel="rows trained on so far", ylabel="loss searched on (nats/token)")
    right.set(xlabel="trial", ylabel="rows in the training set")
    size_axis(right, "y")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled("group", "loss_eval_1")
def plot_loss_proxy(runs: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Accuracy against loss, a point a model, coloured by what its rows have in common.

    runs : columns group, the losses (nats/token), and the accuracies `tasks` (shares of the
    questions) with `base_<task>`: the dotted line is the base's. The panel's title has Pearson's r.
    """
    losses = losses_in(runs)
    groups = list(dict.fromkeys(runs["group"]))
    figure, axes = plt.subplots(len(tasks), len(losses), squeeze=False, sharex="col",
                                figsize=(WIDTH, 2.5 * len(tasks) + 0.5))  # fmt: skip
    palette = colours(groups)
    for row, task in zip(axes, tasks, strict=True):
        for ax, loss in zip(row, losses, strict=True):
            for name, colour in palette.items():
                part = runs[runs["group"] == name]
                ax.scatter(part[loss], 100 * part[task], s=14, color=colour, alpha=0.65, lw=0,
                           label=wrap(name, 30))  # fmt: skip
            ax.axhline(100 * runs[f"base_{task}"].mean(), color=MUTED, ls=":", lw=1)
            both = runs[[loss, task]].dropna()
            ax.set_title(f"r = {both.corr().iloc[0, 1]:+.2f}, {len(both)} models", fontsize=8)
        row[0].set_ylabel(wrap(task.removeprefix("accuracy_").removesuffix("_norm")
                               + ": right (%)", 26))  # fmt: skip
    for ax, loss in zip(axes[-1], losses, strict=True):
        ax.set_xlabel(label_of(loss))
    if len(groups) <= 12:  # more names would leave no room for the panels
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=3, markerscale=1.6, fontsize=7)  # fmt: skip
    return figure


@styled("kind", "dose", "loss_eval_1")
def plot_dose_response(
    runs: pd.DataFrame, harms: Sequence[str], seen: Sequence[str]
) -> Figure:
    """Loss against the share of rows replaced by defective twins, a panel a kind of defect.

    runs : columns kind, dose (share in [0, 1]) and loss_eval_1 (nats/token). Points are runs, the
    line joins means, bars are 95 % intervals; runs of kind "clean" (dose 0) are shared by all
    panels. harms : the kinds that raise the loss, by `ground_truth.dose_effects`: red; the others
    are the negative controls: grey. seen : kinds that the stand-in models were trained on, marked
    so.
    """
    kinds = [kind for kind in dict.fromkeys(runs["kind"]) if kind != "clean"]
    columns = 4 if len(kinds) > 6 else 3
    figure, axes = grid(len(kinds), columns, 2.1, "defective rows (%)", sharex=True, sharey=True)
    for i, (ax, kind) in enumerate(zip(axes, kinds, strict=True)):
        part = runs[runs["kind"].isin([kind, "clean"])].dropna(subset=["loss_eval_1"])
        dose, loss = 100 * part["dose"], part["loss_eval_1"]
        colour = RED if kind in set(harms) else GREY
        ax.scatter(dose, loss, s=11, color=colour, alpha=0.45, lw=0)
        rows = [(d, *mean_interval(g)) for d, g in loss.groupby(dose)]
        x, centre, low, high = np.array(rows, float).T
        ax.plot(x, centre, "o-", ms=4, color=colour)
        ax.vlines(x, low, high, color=colour, lw=1.6)
        ax.set_title(wrap(name_of(kind) + (" (seen)" if kind in seen else ""), 26))
        ax.set_xticks(sorted(set(x)))
        if i % columns == 0:
            ax.set_ylabel("loss (nats/token)")
    return figure


@styled("kind", "scorer", "auc", "low", "high", "seen")
def plot_twin_auc(truth: pd.DataFrame) -> Figure:
    """How often each scorer puts the clean twin before the defective one, by kind of defect.

    truth : columns kind, scorer, auc, low, high (in [0, 1], 95 % over libraries), seen (bool: the
    stand-in models were trained on this kind). The line at ½ is chance.
    """
    seen = set(truth.loc[truth["seen"].astype(bool), "kind"])
    kinds = sorted(dict.fromkeys(truth["kind"]), key=lambda kind: kind in seen)
    scorers = list(dict.fromkeys(truth["scorer"]))
    figure, axes = grid(len(kinds), 4 if len(kinds) > 6 else 3, 0.75 + 0.2 * len(scorers),
                        "AUC within twins", sharex=True, sharey=True)  # fmt: skip
    palette = colours(scorers)
    for ax, kind in zip(axes, kinds, strict=True):
        ax.axvline(0.5, color=MUTED, lw=1)
        for row in truth[truth["kind"] == kind].itertuples():
            draw_interval(ax, scorers.index(row.scorer), row.auc, row.low, row.high,
                          palette[row.scorer])  # fmt: skip
        ax.set_title(wrap(name_of(kind) + (" (seen)" if kind in seen else ""), 26))
        ax.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1])
        rows_axis(ax, [name_of(s) for s in scorers])
    return figure


@styled("pair", "outcome")
def plot_judge_bars(judged: pd.DataFrame, published: Mapping[str, int]) -> Figure:
    """Wins, ties and losses of each pair of models, and the net win with its 95 % interval.

    judged : from `judge_pairs` with the selected model first, columns pair, prompt_id, score,
    outcome, consistent. published : the paper's win, tie and lose, drawn beside. A bar speaks of
    its two models only; the numbers in it are prompts.
    """
    table = win_tie_lose(judged)
    table.index = [f"pair {pair}" for pair in table.index]
    paper = {**published, "none": 0, **vars(net_win_of_counts(**published))}
    table.loc["the paper (inferred)"] = [paper[name] for name in table]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.25 + 0.38 * len(table)), width_ratios=(2, 1), sharey=True
    )
    words = {"win": "selected wins", "tie": "tie or inconsistent", "lose": "random wins",
             "none": "no verdict"}
    start = np.zeros(len(table))
    whole = table[list(OUTCOMES)].sum(axis=1).to_numpy(float)
    for outcome, colour in OUTCOMES.items():
        counts = table[outcome].to_numpy(float)
        if not counts.any():
            continue
        shares = 100 * counts / whole
        left.barh(range(len(table)), shares, left=start, height=0.62, color=colour,
                  label=words[outcome])
        for y, (count, share, at) in enumerate(zip(counts, shares, start, strict=True)):
            if share >= 4:
                left.text(at + share / 2, y, f"{count:.0f}", ha="center", va="center", fontsize=8,
                          color=INK if outcome in ("tie", "none") else "white")
        start += shares
    left.set_xlabel("prompts (%)")
    right.axvline(0, color=MUTED, lw=1)
    for y, row in enumerate(table.itertuples()):
        draw_interval(right, y, row.net, row.low, row.high, PURPLE)
    right.set_xlabel("net win (share)")
    for ax in (right, left):
        rows_axis(ax, list(table.index))
    figure.legend(loc="outside upper left", ncols=4)
    return figure
