"""Simulated studies on invented worlds: what a design can see, and whether the inference holds.

A world is a pool of rows with scores; real training sets are drawn from it, and their losses
invented. `bench.acceptance` makes the table of the figures that must hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr, ttest_ind
from scipy.stats import t as student
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining.paper import RUNS
from instructmining.tables import BETWEEN, NOISE_SD, SOURCE_SD, TERMS
from instructmining_core.config import COLUMNS
from instructmining_core.finetuning.sets import TrainingSet, designed_sets, fusion_sets
from instructmining_core.regression.inference import deletion_maps
from instructmining_core.regression.paper_rule import SubsetSearch
from instructmining_core.regression.permutation import permutation, row_overlap
from instructmining_core.regression.planner import half_widths, sigma_band
from instructmining_core.regression.rule import LEVEL, residualise, slope_map
from instructmining_core.regression.run_table import Standardizer
from instructmining_core.selection.contrasts import ALPHA, BOUNDS, crossed_interval

N_SOURCES, N_RUNS, SIZE = 12, 80, 400  # of a simulated study; rows of a set
SLOPE_SD = 0.02  # of an indicator's effect, log loss per sd of the pool's rows
PROMPTS = 80  # of an evaluation set
# sd of a loss of 2 nats: between prompts, what a method does to a prompt, and the rest
PROMPT_SD, INTERACTION_SD, REST_SD = 0.4, 0.05, 0.05


@dataclass(frozen=True)
class Design:
    """A study's design matrix, known before any training.

    shares : (n, S); X : (n, p) standardised set means; parts : (n, S, p), what each source adds
    to X; source_names : S names; arms : (n,) str; rows : set_id -> row hashes, in the runs' order
    """

    shares: np.ndarray
    X: np.ndarray
    parts: np.ndarray
    source_names: tuple[str, ...]
    arms: np.ndarray
    rows: dict[str, tuple[str, ...]]

    def runs(self, y: np.ndarray) -> pd.DataFrame:
        """The table of runs that the regressions read; y : (n,) log losses."""
        frame = pd.DataFrame(self.X, columns=list(COLUMNS))
        for i, name in enumerate(self.source_names):
            frame[f"share_{name}"] = self.shares[:, i]
        pure = self.shares.max(axis=1) == 1
        names = np.array(self.source_names, object)[self.shares.argmax(axis=1)]
        return frame.assign(log_loss=y, arm=self.arms, source=np.where(pure, names, ""),
                            set_id=list(self.rows))


def synthetic_world(n_sources: int, rows: int, seed: int) -> pd.DataFrame:
    """Scores of an invented pool: row_hash, source, and indicators standardised over the pool.

    Inside a source the indicators are correlated by three common factors, with a spread of its
    own; a third of them are log-normal, as lengths and perplexities are.
    """
    rng = np.random.default_rng(seed)
    p = len(COLUMNS)
    loadings = rng.normal(size=(3, p)) * 0.6
    values, names = [], []
    for s in range(n_sources):
        noise = rng.normal(size=(rows, 3)) @ loadings + rng.normal(size=(rows, p))
        noise /= np.sqrt((loadings**2).sum(axis=0) + 1)
        noise[:, ::3] = (np.exp(0.7 * noise[:, ::3]) - np.exp(0.245)) / 0.9
        shift = (rng.normal(size=3) @ loadings + rng.normal(size=p))
        shift /= np.sqrt((loadings**2).sum(axis=0) + 1)
        values.append(BETWEEN * shift + noise * rng.uniform(0.7, 1.3, size=p))
        names += [f"s{s:02d}"] * rows
    frame = pd.DataFrame(np.vstack(values), columns=list(COLUMNS))
    frame = Standardizer.fit(frame, COLUMNS).transform(frame)
    frame.insert(0, "source", names)
    frame.insert(0, "row_hash", [f"r{i}" for i in range(len(frame))])
    return frame


def design(sets: Sequence[TrainingSet], scores: pd.DataFrame) -> Design:
    """The design matrix of drawn sets; `scores` standardised, one row a row_hash."""
    place = {h: i for i, h in enumerate(scores["row_hash"].to_numpy(object))}
    values = scores[list(COLUMNS)].to_numpy(float)
    codes, names = pd.factorize(scores["source"], sort=True)
    parts = np.zeros((len(sets), len(names), len(COLUMNS)))
    shares = np.zeros((len(sets), len(names)))
    for i, one in enumerate(sets):
        at = np.array([place[h] for h in one.row_hashes])
        np.add.at(parts[i], codes[at], values[at] / len(at))
        shares[i] = np.bincount(codes[at], minlength=len(names)) / len(at)
    return Design(shares, parts.sum(axis=1), parts, tuple(map(str, names)),
                  np.array([s.arm for s in sets], object),
                  {f"set{i}": s.row_hashes for i, s in enumerate(sets)})


def two_designs(seed: int) -> tuple[Design, Design, np.ndarray]:
    """Designed arm and fusion of N_RUNS runs each, and an unseen source's rows (r, 9).

    70 % of the designed runs are within-source sets, the rest mixed, as in `laptop` (56 + 24).
    """
    world = synthetic_world(N_SOURCES + 1, 1000, seed)
    stranger = world["source"].eq(world["source"].iloc[-1])
    pool = world[~stranger]
    n_within = round(0.7 * N_RUNS / 2) * 2
    sets = designed_sets(pool, n_within, N_RUNS - n_within, SIZE, seed=seed,
                         columns=COLUMNS, min_sources=1)
    mixed = fusion_sets(pool, N_RUNS, SIZE, seed)
    return (design(sets, pool), design(mixed, pool),
            world.loc[stranger, list(COLUMNS)].to_numpy(float))


@dataclass(frozen=True)
class Outcomes:
    """Invented studies on one design. Y : (n, B) log losses; slopes : (p, B), the mean slopes."""

    Y: np.ndarray
    slopes: np.ndarray


def outcomes(made: Design, n: int, rng: np.random.Generator, *, slope_sd: float = SLOPE_SD,
             noise_sd: float | np.ndarray = NOISE_SD, slope_spread: float = 0.0,
             rows_sd: float = 0.0) -> Outcomes:
    """`n` studies: source effects + slopes of set means + noise, all normal.

    slope_spread : sd of a source's own slopes about the mean slopes; noise_sd : one value, or
    (n_runs,), a run's own; rows_sd : sd over sets of what their rows do to the loss beyond sources
    and indicators, which sets that share rows have in common.
    """
    S, p = made.shares.shape[1], made.X.shape[1]
    slopes = rng.normal(0, slope_sd, (p, n)) if slope_sd else np.zeros((p, n))
    Y = made.shares @ rng.normal(0, SOURCE_SD, (S, n)) + made.X @ slopes
    if slope_spread:
        own = rng.normal(0, slope_spread, (S * p, n))
        Y += made.parts.reshape(len(made.X), -1) @ own
    if rows_sd:
        values, vectors = np.linalg.eigh(row_overlap(list(made.rows.values())))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        Y += rows_sd * root @ rng.normal(size=Y.shape)
    noise = rng.normal(size=Y.shape) * np.broadcast_to(noise_sd, (len(Y),))[:, None]
    return Outcomes(Y + noise, slopes)


def pure_noise(n_studies: int, seed: int) -> pd.DataFrame:
    """No effect of anything, nine correlated indicators: r2 and any_significant by study."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(3, len(COLUMNS)))
    X = rng.normal(size=(RUNS, 3)) @ loadings + rng.normal(size=(RUNS, len(COLUMNS)))
    choice = SubsetSearch(X, np.ones((RUNS, 1)), TERMS).choose(rng.normal(size=(RUNS, n_studies)))
    return pd.DataFrame({"r2": choice.r2, "any_significant": (choice.p < 0.05).any(axis=1)})


def hc3_studies(X: np.ndarray, controls: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Slopes and HC3 half-widths of many outcomes on one design, both (p, B); Y : (n, B)."""
    A = slope_map(X, controls)
    full = np.hstack([controls, X])
    E = residualise(Y, full)
    # the trace of the residual projector, and with it leverage, holds for controls short of rank
    hat = 1 - np.diag(residualise(np.eye(len(X)), full))
    df = len(X) - np.linalg.matrix_rank(full)
    variance = A**2 @ (E / np.maximum(1 - hat, 1e-9)[:, None]) ** 2
    return A @ Y, student.ppf(0.5 + LEVEL / 2, df) * np.sqrt(variance)


def jackknife_studies(made: Design, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and delete-one-source half-widths of many outcomes, both (p, B)."""
    S = made.shares.shape[1]
    beta = slope_map(made.X, made.shares) @ Y
    gaps = deletion_maps(made.shares, made.X) @ Y - beta
    se = np.sqrt((S - 1) / S * (gaps**2).sum(axis=0))
    return beta, student.ppf(0.5 + LEVEL / 2, S - 1) * se


def design_comparison(n_designs: int, n_studies: int, seed: int) -> pd.DataFrame:
    """True example-level effects beside source effects: which design finds them?

    One row a study and design ("fusion, paper's procedure", "fusion, nine terms", "fusion with
    shares", "designed with shares"): rank_correlation of the fitted with the true score on the
    rows of an unseen source; half_width, median over the nine slopes, HC3, in log loss per sd;
    coverage, share of the nine 95 % intervals that hold the true slope (NaN after a choice).
    """
    found = []
    for d in range(n_designs):
        tilted, fused, rows = two_designs(seed + d)
        rng = np.random.default_rng([seed, d])
        for name, made, shares in (("fusion, nine terms", fused, False),
                                   ("fusion with shares", fused, True),
                                   ("designed with shares", tilted, True)):
            drawn = outcomes(made, n_studies, rng)
            controls = made.shares if shares else np.ones((len(made.X), 1))
            beta, half = hc3_studies(made.X, controls, drawn.Y)
            covered = np.abs(beta - drawn.slopes) <= half
            found.append(_compared(name, d, rows, beta, drawn.slopes, np.median(half, axis=0),
                                   covered.mean(axis=0)))
            if name == "fusion, nine terms":
                found.append(_paper_choice(made, drawn, rows, d))
    return pd.concat(found, ignore_index=True)


def _paper_choice(made, drawn, rows, d) -> pd.DataFrame:
    search = SubsetSearch(made.X, np.ones((len(made.X), 1)), TERMS, smaller=True)
    choice = search.choose(drawn.Y)
    beta = np.zeros_like(drawn.slopes)
    for b, g in enumerate(choice.subset):
        members = search.members(g)
        beta[members, b] = choice.beta[b, : len(members)]
    nan = np.full(len(choice.r2), np.nan)
    return _compared("fusion, paper's procedure", d, rows, beta, drawn.slopes, nan, nan)


def _compared(name, d, rows, beta, slopes, half, covered) -> pd.DataFrame:
    ranks = [spearmanr(rows @ b, rows @ s)[0] for b, s in zip(beta.T, slopes.T, strict=True)]
    return pd.DataFrame({"design": name, "world": d, "rank_correlation": ranks,
                         "half_width": half, "coverage": covered})


def coverage(n_designs: int, n_studies: int, seed: int) -> pd.DataFrame:
    """Shares of 95 % intervals that hold the truth, one row a design.

    hc3 : even noise;
    hc3_uneven : the noise sd runs fourfold, from half to twice, with the first indicator;
    hc3_rows : rows differ too, three times as much over sets as seeds do;
    jackknife : slopes vary over sources with sd 0.01, the target is their mean in new sources.
    """
    rows = []
    for d in range(n_designs):
        made, _, _ = two_designs(seed + d)
        rng = np.random.default_rng([seed, d, 1])
        uneven = NOISE_SD * 2 ** np.linspace(-1, 1, N_RUNS)[made.X[:, 0].argsort().argsort()]
        row = {"design": d}
        for name, noise in (("hc3", {"noise_sd": NOISE_SD}), ("hc3_uneven", {"noise_sd": uneven}),
                            ("hc3_rows", {"noise_sd": NOISE_SD / 3, "rows_sd": NOISE_SD})):
            drawn = outcomes(made, n_studies, rng, **noise)
            beta, half = hc3_studies(made.X, made.shares, drawn.Y)
            row[name] = float((np.abs(beta - drawn.slopes) <= half).mean())
        drawn = outcomes(made, n_studies, rng, slope_spread=0.01)
        beta, half = jackknife_studies(made, drawn.Y)
        row["jackknife"] = float((np.abs(beta - drawn.slopes) <= half).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def permutation_size(n_designs: int, n_studies: int, seed: int,
                     n_permutations: int) -> pd.DataFrame:
    """Rejections at 5 % where no indicator matters: one row a study, one column a test.

    h0b, h0a : only the sources differ; rows_plain, rows_counted : rows differ as well, three times
    as much over sets as seeds do, and H0b is tested without and with the shared rows counted.
    """
    found = []
    for d in range(n_designs):
        made, _, _ = two_designs(seed + d)
        rng = np.random.default_rng([seed, d, 2])
        sources = outcomes(made, n_studies, rng, slope_sd=0.0).Y
        rows = outcomes(made, n_studies, rng, slope_sd=0.0, noise_sd=NOISE_SD / 3,
                        rows_sd=NOISE_SD).Y
        for b in range(n_studies):
            tests = {"h0b": (sources, "H0b", None), "h0a": (sources, "H0a", None),
                     "rows_plain": (rows, "H0b", None), "rows_counted": (rows, "H0b", made.rows)}
            p = {
                name: permutation(made.runs(Y[:, b]), COLUMNS, null=null, rows=held, arms=None,
                                  n_permutations=n_permutations, seed=seed + b).p
                for name, (Y, null, held) in tests.items()
            }
            found.append({"design": d, "study": b} | {name: p[name] <= 0.05 for name in p})
    return pd.DataFrame(found)


def planner_band(n_studies: int, seed: int) -> pd.DataFrame:
    """Does the planner's 80 % band hold the half-width that the study then has?

    One row a study: classical (half-width by the residual variance, as planned) and hc3, each the
    share of the nine slopes whose half-width lies in the band; the pilot is 4 sets × 3 seeds.
    """
    rows = []
    per_design = 50
    for d in range(max(1, n_studies // per_design)):
        made, _, _ = two_designs(seed + d)
        rng = np.random.default_rng([seed, d, 3])
        full = np.hstack([made.shares, made.X])
        p, df = made.X.shape[1], N_RUNS - full.shape[1]
        drawn = outcomes(made, per_design, rng)
        _, hc3 = hc3_studies(made.X, made.shares, drawn.Y)
        realised = np.sqrt((residualise(drawn.Y, full) ** 2).sum(axis=0) / df)
        unit = half_widths(full, 1.0)[-p:]
        pilot = NOISE_SD * np.sqrt(rng.chisquare(8, per_design) / 8)
        for b in range(per_design):
            low, high = sigma_band(pilot[b], 8, df)
            inside = (unit * low <= hc3[:, b]) & (hc3[:, b] <= unit * high)
            rows.append({"design": d, "classical": low <= realised[b] <= high,
                         "hc3": inside.mean()})
    return pd.DataFrame(rows)


def simulate_gate(studies: int, seed: int, *, effect: float = 0.0, runs: int = 10,
                  draw_sd: float = 0.01, pools: int = 1) -> dict[str, float]:
    """Shares of the gate's verdicts over simulated comparisons in log loss (0.01 is 1 %).

    effect : of selected minus random, the same in all pools; runs : a side; draw_sd : between
    random draws, beyond the seed; pools : how many share Holm's correction.
    Returns `better` (one given pool is called better), `any_better` (at least one pool is),
    `worse`, `equal` (within ±1 %), and `covered` (the interval holds the effect), all in [0, 1].
    """
    rng = np.random.default_rng(seed)
    shape = (studies, pools)
    selected = effect + rng.normal(0, NOISE_SD, (*shape, runs))
    random = rng.normal(0, np.hypot(NOISE_SD, draw_sd), (*shape, runs))
    difference = selected.mean(-1) - random.mean(-1)
    welch = CompareMeans(*(DescrStatsW(side.reshape(-1, runs).T) for side in (selected, random)))
    p = welch.ttest_ind(usevar="unequal")[1].reshape(shape)
    p_margin = welch.ttost_ind(*BOUNDS, usevar="unequal")[0].reshape(shape)
    significant = holm_rows(p) < ALPHA
    better = significant & (difference < 0)
    p_effect = welch.ttest_ind(usevar="unequal", value=effect)[1].reshape(shape)
    return {
        "better": float(better[:, 0].mean()),
        "any_better": float(better.any(1).mean()),
        "worse": float((significant & (difference > 0))[:, 0].mean()),
        "equal": float(((holm_rows(p_margin) < ALPHA) & ~significant)[:, 0].mean()),
        "covered": float((p_effect[:, 0] > ALPHA).mean()),
    }


def holm_rows(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values in every row, as statsmodels' multipletests gives them one by one.

    p : (studies, pools); of ten thousand rows at once, where a call for each takes seconds
    """
    order = np.argsort(p, axis=1)
    stepped = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, axis=1), 1)
    return np.minimum(adjusted, 1)


def simulate_crossed(studies: int, seed: int) -> dict[str, float]:
    """Coverage of a zero difference when runs *and prompts* are drawn anew in each study.

    Returns `crossed`, the coverage of `crossed_interval`, and `runs_only`, that of the Welch
    interval, at 95 %.
    """
    rng = np.random.default_rng(seed)
    hits = np.zeros((studies, 2), bool)
    for i in range(studies):
        level = 2 + rng.normal(0, PROMPT_SD, PROMPTS)
        sides = []
        for _ in range(2):
            by_run = rng.normal(0, NOISE_SD, (10, 1))
            by_prompt = rng.normal(0, INTERACTION_SD, PROMPTS)
            sides.append(level + by_run + by_prompt + rng.normal(0, REST_SD, (10, PROMPTS)))
        low, high = crossed_interval(*sides)
        runs_only = ttest_ind(*(np.log(side.mean(1)) for side in sides), equal_var=False)
        hits[i] = low < 0 < high, runs_only.pvalue > ALPHA
    crossed, runs_only = hits.mean(0)
    return {"crossed": float(crossed), "runs_only": float(runs_only)}
