"""Figures: what they draw equals the numbers given, nothing overlaps, colours read on the page."""

from __future__ import annotations

from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from instructmining import figures, paper
from instructmining.figures import results, style
from instructmining_core.config import InstructMiningError
from instructmining_core.selection.judge import judge_pairs

COLUMNS = [
    "len_in", "len_out", "reward", "ppl", "mtld", "knn_6", "naturalness", "coherence",
    "understandability",
]
SOURCES = [
    "asyncio", "jinja2", "matplotlib", "networkx", "numpy", "pandas", "scikit-learn",
    "a source with a rather long name", "seaborn", "sphinx", "statsmodels", "torch",
]
KINDS = ["answer of another function", "cut_short", "wrong identifier", "repetitive", "scrambled"]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def frames() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(np.exp(rng.normal(size=(480, 9))), columns=COLUMNS)
    scores["source"] = np.repeat(SOURCES, 40)
    scores.loc[:9, "reward"] = np.nan
    runs = pd.DataFrame(rng.normal(size=(96, 9)), columns=COLUMNS)
    runs["arm"] = np.repeat(["fusion", "within", "mixed"], [24, 48, 24])
    runs["source"] = [""] * 24 + SOURCES * 4 + [""] * 24
    mixed = rng.dirichlet(np.ones(12), 96)
    for i, source in enumerate(SOURCES):
        runs[f"share_{source}"] = np.where(
            runs["source"] == "", mixed[:, i], runs["source"] == source
        )
    runs["log_loss"] = 1.5 + 0.02 * runs["len_out"] + rng.normal(0, 0.01, 96)
    runs["loss_eval_1"] = np.exp(runs["log_loss"])
    runs["loss_eval_2"] = np.exp(runs["log_loss"] * 0.9)
    names = ("estimate", "low", "high")
    fit = pd.DataFrame({n: rng.normal(0, 0.02, 9) + s for n, s in zip(names, (0, -0.01, 0.01),
                                                                   strict=True)})
    page = {n: rng.normal(size=96) for n in ("fitted", "residual", "studentised")}
    return {"scores": scores, "runs": runs, "fit": fit.assign(name=COLUMNS),
            "page": pd.DataFrame(page).assign(leverage=0.1, cook=0.01, arm=runs["arm"])}


def comparison() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        {"pool": pool, "method": method, "size": size, "seed": seed,
         "loss_eval_1": level + rng.normal(0, 0.01), "loss_eval_2": level + rng.normal(0, 0.01)}
        for pool in ("unseen source: networkx", "unseen rows of fitted sources")
        for method, level, n, size in (
            ("selected", 1.49, 5, 128), ("random", 1.52, 5, 128), ("longest", 1.5, 3, 128),
            ("lowest_ppl", 1.55, 3, 128), ("full", 1.48, 1, 2048))
        for seed in range(n)
    ]
    return pd.DataFrame(rows)


def sizes() -> pd.DataFrame:
    parts = [comparison().query("method in ['selected', 'random']").assign(
        size=n, loss_eval_1=lambda d, n=n: d["loss_eval_1"] - 0.02 * np.log(n))
        for n in (64, 256, 1024, 4096)]
    return pd.concat(parts, ignore_index=True)


def doses() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    rows = [{"kind": "clean", "dose": 0.0, "seed": s, "loss_eval_1": 1.5 + rng.normal(0, 0.01)}
            for s in range(3)]
    rows += [
        {"kind": kind, "dose": dose, "seed": seed,
         "loss_eval_1": 1.5 + (0 if kind == "wrong identifier" else 0.2) * dose
         + rng.normal(0, 0.01)}
        for kind in KINDS for dose in (0.25, 0.5, 1.0) for seed in range(3)
    ]
    return pd.DataFrame(rows)


def judged() -> pd.DataFrame:
    prompts = [[{"role": "user", "content": "?"}]] * 20
    lead = [1.0] * 9 + [0.5] * 4 + [0.0] * 7
    return pd.concat([
        judge_pairs(prompts, ["a"] * 20, ["b"] * 20, _answers(lead[k:] + lead[:k]), pair=k)
        for k in range(3)
    ])


def _answers(lead: list[float]):
    turn = iter(value for first in lead for value in (first, 1 - first))
    return lambda comparisons: [next(turn) for _ in comparisons]


def every_figure() -> dict[str, Figure]:
    data, rng = frames(), np.random.default_rng(3)
    null = pd.DataFrame({
        "n_sources": np.repeat([4, 8, 12], 50), "r2": rng.uniform(0.1, 0.8, 150),
        "all_significant": np.tile([True] * 9 + [False], 15),
        "repeat_rank_correlation": rng.uniform(-0.2, 0.6, 150),
    })
    trials = pd.DataFrame({"search": "BlendSearch", "trial": [1, 2, 3, 4],
                           "size": [64, 90, 400, 300], "cost": [64, 154, 554, 854],
                           "loss": [1.5, 1.45, np.nan, 1.4], "best_loss": [1.5, 1.45, 1.45, 1.4],
                           "best_size": [64, 90, 90, 300]})
    plan = pd.DataFrame([
        {"runs": n, "coefficient": c, "half_width": 0.1 / np.sqrt(n), "low": 0.08 / np.sqrt(n),
         "high": 0.13 / np.sqrt(n), "arm": arm}
        for n in (30, 60, 129) for c in COLUMNS for arm in ("designed", "fusion")])
    truth = pd.DataFrame([
        {"kind": kind, "scorer": s, "auc": 0.6, "low": 0.5, "high": 0.7, "seen": kind == KINDS[0]}
        for kind in KINDS for s in ("rule", "random", "longest", "reward", "loss_oracle")])
    curve = pd.DataFrame({"step": range(1, 25), "epoch": np.repeat([1, 2, 3], 8),
                          "loss": np.linspace(5, 4, 24), "lr": np.linspace(1e-3, 0, 24)})
    left = pd.DataFrame([
        {"kind": kind, "dose": dose, "rows": rows, "averaging": averaging, "left": 0.05,
         "clean": 0.1, "share": 0.5}
        for kind in KINDS for dose in (0.25, 0.5, 1.0) for rows in (96, 384)
        for averaging in ("prompts", "tokens")])
    settings = pd.DataFrame([
        {"kind": kind, "layers": layers, "rows": rows, "learning_rate": rate, "loss_regime": 1.9,
         "loss_regime_token": 1.85, "base_regime": 2.0, "base_regime_token": 2.0}
        for kind in ("mixture", "other_answer", *SOURCES[:6]) for layers in (0, 6)
        for rows in (96, 384) for rate in (1e-3, 3e-4)])
    effects = pd.DataFrame([
        {"pool": pool, "versus": versus, "averaging": averaging, "effect": 0.02, "low": -0.01,
         "high": 0.05, "spread": 0.03, "relevance": 0.012, "base": -0.15, "worst": 0.06}
        for pool in ("unseen sources, 0 % defects", "unseen rows of fitted sources", "all pools")
        for versus in ("random", "matched") for averaging in ("prompts", "tokens")])
    return {
        "plot_forest": figures.plot_forest(effects),
        "plot_dose_shares": figures.plot_dose_shares(left),
        "plot_regime": figures.plot_regime(settings),
        "plot_indicator_distributions": figures.plot_indicator_distributions(
            data["scores"], COLUMNS),
        "plot_correlation_map": figures.plot_correlation_map(data["scores"], COLUMNS),
        "plot_loss_by_source": figures.plot_loss_by_source(data["runs"]),
        "plot_two_losses": figures.plot_two_losses(data["runs"]),
        "plot_regression_panels": figures.plot_regression_panels(
            data["runs"], COLUMNS, data["fit"].set_index("name")),
        "plot_coefficients": figures.plot_coefficients(pd.concat([
            data["fit"].assign(kind="ours"),
            data["fit"].iloc[:4].assign(kind="the paper's procedure")])),
        "plot_predicted_measured": figures.plot_predicted_measured(
            data["runs"].assign(predicted=data["runs"]["log_loss"] + 0.01),
            "in sample"),
        "plot_residual_page": figures.plot_residual_page(data["page"]),
        "plot_design_failure": figures.plot_design_failure(null),
        "plot_procedure": figures.plot_procedure(),
        "plot_design_half_widths": figures.plot_design_half_widths(plan),
        "plot_training_curve": figures.plot_training_curve(curve),
        "plot_selected_random": figures.plot_selected_random(comparison()),
        "plot_size_curve": figures.plot_size_curve(sizes()),
        "plot_search_trials": figures.plot_search_trials(pd.concat([
            trials, trials.assign(search="random search", cost=[90, 180, 600, 860])])),
        "plot_loss_proxy": figures.plot_loss_proxy(data["runs"].assign(
            group=rng.choice(["numpy", "pandas", "wrong identifier"], len(data["runs"])),
            accuracy_docstrings_norm=rng.uniform(0.4, 0.6, len(data["runs"])),
            base_accuracy_docstrings_norm=0.5), ["accuracy_docstrings_norm"]),
        "plot_dose_response": figures.plot_dose_response(doses(), harms=[], seen=KINDS[:1]),
        "plot_twin_auc": figures.plot_twin_auc(truth),
        "plot_judge_bars": figures.plot_judge_bars(judged(), paper.JUDGE),
    }


def drawn_texts(figure: Figure) -> list[tuple[str, object]]:
    """Every text on the page with its box in pixels; slanted ones, whose box is loose, left out."""
    figure.canvas.draw()
    plots = [ax for ax in figure.axes if ax.axison]
    axes = [axis for ax in plots for axis in (ax.xaxis, ax.yaxis)]
    ticks = {id(t) for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)
             for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
             for t in (tick.label1, tick.label2)}
    # matplotlib keeps ticks beyond the ends of an axis, but does not draw them
    shown = {id(t) for axis in axes for tick in axis._update_ticks()
             for t in (tick.label1, tick.label2)}
    return [
        (t.get_text(), t.get_window_extent()) for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and t.get_rotation() in (0, 90)
        and (id(t) in shown or id(t) not in ticks)
    ]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    found = []
    for (one, a), (two, b) in combinations(drawn_texts(figure), 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        if width >= 1 and height >= 3:  # boxes have some pixels of air above and below
            found.append((one, two))
    return found


def test_every_figure_is_clean_and_has_its_own_background():
    before = dict(plt.rcParams)
    all_figures = every_figure()
    assert dict(plt.rcParams) == before
    assert set(all_figures) == set(figures.__all__)
    for name, figure in all_figures.items():
        assert to_hex(figure.get_facecolor()) == style.PAPER, name
        assert figure.get_size_inches()[0] <= style.WIDTH, name
        assert overlaps(figure) == [], name
        page = figure.bbox.padded(2)
        outside = [text for text, box in drawn_texts(figure)
                   if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1))]
        assert outside == [], name


def test_the_overlap_check_sees_an_overlap():
    figure, ax = plt.subplots(figsize=(2, 2))
    ax.set_xticks([0, 0.1], ["a long label", "another label"])
    assert ("a long label", "another label") in overlaps(figure)


def contrast(colour: str) -> float:
    """WCAG 2 contrast ratio against the figures' background."""
    def luminance(c: str) -> float:
        parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(c)]
        return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))

    return (luminance(style.PAPER) + 0.05) / (luminance(colour) + 0.05)


def test_colours_read_on_the_background():
    for colour in {*style.METHODS.values(), *style.ARMS.values(),
                   *style.KINDS, *style.OTHERS}:
        assert contrast(colour) >= 3, colour
    assert contrast(style.INK) >= 7 and contrast(style.MUTED) >= 4.5


def test_one_method_has_one_colour_in_every_figure():
    methods = style.METHODS
    assert len({methods[m] for m in ("selected", "random", "longest", "lowest_ppl", "reward",
                                     "compression", "full")}) == 7
    lines = {line.get_label(): to_hex(line.get_color())
             for line in figures.plot_size_curve(sizes()).axes[0].get_lines()}
    assert lines["selected"] == methods["selected"] and lines["random"] == methods["random"]
    unknown = style.colours(["selected", "mine", "yours"])
    assert len(set(unknown.values())) == 3


def test_selected_random_draws_means_and_the_random_band():
    runs = comparison()
    figure = figures.plot_selected_random(runs)
    ax = figure.axes[0]
    part = runs[(runs["pool"] == runs["pool"].iloc[0]) & (runs["method"] == "selected")]
    marks = {round(float(line.get_ydata()[0])): float(line.get_xdata()[0])
             for line in ax.get_lines() if line.get_marker() == "o"}
    assert marks[0] == pytest.approx(part["loss_eval_1"].mean())
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["selected", "random", "longest", "lowest ppl", "full, 2,048 rows"]


def test_mean_interval_by_hand():
    assert style.mean_interval([1.0, 2.0, 3.0, np.nan]) == pytest.approx(
        (2.0, 2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)))
    assert np.isnan(style.mean_interval([1.0])[1])


def test_dose_response_colours_what_harms_and_shares_the_clean_runs():
    figure = figures.plot_dose_response(doses(), harms=["repetitive"], seen=["cut_short"])
    found = {ax.get_title(loc="left"): ax for ax in figure.axes}
    rising = to_hex(found["repetitive"].get_lines()[0].get_color())
    assert rising == style.RED
    assert to_hex(found["wrong identifier"].get_lines()[0].get_color()) == style.GREY
    assert list(found["repetitive"].get_lines()[0].get_xdata()) == [0, 25, 50, 100]
    assert "cut short (seen)" in found and len(found) == len(KINDS)


def test_twin_auc_puts_unseen_kinds_first_and_draws_the_interval():
    truth = pd.DataFrame({"kind": ["cut_short", "repetitive"], "scorer": "rule", "seen": [1, 0],
                          "auc": [0.6, 0.7], "low": [0.5, 0.65], "high": [0.7, 0.75]})
    axes = figures.plot_twin_auc(truth).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["repetitive", "cut short (seen)"]
    _, interval, point = axes[0].get_lines()
    assert (*interval.get_xdata(), *point.get_xdata()) == (0.65, 0.75, 0.7)


def test_judge_bars_have_the_counts():
    containers = figures.plot_judge_bars(judged(), paper.JUDGE).axes[0].containers
    bars = [[p.get_width() for p in c] for c in containers]
    assert np.allclose(bars, [[45, 45, 45, 42.5], [20, 20, 20, 23.75], [35, 35, 35, 33.75]])


def test_correlation_map_has_within_sources_below_the_diagonal():
    rng = np.random.default_rng(4)
    level = np.repeat([0.0, 20.0, 40.0], 100)
    noise = rng.normal(size=300)
    scores = pd.DataFrame({"source": np.repeat(["a", "b", "c"], 100),
                           "reward": level + noise, "mtld": level - noise})
    mesh = figures.plot_correlation_map(scores, ["reward", "mtld"]).axes[0].collections[0]
    values = np.asarray(mesh.get_array()).reshape(2, 2)
    assert values[0, 1] > 0.7 and values[1, 0] < -0.7


def test_regression_panels_draw_the_slope_within_sources():
    """Frisch–Waugh–Lovell: the line's slope is the coefficient beside the shares."""
    runs = frames()["runs"]
    shares = [c for c in runs if c.startswith("share_")]
    design = np.column_stack([runs[shares], runs["len_out"]])
    slope = np.linalg.lstsq(design, runs["log_loss"], rcond=None)[0][-1]
    fit = frames()["fit"].set_index("name")
    line = figures.plot_regression_panels(runs, ["len_out"], fit).axes[0].get_lines()[0]
    drawn = np.polyfit(line.get_xdata(), line.get_ydata(), 1)[0]
    assert drawn == pytest.approx(slope)


def test_the_papers_procedure_is_orange_and_never_ours():
    palette = results.kind_colours(["within, these", "the paper's procedure", "new", "more"])
    assert palette["the paper's procedure"] == style.ORANGE
    assert len(set(palette.values())) == 4


def test_a_missing_column_is_named():
    with pytest.raises(InstructMiningError, match="'size'"):
        figures.plot_size_curve(comparison().drop(columns="size"))
    with pytest.raises(InstructMiningError, match="no rows"):
        figures.plot_loss_by_source(frames()["runs"].iloc[:0])


@pytest.mark.parametrize(("text", "wrapped"), [
    ("short", "short"), ("scipy.signal_and_stats_long", "scipy.signal_and_\nstats_long"),
    ("answer of another function", "answer of another\nfunction"), ("a $ b", r"a \$ b"),
])
def test_long_names_are_wrapped(text, wrapped):
    assert style.wrap(text, 20) == wrapped
