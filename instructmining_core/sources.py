"""Named sets of records: what training rows, pools and evaluation prompts are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .near_copies import without_copies_of
from .profiles import DataConfig, ProfileError, SourceConfig
from .records import read_records

FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz")  # also where other sets are from the hub


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

    Usable: at least one assistant turn with text in it. Raises ProfileError, with the way to get
    the file, when a file is missing.
    """
    where: str | Path = source.where
    if data.kind == "files" or Path(source.where).suffix in FILES:
        where = root / data.folder / source.where
        if not where.exists():
            hint = source.how_to_get or "Set data.folder to the folder that holds it."
            raise ProfileError(f"{source.name}: there is no file {where}. {hint}")
    table, _ = read_records(where, source=source.name, on_error="collect")
    usable = table[[_answered(messages) for messages in table["messages"]]]
    if source.take and source.take < len(usable):
        usable = usable.sample(source.take, random_state=data.seed)
    return usable.reset_index(drop=True)


def read_study_data(data: DataConfig, root: Path) -> StudyData:
    """Sources, pools and evaluation sets of a profile of files or hub names.

    Candidate and pool rows that share a run of eight words with an evaluation row are left out,
    and counted (statistics, section 8).
    """
    eval_1, eval_2 = (
        _prompts(read_source(source, data, root), data) for source in (data.eval_1, data.eval_2)
    )
    exam = pd.concat([eval_1, eval_2], ignore_index=True)
    limit = data.max_prompt_words or float("inf")
    facts, kept = [], {}
    for source, role in [(s, "candidates") for s in data.sources] + [
        (s, "pool") for s in data.unseen
    ]:
        read = read_source(source, data, root)
        short = read[[_prompt_words(m) <= limit for m in read["messages"]]]
        clean = without_copies_of(short, exam)
        wanted = data.rows_per_source if role == "candidates" else data.pool_rows
        held_out = clean.iloc[:0]
        if wanted and wanted < len(clean):
            shuffled = clean.sample(frac=1.0, random_state=data.seed)
            clean, held_out = shuffled.iloc[:wanted], shuffled.iloc[wanted:]
        kept[source.name] = (role, clean.reset_index(drop=True), held_out.reset_index(drop=True))
        facts.append(
            {"source": source.name, "role": role, "read": len(read), "rows": len(clean),
             "prompt too long": len(read) - len(short),
             "near copies of evaluation rows": len(short) - len(held_out) - len(clean)}
        )  # fmt: skip
    candidates = [rows for role, rows, _ in kept.values() if role == "candidates"]
    pools = {f"{name} (unseen source)": rows for name, (role, rows, _) in kept.items()
             if role == "pool"}  # fmt: skip
    rest = [held for role, _, held in kept.values() if role == "candidates" and len(held)]
    if rest:
        fresh = pd.concat(rest, ignore_index=True)
        size = min(data.pool_rows, len(fresh))
        pools["unseen rows of fitted sources"] = fresh.sample(size, random_state=data.seed)
    return StudyData(
        pd.concat(candidates, ignore_index=True), pools, eval_1, eval_2, pd.DataFrame(facts)
    )


def _prompts(table: pd.DataFrame, data: DataConfig) -> pd.DataFrame:
    if data.eval_prompts and data.eval_prompts < len(table):
        table = table.sample(data.eval_prompts, random_state=data.seed).sort_index()
    return table.reset_index(drop=True)


def _prompt_words(messages: list[dict]) -> int:
    """Words before the last answer: they must leave room for it within `max_tokens`."""
    return sum(len(m["content"].split()) for m in messages[:-1])


def _answered(messages: list[dict]) -> bool:
    return any(m["role"] == "assistant" and m["content"].strip() for m in messages)
