"""Named sets of records: what training rows, pools, prompts and questions are drawn from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core.config import ProfileError
from instructmining_core.data.choices import Question
from instructmining_core.data.duplicates import (
    fold,
    groups,
    shared_runs,
    without_copies_of,
    word_runs,
)
from instructmining_core.data.fields import Messages, is_answer
from instructmining_core.data.formats import conversations
from instructmining_core.data.records import iter_rows, read_records, row_hash, with_row_hash
from instructmining_core.models.heads import head_rows

from .profile import DataConfig, SourceConfig

FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz")  # also where other sets are from the hub
LISTED = 20  # malformed records of one file that are named; all are counted
MARKS = {  # what `SourceConfig.clean` takes out of a text, and what it puts there
    "end_marks": (re.compile(r"(?:\s*<\|endoftext\|>)+\s*$"), ""),
    "literal_newlines": (re.compile(r"\\n"), "\n"),
    "calculator": (re.compile(r"<<[^<>]*>>"), ""),
}
ONE_LABEL_OF = 5  # rows of a template from which a single answer tells that it has no other


@dataclass(frozen=True)
class StudyData:
    """Record tables: `candidates` for the sets, `pools` by name, and the evaluation sets.

    exams : "eval_1", "eval_2", and where the profile has them "regime" (the regime's prompts),
    "gate" (the prompts that are left), "human" (people's answers to eval_1's prompts).
    facts : counts what was read, cleaned and left out, by source, for the notebook's table.
    """

    candidates: pd.DataFrame
    pools: dict[str, pd.DataFrame]
    exams: dict[str, pd.DataFrame]
    facts: pd.DataFrame

    @property
    def eval_1(self) -> pd.DataFrame:
        """The evaluation set that rules are fitted on."""
        return self.exams["eval_1"]

    @property
    def eval_2(self) -> pd.DataFrame:
        """The evaluation set that models are judged by."""
        return self.exams["eval_2"]

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
    were trained on nor one that shares a run of eight words with such a row, whatever models the
    profile names: so all profiles draw the same rows; then `cleaned`. What is not usable is counted
    in `.attrs`: `malformed`, with the first places in `problems`, `no_answer`, `trained_heads`,
    `cleaned`. Raises ProfileError, with the way to get the file, when it is missing.
    """
    where = _place(source, data, root)
    table, problems = read_records(where, source=source.name, on_error="collect")
    if source.records:
        first, past = source.records
        table = table[table["row"].between(first, past - 1)]
    answered = table[[_answered(messages) for messages in table["messages"]]]
    unknown = _unknown_to_heads(answered)
    left_out = len(answered) - len(unknown)
    usable, told = cleaned(unknown, source, where)
    if source.take and source.take < len(usable):
        usable = usable.sample(source.take, random_state=data.seed)
    usable = usable.reset_index(drop=True)
    usable.attrs = {"malformed": len(problems), "no_answer": len(table) - len(answered),
                    "trained_heads": left_out, "cleaned": told,
                    "problems": [str(problem) for problem in problems[:LISTED]]}  # fmt: skip
    return usable


def cleaned(
    table: pd.DataFrame, source: SourceConfig, where: str | Path
) -> tuple[pd.DataFrame, dict[str, int]]:
    """A set without the marks of `source.clean` and the rows that then say nothing; and counts.

    Rows whose answers are then empty go, and those of a template (`source.template_field`) that has
    the same answer throughout. Counts: rows that held each mark before and after, and rows gone.
    """
    texts, told = table, {}
    for name in source.clean:
        (mark, place), words = MARKS[name], name.replace("_", " ")
        clean = [[{**m, "content": mark.sub(place, m["content"])} for m in messages]
                 for messages in texts["messages"]]  # fmt: skip
        for when, talks in (("before", texts["messages"]), ("after", clean)):
            told[f"{words} {when}"] = sum(any(mark.search(m["content"]) for m in messages)
                                          for messages in talks)  # fmt: skip
        texts = texts.assign(messages=clean)
    if source.clean:
        texts = with_row_hash(texts)
        full = texts[[_answered(messages) for messages in texts["messages"]]]
        told["empty when cleaned"] = len(texts) - len(full)
        texts = full
    if source.template_field:
        several = texts[~_one_label(texts, where, source.template_field)]
        told["templates with one label"] = len(texts) - len(several)
        texts = several
    return texts, told


def _one_label(table: pd.DataFrame, where: str | Path, template: str) -> np.ndarray:
    """Whether a row's template has one answer throughout; templates of few rows can't tell."""
    records = iter_rows(where, only=set(table["row"]))
    named = {raw.row: raw.value.get(template) for _, raw, _ in records}
    answers = pd.Series([messages[-1]["content"].strip() for messages in table["messages"]])
    by_template = answers.groupby([named[row] for row in table["row"]])
    labels, rows = (by_template.transform(what).to_numpy() for what in ("nunique", "size"))
    return (labels == 1) & (rows >= ONE_LABEL_OF)


def read_pairs(source: SourceConfig, data: DataConfig, root: Path) -> pd.DataFrame:
    """Pairs of answers to one prompt: columns prompt (messages), chosen, rejected, index from 0.

    Records of any form that has `chosen` and `rejected`; left out are those where either has no
    answer of its own. Raises ProfileError, with the way to get the file, when it is missing.
    """
    rows = []
    for _, raw, found in iter_rows(_place(source, data, root)):
        if not found or not raw.value.get("rejected"):
            continue
        other = conversations({**raw.value, "chosen": raw.value["rejected"]})[0][0]
        (*prompt, chosen), rejected = found[0], other[-1]
        if rejected["content"].strip() not in ("", chosen["content"].strip()):
            rows.append((prompt, chosen["content"].strip(), rejected["content"].strip()))
    return pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"])


def _place(source: SourceConfig, data: DataConfig, root: Path) -> str | Path:
    """A source's file, which must be there, or its name on the hub."""
    if data.kind != "files" and Path(source.where).suffix not in FILES:
        return source.where
    path = root / data.folder / source.where
    if not path.exists():
        hint = source.how_to_get or "Set data.folder to the folder that holds it."
        raise ProfileError(f"{source.name}: there is no file {path}. {hint}")
    return path


def read_exams(data: DataConfig, root: Path) -> tuple[dict[str, pd.DataFrame], list[dict]]:
    """The evaluation sets of a profile of files or hub names (`StudyData.exams`), and their facts.

    No prompt stands in two of them: a record that asks what an earlier one asks (`asks_the_same`)
    is left out, and counted. Of `eval_more`, prompts that are alike go to one set as a group.
    """
    facts, known = [], []

    def read(source: SourceConfig, role: str) -> pd.DataFrame:
        drawn = table = read_source(source, data, root)
        if role != "prompts" and 0 < data.eval_prompts < len(table):
            drawn = table.sample(data.eval_prompts, random_state=data.seed).sort_index()
        apart = drawn[~asks_the_same(drawn, pd.concat(known))] if known else drawn
        known.append(apart)
        facts.append({"source": source.name, "role": role, "read": len(table), "rows": len(apart),
                      **_left_out(table),
                      "near copies of evaluation rows": len(drawn) - len(apart)})  # fmt: skip
        return apart.reset_index(drop=True)

    exams = {"eval_1": read(data.eval_1, "eval_1"), "eval_2": read(data.eval_2, "eval_2")}
    if data.eval_more:
        rest = pd.concat([read(source, "prompts") for source in data.eval_more], ignore_index=True)
        wanted = {"eval_2": data.eval_2_more, "regime": data.regime_prompts}
        for name, rows in _apart(rest, wanted, data.seed).items():
            parts = [exams[name], rows] if name in exams else [rows]
            exams[name] = pd.concat(parts, ignore_index=True)
            facts.append({"source": "prompts", "role": name, "rows": len(rows)})
    if data.human:
        exams["human"] = read_source(data.human, data, root)
        facts.append({"source": data.human.name, "role": "human", "rows": len(exams["human"])})
    return exams, facts


def asks_the_same(table: pd.DataFrame, known: pd.DataFrame) -> np.ndarray:
    """Whether each record's prompt shares a run of eight words with a prompt of `known`, or is one.

    A prompt is all that was said before the last answer, without case and punctuation.
    """
    asked, others = ([_asked(messages) for messages in one["messages"]] for one in (table, known))
    near = np.zeros(len(table), bool)
    near[shared_runs(asked, others)["text_left"].unique()] = True
    return near | _is_prompt_of(table, known)


def _is_prompt_of(table: pd.DataFrame, known: pd.DataFrame) -> np.ndarray:
    said = {tuple(fold(_asked(messages))) for messages in known["messages"]}
    return np.array([tuple(fold(_asked(m))) in said for m in table["messages"]], bool)


def _asked(messages: Messages) -> str:
    return "\n".join(m["content"] for m in messages[:-1])


def _apart(rows: pd.DataFrame, wanted: dict[str, int], seed: int) -> dict[str, pd.DataFrame]:
    """`rows` by role, those with like prompts whole to one: `wanted` rows each, the rest "gate"."""
    asked = [_asked(messages) for messages in rows["messages"]]
    group = pd.Series(groups(word_runs(asked), len(asked)))
    sizes = group.value_counts()
    order = np.random.default_rng(seed).permutation(np.sort(group.unique()))
    role, left = pd.Series("gate", index=sizes.index), dict(wanted)
    for one in order:
        name = next((name for name, room in left.items() if sizes[one] <= room), "gate")
        role[one] = name
        if name in left:
            left[name] -= sizes[one]
    named = group.map(role)
    return {name: rows[(named == name).to_numpy()] for name in (*wanted, "gate")
            if (named == name).any()}  # fmt: skip


def read_study_data(data: DataConfig, root: Path) -> StudyData:
    """Sources, pools and evaluation sets of a profile of files or hub names.

    Candidate and pool rows that share a run of eight words with an evaluation row or ask what one
    asks, and pool rows that share a run with a candidate, are left out, and counted (statistics,
    section 8).
    """
    exams, told = read_exams(data, root)
    known = pd.concat(exams.values(), ignore_index=True)
    facts, candidates, pools, rest = [], [], {}, []
    for source in data.sources:
        rows, fact = _usable(source, data, root, known)
        kept, spare = _split(rows, data.rows_per_source, data.seed)
        candidates.append(kept)
        rest.append(spare)
        facts.append({**fact, "role": "candidates", "rows": len(kept)})
    fitted, spare = (pd.concat(parts, ignore_index=True) for parts in (candidates, rest))
    unseen = () if data.pools_of else data.unseen
    for source in unseen:
        rows, fact = _usable(source, data, root, known)
        name = f"{source.name} (unseen source)"
        pools[name] = _pool(rows, fitted, data, facts, fact)
    for name in data.pools_of:
        others = fitted[fitted["source"] != name]
        rows = pd.concat([spare[spare["source"] == name], fitted[fitted["source"] == name]])
        pools[name] = _pool(rows, others, data, facts, {"source": name, "read": len(rows)})
    if len(spare) and not data.pools_of:
        name = "unseen rows of fitted sources"
        pools[name] = _pool(spare, fitted, data, facts, {"source": name, "read": len(spare)})
    table = pd.DataFrame([*facts, *told])
    counts = [column for column in table if column not in ("source", "role")]
    table[counts] = table[counts].fillna(0).astype(int)
    fitted, *others = _own_ids([fitted, *pools.values()])
    return StudyData(fitted, dict(zip(pools, others, strict=True)), exams, table)


def _pool(
    rows: pd.DataFrame, fitted: pd.DataFrame, data: DataConfig, facts: list[dict], fact: dict
) -> pd.DataFrame:
    """`pool_rows` rows without near copies of `fitted`; what was left out is added to `facts`.

    A pool of `pools_of` may hold rows of its own source's candidates, after the others: the rule
    that selects from it was fitted without that source.
    """
    apart = without_copies_of(rows, fitted)
    kept, _ = _split(apart, data.pool_rows, data.seed)
    if data.pools_of:
        kept = apart.iloc[:data.pool_rows]
    facts.append({**fact, "role": "pool", "rows": len(kept),
                  "near copies of candidates": len(rows) - len(apart)})  # fmt: skip
    return kept.reset_index(drop=True)


def _own_ids(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables with ids that name one row: one that several rows bear becomes source/row#part."""
    keys = ["source", "file", "row", "part"]
    rows = pd.concat(tables)[["id", *keys]].drop_duplicates(keys)
    shared = set(rows.loc[rows["id"].duplicated(keep=False), "id"])
    return [
        table.assign(id=[f"{one.source}/{one.row}#{one.part}" if one.id in shared else one.id
                         for one in table.itertuples()])
        for table in tables
    ]  # fmt: skip


def _usable(
    source: SourceConfig, data: DataConfig, root: Path, exam: pd.DataFrame
) -> tuple[pd.DataFrame, dict]:
    """Rows that may be trained on, and how many were left out for which reason."""
    read = read_source(source, data, root)
    short = short_prompts(read, data.max_prompt_words) if data.max_prompt_words else read
    apart = without_copies_of(short, exam)
    clean = apart[~_is_prompt_of(apart, exam)].reset_index(drop=True)
    return clean, {
        "source": source.name, "read": len(read), **_left_out(read),
        "prompt too long": len(read) - len(short),
        "near copies of evaluation rows": len(short) - len(apart),
        "evaluation prompts": len(apart) - len(clean),
    }  # fmt: skip


def _left_out(read: pd.DataFrame) -> dict[str, int]:
    """What `read_source` counted, by the names of the table of facts."""
    told = read.attrs
    return {"malformed": told["malformed"], "no answer": told["no_answer"],
            "trained heads": told["trained_heads"], **told["cleaned"]}  # fmt: skip


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


def short_prompts(table: pd.DataFrame, words: int) -> pd.DataFrame:
    """The records with at most so many words before the last answer, to leave room for it."""
    asked = [sum(len(m["content"].split()) for m in talk[:-1]) for talk in table["messages"]]
    return table[np.array(asked, int) <= words]


def _answered(messages: list[dict]) -> bool:
    return any(is_answer(m) and m["content"].strip() for m in messages)


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


EMBEDDED = "embedded"  # the place of the task that is made from docstrings
LIBRARIES = ("pyarrow", "pydantic", "accelerate", "sentence_transformers", "rich", "docutils")
RIVALS = 3  # wrong docstrings beside the right one
WORDS = 24  # of a docstring at most: a run answers all questions, so they are short
ANSWER_WORDS = 80  # of one answer of a pair at most, and of its prompt
NEAR = 1.25  # length of the longer answer of a pair over that of the shorter, at most


def questions_of(
    source: SourceConfig, data: DataConfig, root: Path, trained: Sequence[Sequence[Mapping]] = ()
) -> list[Question]:
    """The questions of one task of a profile, `take` of them (all when 0), drawn by seed.

    trained : conversations that models may be trained on: what one of them begins with is not asked
    """
    if source.where == EMBEDDED:
        found = docstring_questions(data.seed)
    else:
        found = preference_questions(read_pairs(source, data, root), data.seed)
    known = {_as_question(messages[0]["content"]) for messages in trained}
    found = [one for one in found if one.prompt not in known]
    return found[: source.take or None]


def _as_question(prompt: str) -> str:
    return f"Question: {prompt.strip()}\nAnswer:"


def docstring_questions(seed: int) -> list[Question]:
    """Which docstring belongs to this function? In an order drawn by seed.

    The wrong ones are of the same library's functions with the nearest lengths, so that neither
    the library nor the length tells.
    """
    from .embedded.corpus import SIZES, find_library, read_library

    libraries = [found for name in LIBRARIES if (found := find_library(name))]
    parts = [read_library(one, SIZES["smoke"].read) for one in libraries]
    table = pd.concat(parts, ignore_index=True)
    words = table["response"].str.split().str.len()
    function = table["symbol"].str.rpartition(".")[2].str[0].str.islower()
    kept = table[(table["question"] == "summary") & function & (words <= WORDS)]
    kept = kept.drop_duplicates("response").assign(words=words)
    rng, found = np.random.default_rng(seed), []
    for _, part in kept.sort_values(["words", "id"]).groupby("source"):
        texts = part["response"].tolist()
        for place, prompt in enumerate(part["prompt"]):
            near = sorted((abs(i - place), i) for i in range(len(texts)) if i != place)
            others = [i for _, i in near[: 2 * RIVALS]]
            if len(others) >= RIVALS:
                wrong = [texts[i] for i in rng.permutation(others)[:RIVALS]]
                right = int(rng.integers(RIVALS + 1))
                wrong.insert(right, texts[place])
                found.append(Question(_as_question(prompt), tuple(wrong), right))
    return [found[i] for i in rng.permutation(len(found))]


def preference_questions(pairs: pd.DataFrame, seed: int) -> list[Question]:
    """Which of two answers is preferred? One pair a prompt, in an order drawn by seed.

    pairs : from `study_data.read_pairs`. Kept are those of one turn whose answers are short and of
    nearly the same length, so that length hardly tells.
    """
    rng, found = np.random.default_rng(seed), {}
    for i in rng.permutation(len(pairs)):
        prompt, *answers = pairs.loc[i, ["prompt", "chosen", "rejected"]]
        asked = prompt[0]["content"].strip()
        better, worse = (" ".join(text.split()) for text in answers)
        longest = max(len(text.split()) for text in (asked, better, worse))
        sizes = sorted((len(better), len(worse)))
        if (len(prompt) > 1 or longest > ANSWER_WORDS or better == worse
                or sizes[1] > NEAR * sizes[0]):  # fmt: skip
            continue
        right = int(rng.integers(2))
        texts = (worse, better) if right else (better, worse)
        found.setdefault(asked, Question(_as_question(asked), texts, right))
    return list(found.values())
