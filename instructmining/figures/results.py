"""Figures of what was found: the rule, the verdicts, and the book's one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from instructmining_core.selection.judge import net_win_of_counts, win_tie_lose
from instructmining_core.selection.size import size_means

from ..paper import R_SQUARED
from .data import scatter_arms
from .style import (
    AVERAGINGS,
    BLUE,
    GREY,
    INK,
    KINDS,
    MUTED,
    ORANGE,
    OTHERS,
    OUTCOMES,
    PAPER,
    PURPLE,
    RED,
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


@styled("log_loss", "arm")
def plot_regression_panels(
    runs: pd.DataFrame, columns: Sequence[str], fit: pd.DataFrame
) -> Figure:
    """One panel an indicator: log loss of each set against the set's mean, line with 95 % band.

    runs : one row a run, `log_loss` (log nats/token), the indicator columns (set means), `arm`,
    and `share_<source>`. Both axes are freed of the source shares (added-variable plot), so the
    slope is that within sources. fit : by column, estimate, low, high (per sd of a row), of these
    runs, for the panel's title.
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.35 + 0.75 * len(counts)),
                                         width_ratios=(1.9, 1), sharey=True)  # fmt: skip
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
    figure, axes = plt.subplots(len(pools), len(losses), figsize=(WIDTH, sum(heights) + 0.55),
                                squeeze=False, height_ratios=heights, sharex="col",
                                sharey="row")  # fmt: skip
    rng = np.random.default_rng(0)
    for row, pool in zip(axes, pools, strict=True):
        for ax, loss in zip(row, losses, strict=True):
            _method_rows(ax, lines[pool], loss, rng)
            ax.set_xlabel(label_of(loss) if pool == pools[-1] else "")
        row[0].set_title(wrap(pool, 60))
    return figure


def _lines(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of one pool's panel: selected, random, then the others as they come."""
    groups = dict(list(part.groupby(["method", "size"], sort=False)))
    order = sorted(groups, key=lambda key: ({"selected": 0, "random": 1}.get(key[0], 2), key[1]))
    # a size is told where a method has several, or is alone in having it, as "full" is
    usual, several = part["size"].mode().iloc[0], part.groupby("method")["size"].nunique()
    return {
        name_of(method) + (f", {size:,} rows" if several[method] > 1 or size != usual else ""):
            groups[method, size]
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
    figure, axes = plt.subplots(len(pools), len(losses), squeeze=False, sharex=True,
                                figsize=(WIDTH, 2.7 * len(pools) + 0.3))  # fmt: skip
    palette = colours(list(dict.fromkeys(runs["method"])))
    for row, pool in zip(axes, pools, strict=True):
        for ax, loss in zip(row, losses, strict=True):
            _curves(ax, runs[runs["pool"] == pool], loss, palette)
            ax.set_ylabel(label_of(loss, 26))
            ax.set_xlabel("rows in the training set" if pool == pools[-1] else "")
        row[0].set_title(wrap(pool, 60))
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
            ax.set_xlabel(label_of(loss) if task == tasks[-1] else "")
        row[0].set_ylabel(wrap(task.removeprefix("accuracy_").removesuffix("_norm")
                               + ": right (%)", 26))  # fmt: skip
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
    panels. harms : kinds that raise the loss (`dose_effects`), red; the others, negative controls,
    are grey. seen : kinds that the stand-in models were trained on, marked so.
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.25 + 0.38 * len(table)),
                                         width_ratios=(2, 1), sharey=True)  # fmt: skip
    words = {"win": "selected wins", "tie": "tie or inconsistent", "lose": "random wins",
             "none": "no verdict"}
    counts = table[list(OUTCOMES)].astype(float)
    shares, start = 100 * counts.div(counts.sum(axis=1), axis=0), 0.0
    for outcome in counts.columns[counts.any()]:
        bars = left.barh(range(len(table)), shares[outcome], left=start, height=0.62,
                         color=OUTCOMES[outcome], label=words[outcome])  # fmt: skip
        told = [f"{count:.0f}" if share >= 4 else ""
                for count, share in zip(counts[outcome], shares[outcome], strict=True)]
        left.bar_label(bars, told, label_type="center", fontsize=8,
                       color=INK if outcome in ("tie", "none") else "white")  # fmt: skip
        start = start + shares[outcome].to_numpy()
    left.set_xlabel("prompts (%)")
    right.axvline(0, color=MUTED, lw=1)
    for y, row in enumerate(table.itertuples()):
        draw_interval(right, y, row.net, row.low, row.high, PURPLE)
    right.set_xlabel("net win (share)")
    for ax in (right, left):
        rows_axis(ax, list(table.index))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


SHIFTS = {"prompts": -0.16, "tokens": 0.0}  # place in the row
MATCHED_SHIFT = 0.34  # the hollow marks stand this much lower than their filled ones
TICKS = -0.36  # place of the grey ticks in the row, above all marks


@styled("pool", "versus", "averaging", "effect", "low", "high", "spread", "relevance")
def plot_forest(effects: pd.DataFrame) -> Figure:
    """Random minus selected, in units of the spread between collections; above, in nats.

    effects : from `gate_effects`. Filled: against random rows; hollow: against random rows of the
    same length; a diamond over all pools. Grey ticks: the untuned base and the rule's worst
    rows, both against random rows. At the right: how much more the model heeds its prompt.
    """
    pools = list(dict.fromkeys(effects["pool"]))
    unit = effects.groupby("averaging")["spread"].first()
    figure, ax = plt.subplots(figsize=(WIDTH, 1.1 + 0.78 * len(pools)))
    for row, pool in enumerate(pools):
        part = effects[effects["pool"] == pool]
        for one in part.itertuples():
            colour, shift = AVERAGINGS[one.averaging], SHIFTS[one.averaging]
            matched, whole = one.versus != "random", pool == pools[-1] and len(pools) > 1
            ends = (value / one.spread for value in (one.effect, one.low, one.high))
            draw_interval(ax, row + shift + MATCHED_SHIFT * matched, *ends, colour,
                          marker="D" if whole else "o", mfc=PAPER if matched else colour,
                          mec=colour, ms=7 if whole else 5.5)  # fmt: skip
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
    for name, colour in AVERAGINGS.items():
        ax.plot([], [], "o", color=colour, label=f"loss averaged over {name}")
    if (effects["versus"] != "random").any():
        ax.plot([], [], "o", mfc=PAPER, mec=MUTED, label="against random rows of the same length")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
