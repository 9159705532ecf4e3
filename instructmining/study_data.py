"""Named sets of records: what training rows, pools and evaluation prompts are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core.config import ProfileError
from instructmining_core.data.duplicates import without_copies_of
from instructmining_core.data.records import read_records, row_hash
from instructmining_core.models.heads import head_rows

from .profile import DataConfig, SourceConfig

FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz")  # also where other sets are from the hub
LISTED = 20  # malformed records of one file that are named; all are counted


@dataclass(frozen=True)
class StudyData:
    """Record tables: `candidates` for the sets, `pools` by name, and two evaluation sets.

    `facts` counts what was read and what was left out, by source, for the notebook's table.
    """

    candidates: pd.DataFrame
    pools: dict[str, pd.DataFrame]
    eval_1: pd.DataFrame
    eval_2: pd.DataFrame
    facts: pd.DataFrame

    @property
    def everything(self) -> pd.DataFrame:
        """Every row that is scored, once: the candidates and all pools."""
        rows = pd.concat([self.candidates, *self.pools.values()], ignore_index=True)
        return rows.drop_duplicates("id", ignore_index=True)

    @property
    def roles(self) -> pd.DataFrame:
        """Which row serves as what: columns id and role ("candidates" or a pool's name)."""
        tables = {"candidates": self.candidates, **self.pools}
        parts = [pd.DataFrame({"id": rows["id"], "role": name}) for name, rows in tables.items()]
        return pd.concat(parts, ignore_index=True)


def read_source(source: SourceConfig, data: DataConfig, root: Path) -> pd.DataFrame:
    """Read one set and draw `take` of its usable rows by seed (all when 0).

    Usable: at least one assistant turn with text in it, and neither a row that the shipped heads
    were trained on nor one of this set that shares a run of eight words with such a row, whatever
    models the profile names: so all profiles draw the same rows. What is not usable is counted in
    `.attrs`: `malformed`, with the first places in `problems`, `no_answer` and `trained_heads`.
    Raises ProfileError, with the way to get the file, when a file is missing.
    """
    where: str | Path = source.where
    if data.kind == "files" or Path(source.where).suffix in FILES:
        where = root / data.folder / source.where
        if not where.exists():
            hint = source.how_to_get or "Set data.folder to the folder that holds it."
            raise ProfileError(f"{source.name}: there is no file {where}. {hint}")
    table, problems = read_records(where, source=source.name, on_error="collect")
    answered = table[[_answered(messages) for messages in table["messages"]]]
    usable = _unknown_to_heads(answered)
    left_out = len(answered) - len(usable)
    if source.take and source.take < len(usable):
        usable = usable.sample(source.take, random_state=data.seed)
    usable = usable.reset_index(drop=True)
    usable.attrs = {"malformed": len(problems), "no_answer": len(table) - len(answered),
                    "trained_heads": left_out,
                    "problems": [str(problem) for problem in problems[:LISTED]]}  # fmt: skip
    return usable


def read_exams(data: DataConfig, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two evaluation sets of a profile of files or hub names.

    A row of the second that shares a run of eight words with the first is left out, and counted in
    `.attrs["near_copies"]` of the second.
    """
    first, second = (
        _prompts(read_source(source, data, root), data) for source in (data.eval_1, data.eval_2)
    )
    apart = without_copies_of(second, first)
    apart.attrs = {**second.attrs, "near_copies": len(second) - len(apart)}
    return first, apart


def read_study_data(data: DataConfig, root: Path) -> StudyData:
    """Sources, pools and evaluation sets of a profile of files or hub names.

    Candidate and pool rows that share a run of eight words with an evaluation row, and pool rows
    that share one with a candidate, are left out, and counted (statistics, section 8).
    """
    exams = dict(zip(("eval_1", "eval_2"), read_exams(data, root), strict=True))
    both = pd.concat(exams.values(), ignore_index=True)
    facts, candidates, pools, rest = [], [], {}, []
    for source in data.sources:
        rows, fact = _usable(source, data, root, both)
        kept, spare = _split(rows, data.rows_per_source, data.seed)
        candidates.append(kept)
        rest.append(spare)
        facts.append({**fact, "role": "candidates", "rows": len(kept)})
    fitted = pd.concat(candidates, ignore_index=True)
    for source in data.unseen:
        rows, fact = _usable(source, data, root, both)
        apart = without_copies_of(rows, fitted)
        kept, _ = _split(apart, data.pool_rows, data.seed)
        pools[f"{source.name} (unseen source)"] = kept
        facts.append({**fact, "role": "pool", "rows": len(kept),
                      "near copies of candidates": len(rows) - len(apart)})  # fmt: skip
    spare = pd.concat(rest, ignore_index=True)
    if len(spare):
        apart = without_copies_of(spare, fitted)
        name = "unseen rows of fitted sources"
        pools[name], _ = _split(apart, data.pool_rows, data.seed)
        facts.append({"source": name, "role": "pool", "read": len(spare), "rows": len(pools[name]),
                      "near copies of candidates": len(spare) - len(apart)})  # fmt: skip
    for name, exam in exams.items():
        facts.append({"source": exam["source"].iloc[0], "role": name, "rows": len(exam),
                      "malformed": exam.attrs["malformed"], "no answer": exam.attrs["no_answer"],
                      "trained heads": exam.attrs["trained_heads"],
                      "near copies of evaluation rows": exam.attrs.get("near_copies", 0)})
    table = pd.DataFrame(facts)
    counts = [column for column in table if column not in ("source", "role", "problems")]
    table[counts] = table[counts].fillna(0).astype(int)
    fitted, *others = _own_ids([fitted, *pools.values()])
    pools = dict(zip(pools, others, strict=True))
    return StudyData(fitted, pools, exams["eval_1"], exams["eval_2"], table)


def _own_ids(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables with ids that name one row: one that several rows bear becomes source/row#part."""
    keys = ["source", "file", "row", "part"]
    rows = pd.concat(tables)[["id", *keys]].drop_duplicates(keys)
    shared = set(rows.loc[rows["id"].duplicated(keep=False), "id"])
    return [
        table.assign(id=[
            f"{source}/{row}#{part}" if own in shared else own
            for own, source, row, part in zip(
                table["id"], table["source"], table["row"], table["part"], strict=True)
        ])
        for table in tables
    ]  # fmt: skip


def _usable(
    source: SourceConfig, data: DataConfig, root: Path, exam: pd.DataFrame
) -> tuple[pd.DataFrame, dict]:
    """Rows that may be trained on, and how many were left out for which reason."""
    read = read_source(source, data, root)
    limit = data.max_prompt_words or float("inf")
    short = read[[_prompt_words(m) <= limit for m in read["messages"]]]
    clean = without_copies_of(short, exam)
    return clean, {
        "source": source.name, "read": len(read), "malformed": read.attrs["malformed"],
        "no answer": read.attrs["no_answer"], "trained heads": read.attrs["trained_heads"],
        "prompt too long": len(read) - len(short),
        "near copies of evaluation rows": len(short) - len(clean),
    }  # fmt: skip


def _unknown_to_heads(table: pd.DataFrame) -> pd.DataFrame:
    """The records that did not train the shipped heads, nor share a run of words with one here.

    The embedded corpus needs no such check: the heads have seen no docstring of a package.
    """
    trained = np.array([row_hash(m)[:16] in head_rows() for m in table["messages"]], dtype=bool)
    rest = table[~trained]
    return without_copies_of(rest, table[trained]) if trained.any() else rest


def _split(rows: pd.DataFrame, wanted: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`wanted` rows drawn by seed (all, in their order, when 0 or too few), and the others."""
    if not wanted or wanted >= len(rows):
        return rows.reset_index(drop=True), rows.iloc[:0]
    shuffled = rows.sample(frac=1.0, random_state=seed)
    return shuffled.iloc[:wanted].reset_index(drop=True), shuffled.iloc[wanted:]


def _prompts(table: pd.DataFrame, data: DataConfig) -> pd.DataFrame:
    if data.eval_prompts and data.eval_prompts < len(table):
        table = table.sample(data.eval_prompts, random_state=data.seed).sort_index()
    return table.reset_index(drop=True)


def _prompt_words(messages: list[dict]) -> int:
    """Words before the last answer: they must leave room for it within `max_tokens`."""
    return sum(len(m["content"].split()) for m in messages[:-1])


def _answered(messages: list[dict]) -> bool:
    return any(m["role"] == "assistant" and m["content"].strip() for m in messages)


def under_other_prompts(conversations: Sequence[list[dict]]) -> list[list[dict]]:
    """Each last answer after what was said before another one's: a fixed derangement.

    What answers cost more here than under their own prompts is what a model sees of relevance.
    """
    order = np.random.default_rng(0).permutation(len(conversations))
    prompts = [conversations[i][:-1] for i in order]
    moved = [*prompts[1:], *prompts[:1]]
    found = list(conversations)
    for i, prompt in zip(order, moved, strict=True):
        found[i] = [*prompt, conversations[i][-1]]
    return found
