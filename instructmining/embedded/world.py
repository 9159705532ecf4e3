"""The embedded study's data and models: the corpus made into candidates, pools and evaluations."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core import files
from instructmining_core.config import ProfileError
from instructmining_core.data.duplicates import full_texts, shared_runs
from instructmining_core.models.hub import MARKER

from ..profile import DataConfig, Profile
from ..study_data import StudyData, read_exams
from .corpus import CANDIDATES, UNSEEN, Corpus, build_corpus
from .defects import KINDS, plant
from .standins import build_cached, build_each, cached, longest_first
from .training import OnProgress

FITTED_POOL_DEFECTS = 0.2  # share of defective rows in the pool from fitted sources


def study_data(data: DataConfig) -> StudyData:
    """Candidates with planted defects, pools with several shares of them, clean evaluation sets.

    Pools: the libraries that are in no set, once for each share of `defect_pools`; and unseen rows
    of the fitted libraries with 20 % defects. Evaluation rows come equally from all libraries, so
    `eval_prompts` is rounded down to a multiple of their number.
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
    candidates = plant(pd.concat(parts, ignore_index=True), data.defect_share, KINDS, data.seed)
    pools = _pools(table[table["split"] == "pool"], fitted, unseen, data)
    exams = {
        name: _equally(table[table["split"] == name], [*fitted, *unseen], data)
        for name in ("eval_1", "eval_2")
    }
    return StudyData(candidates, pools, exams["eval_1"], exams["eval_2"],
                     _facts(corpus, candidates, fitted, unseen))  # fmt: skip


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
    pool = plant(_some(rows, clean, data.seed), share, KINDS, data.seed)
    marked = pool["id"] + f"@{100 * share:.0f}%"
    return pool.assign(id=pool["id"].where(pool["kind"] == "", marked))


def _some(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    if not count or count >= len(rows):
        return rows.reset_index(drop=True)
    return rows.sample(count, random_state=seed).sort_index().reset_index(drop=True)


def _equally(rows: pd.DataFrame, sources: list[str], data: DataConfig) -> pd.DataFrame:
    each = data.eval_prompts // len(sources) if data.eval_prompts else len(rows)
    each = max(each, 1)
    parts = [_some(rows[rows["source"] == name], each, data.seed) for name in sources]
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


def build_standins(profile: Profile, parts: Sequence[str]) -> Path:
    """The folder that holds the named stand-ins (`standins.PARTS`), built if they are not there.

    With `models.standin_text` the base learns from those files in place of the corpus. Several that
    are missing are built side by side.
    """
    root = cached(*_made_of(profile))
    missing = [part for part in dict.fromkeys(parts) if not (root / part / MARKER).exists()]
    if missing:
        build_each(partial(_build_one, profile), sorted(missing, key=longest_first))
    return root


def _made_of(profile: Profile) -> tuple[Corpus, str, list[str] | None]:
    """Corpus, size and, where the profile names other text, the base model's documents."""
    texts = base_texts(profile) if profile.models.standin_text else None
    return build_corpus(profile.data.corpus), profile.models.standin_size, texts


def _build_one(profile: Profile, part: str, on_progress: OnProgress) -> None:
    build_cached(part, *_made_of(profile), on_progress)


def base_texts(profile: Profile) -> list[str]:
    """The documents of the profile's text files, JSONL with a field `text`.

    Documents that share a run of eight words with an evaluation row are left out; which ones is
    kept in the cache, since looking through millions of words takes longer than reading them.
    """
    texts, asked = _documents(profile), full_texts(_exam(profile.data))
    digest = hashlib.sha256()
    for text in (*texts, *asked):
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    kept = files.cache() / "base_text" / f"{digest.hexdigest()[:16]}.json"
    if not kept.is_file():
        shared = shared_runs(texts, asked)["text_left"]
        files.write_atomic(kept, json.dumps(sorted({int(i) for i in shared})))
    out = set(json.loads(kept.read_text(encoding="utf-8")))
    return [text for i, text in enumerate(texts) if i not in out]


def _exam(data: DataConfig) -> pd.DataFrame:
    """Both evaluation sets."""
    if data.kind == "embedded":
        whole = study_data(data)
        return pd.concat([whole.eval_1, whole.eval_2], ignore_index=True)
    return pd.concat(read_exams(data, files.root()), ignore_index=True)


def _documents(profile: Profile) -> list[str]:
    folder = files.root() / profile.data.folder
    rows = []
    for name in profile.models.standin_text:
        path = folder / name
        if not path.is_file():
            raise ProfileError(f"models.standin_text names {path}, which is not there.")
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line)["text"] for line in lines]
    return rows
