"""Worlds for simulated studies: pools of rows, real sets drawn from them, and invented losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from instructmining_core.config import COLUMNS
from instructmining_core.finetuning.sets import TrainingSet, designed_sets, fusion_sets
from instructmining_core.regression.permutation import row_overlap
from instructmining_core.regression.run_table import Standardizer

N_SOURCES, N_RUNS, SIZE = 12, 80, 400  # of a simulated study; rows of a set
BETWEEN = 1.0  # sd of the source means over the sd inside a source
NOISE_SD = 0.01  # between seeds, in log loss
SOURCE_SD = 0.04  # of a source's own effect on log loss
SLOPE_SD = 0.02  # of an indicator's effect, log loss per sd of the pool's rows


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
