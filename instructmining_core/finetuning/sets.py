"""Training sets for the sweep: the paper's fusion, sets tilted within a source, anchors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import norm

from ..config import InstructMiningError

MAX_ROW_SHARE = 0.4  # share of a source's rows that one designed set may use
SETS_FOR_HELD_OUT = 6  # within-source sets that a source needs to be tested alone
REDRAWS = 1000  # of shares, before they are said to be undeliverable


@dataclass(frozen=True)
class TrainingSet:
    """One set of rows to finetune on, with how it was drawn.

    set_id : first 16 hex of the hash of arm and row hashes; the same rows, the same id
    arm : "fusion", "within", "mixed" or "tokens" (equal number of training tokens)
    row_hashes : each row once, in drawing order
    shares : source -> share of the set's rows, sources present only
    tilt : unit direction in the standardised indicator space; () if untilted
    source : the one source of a within-source set, else ""
    init_seed, order_seed : of the adapter and of the row order in training
    anchor : True for a repeat of another set on further seeds
    """

    set_id: str
    arm: str
    row_hashes: tuple[str, ...]
    shares: Mapping[str, float]
    tilt: tuple[float, ...] = ()
    source: str = ""
    init_seed: int = 0
    order_seed: int = 0
    anchor: bool = False

    def as_dict(self) -> dict:
        """Plain types only; `from_dict` gives an equal set back, also through JSON."""
        return asdict(self) | {"row_hashes": list(self.row_hashes), "tilt": list(self.tilt)}

    @classmethod
    def from_dict(cls, record: Mapping) -> TrainingSet:
        """The set that `as_dict` described."""
        return cls(**{**record, **{k: tuple(record[k]) for k in ("row_hashes", "tilt")}})


def largest_remainder(shares: np.ndarray, size: int) -> np.ndarray:
    """Whole counts, shape of `shares`, that sum to exactly `size` (Hamilton's method)."""
    exact = np.asarray(shares, float) / np.sum(shares) * size
    counts = np.floor(exact).astype(int)
    # argsort is stable on the negated remainder, so ties go to the first source
    for i in np.argsort(-(exact - counts), kind="stable")[: size - counts.sum()]:
        counts[i] += 1
    return counts


def rows_by_source(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Distinct rows of each source, sources sorted; a row met twice keeps its first source.

    scores : one row an example, with `source`, `row_hash` and the indicators
    """
    rows = scores.drop_duplicates("row_hash")
    return dict(iter(rows.groupby(rows["source"].astype(str), sort=True)))


def fusion_sets(scores: pd.DataFrame, n: int, size: int, seed: int) -> list[TrainingSet]:
    """The paper's fusion: `n` sets of `size` rows, source i giving size·r_i/Σr, r_i uniform.

    Paper v3, section on fusion; the distribution of r_i is not published, uniform is our choice.
    Where a source has fewer rows than its part the whole r is drawn again, which makes r uniform
    over what can be delivered. Errors: where that fails `REDRAWS` times.
    """
    rng = np.random.default_rng(seed)
    pool = {s: part["row_hash"].to_numpy(object) for s, part in rows_by_source(scores).items()}
    names, have = list(pool), np.array([len(rows) for rows in pool.values()])
    made = []
    for _ in range(n):
        for _ in range(1 + REDRAWS):
            counts = largest_remainder(rng.uniform(size=len(names)), size)
            if (counts <= have).all():
                break
        else:
            i = int(np.argmax(counts - have))
            raise InstructMiningError(
                f"source {names[i]!r} has {have[i]} rows but a fusion set of {size} asks it for "
                f"{counts[i]}: lower the size or leave the source out")
        rows = [rng.choice(pool[s], c, replace=False) for s, c in zip(names, counts, strict=True)]
        made.append(_training_set("fusion", names, counts, rows))
    return made


def _training_set(arm: str, names: Sequence[str], counts: Sequence[int],
                  rows: Sequence[np.ndarray], tilt: Sequence[float] = (),
                  source: str = "") -> TrainingSet:
    """A TrainingSet of `counts[i]` rows, hashes `rows[i]`, from source `names[i]`."""
    hashes = tuple(str(h) for h in np.concatenate(rows))
    shares = {s: int(c) / len(hashes) for s, c in zip(names, counts, strict=True) if c > 0}
    set_id = hashlib.sha256("\n".join([arm, *hashes]).encode()).hexdigest()[:16]
    return TrainingSet(set_id, arm, hashes, shares, tuple(float(t) for t in tilt), source)


def directions(n: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Unit directions, shape (n, dim): +q and −q in turn over random orthonormal frames."""
    found = []
    while 2 * len(found) < n:
        q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
        # signs of R's diagonal make the frame uniform over rotations (Mezzadri 2007)
        found.extend((q * np.sign(np.diag(r))).T)
    pairs = np.array([sign * q for q in found for sign in (1.0, -1.0)])
    return pairs[:n]


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Blom's normal scores Φ⁻¹((rank − 3/8)/(n + 1/4)), mean near 0, sd near 1."""
    ranks = pd.Series(values).rank().to_numpy()
    return norm.ppf((ranks - 0.375) / (len(values) + 0.25))


def tilted_order(values: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Positions in the order of a draw without replacement with weight exp(strength·q).

    q is the normal score of `values`, shape (n,). Sorting by log weight plus Gumbel noise equals
    drawing one by one (Efraimidis & Spirakis 2006).
    """
    keys = strength * normal_scores(values) + rng.gumbel(size=len(values))
    return np.argsort(-keys, kind="stable")


def within_space(rows: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Indicators standardised over one source's rows: shape (rows, columns).

    A missing value and a constant indicator count as 0: neither tilts.
    """
    raw = rows[list(columns)].to_numpy(float)
    finite = np.where(np.isfinite(raw), raw, np.nan)
    seen = np.maximum(np.isfinite(finite).sum(axis=0), 1)
    mean = np.nansum(finite, axis=0) / seen
    sd = np.sqrt(np.nansum((finite - mean) ** 2, axis=0) / seen)
    return np.nan_to_num((finite - mean) / np.where(sd > 0, sd, np.inf))


def designed_sets(scores: pd.DataFrame, n_within: int, n_mixed: int, size: int,
                  strength: float = 1.5, seed: int = 0, *,
                  columns: Sequence[str], min_sources: int = 8,
                  sets_per_source: int = SETS_FOR_HELD_OUT) -> list[TrainingSet]:
    """The designed arm: `n_within` tilted sets of one source, then `n_mixed` of two or three.

    scores : see `rows_by_source`; columns : the indicators to tilt; strength : in normal scores
    No source gives more than 40 % of its rows to a set, so a source with fewer than size/0.4
    rows enters mixed sets only. At most n_within // sets_per_source sources get within-source
    sets, drawn at random, so that each has enough of them to be tested alone.
    Errors: where the pool can't deliver. See statistics.md, section 2.
    """
    rng = np.random.default_rng(seed)
    rows, pool, space = _pool(scores, columns)
    if len(pool) < min_sources:
        raise InstructMiningError(
            f"the pool has {len(pool)} sources, the design wants {min_sources}: add sources, or "
            "pass min_sources and keep to within-source claims")
    caps = {s: int(MAX_ROW_SHARE * len(part)) for s, part in rows.items()}
    eligible = [s for s in pool if caps[s] >= size]
    if n_within and not eligible:
        raise InstructMiningError(
            f"no source has the {int(np.ceil(size / MAX_ROW_SHARE))} rows that a tilted set of "
            f"{size} needs; largest: {max(map(len, pool.values()))}")
    wanted = max(1, min(len(eligible), n_within // max(sets_per_source, 1)))
    eligible = [eligible[i] for i in rng.permutation(len(eligible))[:wanted]]
    made = [
        _training_set("within", [source], [size], [pool[source][order[:size]]], tilt, source)
        for source, tilt, order in _tilted(
            space, eligible, directions(n_within, len(columns), rng), strength, rng)
    ]
    for tilt in directions(n_mixed, len(columns), rng):
        names, counts = _mixture(list(pool), caps, size, rng)
        drawn = [pool[s][tilted_order(space[s] @ tilt, strength, rng)[:c]]
                 for s, c in zip(names, counts, strict=True)]
        made.append(_training_set("mixed", names, counts, drawn, tilt))
    return made


def equal_token_sets(scores: pd.DataFrame, n: int, tokens: int,
                     strength: float = 1.5, seed: int = 0, *,
                     columns: Sequence[str]) -> list[TrainingSet]:
    """Tilted sets of one source with the same number of response tokens instead of rows.

    Rows are drawn as in `designed_sets` until their `len_out` sums to `tokens`; the last row is
    kept where that comes nearer. At a fixed number of rows mean length is the number of training
    tokens, so only this arm (24 sets or more) can tell the two apart.
    """
    rng = np.random.default_rng(seed)
    rows, pool, space = _pool(scores, columns)
    own = {s: part["len_out"].astype(float).fillna(0).to_numpy() for s, part in rows.items()}
    eligible = [s for s in pool if own[s].sum() * MAX_ROW_SHARE >= tokens]
    if not eligible:
        raise InstructMiningError(
            f"no source holds {tokens / MAX_ROW_SHARE:.0f} tokens of responses, which a set of "
            f"{tokens} needs; lower the number of tokens")
    made = []
    tilts = directions(n, len(columns), rng)
    for source, tilt, order in _tilted(space, eligible, tilts, strength, rng):
        summed = np.cumsum(own[source][order])
        last = int(np.argmin(np.abs(summed - tokens))) + 1
        drawn = pool[source][order[:last]]
        made.append(_training_set("tokens", [source], [last], [drawn], tilt, source))
    return made


def _pool(scores: pd.DataFrame, columns: Sequence[str]) -> tuple[dict, dict, dict]:
    """Rows, their hashes and their `within_space`, by source."""
    rows = rows_by_source(scores)
    return (rows, {source: part["row_hash"].to_numpy(object) for source, part in rows.items()},
            {source: within_space(part, columns) for source, part in rows.items()})


def _tilted(space, sources, tilts, strength, rng) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each direction with its source and the order in which rows are drawn there."""
    for i, tilt in enumerate(tilts):
        source = sources[(i // 2) % len(sources)]  # // 2: a source gets both signs of a direction
        yield source, tilt, tilted_order(space[source] @ tilt, strength, rng)


def _mixture(names, caps, size, rng) -> tuple[list[str], np.ndarray]:
    """Two or three sources and their row counts, Dirichlet(2), redrawn until all can deliver."""
    for _ in range(REDRAWS):
        k = min(int(rng.integers(2, 4)), len(names))
        chosen = [names[i] for i in rng.choice(len(names), k, replace=False)]
        counts = largest_remainder(rng.dirichlet(np.full(k, 2.0)), size)
        if k > 1 and counts.min() > 0 and all(
                c <= caps[s] for s, c in zip(chosen, counts, strict=True)):
            return chosen, counts
    raise InstructMiningError(
        f"no mixture of two or three sources delivers {size} rows while each gives at most "
        f"{MAX_ROW_SHARE:.0%} of its own: lower the size or add rows")


def anchors(sets: Sequence[TrainingSet], k: int, seeds: Sequence[int]) -> list[TrainingSet]:
    """Repeats of `k` designed sets, spread evenly over the list, on each of `seeds`; same set_id.
    """
    designed = [s for s in sets if s.arm != "fusion" and not s.anchor] or list(sets)
    if k > len(designed):
        raise InstructMiningError(f"{k} anchors asked from {len(designed)} sets")
    chosen = [designed[i] for i in np.linspace(0, len(designed) - 1, k).round().astype(int)]
    return [replace(s, init_seed=seed, order_seed=seed, anchor=True)
            for s in chosen for seed in seeds]


def set_means(sets: Sequence[TrainingSet], scores: pd.DataFrame,
              columns: Sequence[str]) -> pd.DataFrame:
    """Mean of each indicator over a set's rows, in the indicator's own units; index set_id.

    Rows without a value are left out of that mean; the largest share left out of any set's mean
    is in `.attrs["missing"]`, by column.
    """
    by_hash = scores.drop_duplicates("row_hash").set_index("row_hash")[list(columns)].astype(float)
    distinct = {s.set_id: s for s in sets}
    means, missing = [], []
    for one in distinct.values():
        try:
            part = by_hash.loc[list(one.row_hashes)]
        except KeyError as error:
            text = f"set {one.set_id}: some rows have no scores ({error})"
            raise InstructMiningError(text) from None
        means.append(part.mean())
        missing.append(part.isna().mean())
    frame = pd.DataFrame(means, index=pd.Index(distinct, name="set_id"), columns=list(columns))
    frame.attrs["missing"] = pd.DataFrame(missing).max().to_dict()
    return frame
