"""The embedded study's data: the corpus made into candidates, pools and evaluation sets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..profile import DataConfig
from ..study_data import StudyData
from .corpus import CANDIDATES, UNSEEN, Corpus, build_corpus
from .defects import plant

FITTED_POOL_DEFECTS = 0.2  # share of defective rows in the pool from fitted sources


def study_data(data: DataConfig) -> StudyData:
    """Candidates with planted defects, pools with several shares of them, clean evaluation sets.

    Pools: the libraries that are in no set, once for each share of `defect_pools`; and unseen rows
    of the fitted libraries with 20 % defects. Evaluation rows come equally from all libraries, so
    `eval_prompts` is rounded down to a multiple of their number. The regime's prompts are those of
    their splits that they leave.
    """
    corpus = build_corpus(data.corpus)
    table = corpus.table
    candidates = table[table["split"] == "candidates"]
    fitted = [name for name in CANDIDATES if name in set(candidates["source"])]
    fitted = fitted[: data.libraries] if data.libraries else fitted
    unseen = [name for name in UNSEEN if name in set(table["source"])]
    parts = [
        _some(candidates[candidates["source"] == name], data.rows_per_source, data.seed)
        for name in fitted
    ]
    candidates = plant(pd.concat(parts, ignore_index=True), data.defect_share, data.seed)
    pools = _pools(table[table["split"] == "pool"], fitted, unseen, data)
    sources = [*fitted, *unseen]
    exams = {
        name: _equally(table[table["split"] == name], sources, data.eval_prompts, data.seed)
        for name in ("eval_1", "eval_2")
    }
    if data.regime_prompts:
        asked = {one for exam in exams.values() for one in exam["id"]}
        left = table[table["split"].isin(exams) & ~table["id"].isin(asked)]
        exams["regime"] = _some(left, data.regime_prompts, data.seed)
    return StudyData(candidates, pools, exams, _facts(corpus, candidates, fitted, unseen))


def _pools(
    rows: pd.DataFrame, fitted: list[str], unseen: list[str], data: DataConfig
) -> dict[str, pd.DataFrame]:
    pools = {}
    for share in data.defect_pools:
        name = f"unseen sources, {100 * share:.0f} % defects"
        pools[name] = _pool(rows[rows["source"].isin(unseen)], share, data)
    known = rows[rows["source"].isin(fitted)]
    name = f"unseen rows of fitted sources, {100 * FITTED_POOL_DEFECTS:.0f} % defects"
    pools[name] = _pool(known, FITTED_POOL_DEFECTS, data)
    return pools


def _pool(rows: pd.DataFrame, share: float, data: DataConfig) -> pd.DataFrame:
    """`pool_rows` rows, of which `share` are defective twins, each beside its clean row.

    Words and answers are lent by the pool's own clean rows, so a row's twin may read otherwise in
    another pool: the twin's id names the share.
    """
    clean = min(round(data.pool_rows * (1 - share)), len(rows))
    pool = plant(_some(rows, clean, data.seed), share, data.seed)
    marked = pool["id"] + f"@{100 * share:.0f}%"
    return pool.assign(id=pool["id"].where(pool["kind"] == "", marked))


def _some(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    if not count or count >= len(rows):
        return rows.reset_index(drop=True)
    return rows.sample(count, random_state=seed).sort_index().reset_index(drop=True)


def _equally(rows: pd.DataFrame, sources: list[str], prompts: int, seed: int) -> pd.DataFrame:
    each = prompts // len(sources) if prompts else len(rows)
    each = max(each, 1)
    parts = [_some(rows[rows["source"] == name], each, seed) for name in sources]
    return pd.concat(parts, ignore_index=True)


def _facts(
    corpus: Corpus, candidates: pd.DataFrame, fitted: list[str], unseen: list[str]
) -> pd.DataFrame:
    """One row a source: version, licence, role, rows as read, rows as candidates, mean words."""
    facts = corpus.versions.set_index("source").loc[[*fitted, *unseen]].copy()
    facts["role"] = ["candidate"] * len(fitted) + ["unseen pool"] * len(unseen)
    facts["candidates"] = candidates.groupby("source").size().reindex(facts.index).fillna(0)
    words = candidates["response"].str.split().str.len().groupby(candidates["source"]).mean()
    facts["words"] = words.reindex(facts.index).round(1)
    facts = facts.astype({"candidates": np.int64}).reset_index()
    return facts.rename(columns={"rows": "read", "words": "mean words of a response"})
