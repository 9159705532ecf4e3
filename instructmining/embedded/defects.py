"""Planted defects: answers made worse in a known way, each beside its clean twin; and the embedded
study's data, which hold them.

Every kind is applied inside every source, so no kind is a source (statistical plan, section 8).
Donors of words and answers come from the same table and source: nothing crosses a split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.data.records import with_row_hash

from ..profile import DataConfig
from ..study_data import StudyData
from .corpus import CANDIDATES, UNSEEN, Corpus, build_corpus, messages

SEEN_KINDS = ("other_answer", "scrambled", "cut_short")  # the stand-in models learn from these
UNSEEN_KINDS = ("repetitive", "fluent_wrong", "wrong_identifier")
KINDS = SEEN_KINDS + UNSEEN_KINDS
LEAST_DONORS = 5  # functions; fewer that were asked the same way lend to nobody

_OPPOSITES = (
    "first last|minimum maximum|min max|lower upper|left right|row column|rows columns|true false|"
    "input output|before after|add remove|start end|read write|smallest largest|small large|"
    "ascending descending|create delete|positive negative|inclusive exclusive|more fewer|"
    "increase decrease|always never|all none|with without|same different|open close|local remote|"
    "horizontal vertical|encode decode|parent child|begin finish|enable disable|forward backward|"
    "mean median|sum product|real imaginary|and or|if unless|above below|next previous|"
    "required optional|new old|single multiple|width height|keys values|string number|"
    "returns accepts|return accept|contains lacks|given unknown|must cannot|should cannot|"
    "can cannot|number name|list mapping|array scalar|default last|used ignored|use ignore|"
    "is isn't|are aren't|will won't|not always|any no|set unset|class module|function class|"
    "file socket|name size|value index|object number|data time|type length"
).split("|")
_SWAP = {
    word: other for pair in reversed(_OPPOSITES)
    for word, other in (tuple(pair.split()), tuple(reversed(pair.split())))
}
_WORD_OR_NUMBER = re.compile(r"(?<![\w.`])(?:[A-Za-z']+|\d+(?:\.\d+)?)(?![\w`])")
_IDENTIFIER = re.compile(r"`[^`]+`|\b[A-Za-z]\w*(?:_\w+|\.\w+)+(?:\(\))?|\b[a-z]+[A-Z]\w*")


class Donors:
    """Answers and names of the functions of one source (asked one kind of question)."""

    def __init__(self, symbols: Sequence[str], answers: Sequence[str], names: Sequence[str]):
        self.symbols, self.answers, self.names = list(symbols), list(answers), list(names)

    def answer(self, symbol: str, rng: np.random.Generator) -> tuple[str, str]:
        """(symbol, answer) of a random other function."""
        while True:
            index = rng.integers(len(self.symbols))
            if self.symbols[index] != symbol:
                return self.symbols[index], self.answers[index]

    def name(self, rng: np.random.Generator) -> str:
        """A random name of a function or an argument that stands in the source."""
        return self.names[rng.integers(len(self.names))]


Defect = Callable[[str, str, Donors, np.random.Generator], str]


def other_answer(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """The answer that belongs to another function of the same library, asked the same way."""
    return donors.answer(symbol, rng)[1]


def scrambled(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """The same words in a random order."""
    words = response.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def cut_short(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """The first 25-50 % of the words, at least two, without a stop."""
    words = response.split()
    keep = max(2, int(len(words) * rng.uniform(0.25, 0.5)))
    return " ".join(words[:keep]).rstrip(".,;:!?")


def repetitive(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """A run of 3-6 of its words said 3-5 times, then the answer goes on as it was."""
    words = response.split()
    length = int(rng.integers(3, min(6, len(words) - 1) + 1))
    start = int(rng.integers(0, len(words) - length + 1))
    times = int(rng.integers(3, 6))
    run = words[start : start + length]
    return " ".join(words[:start] + run * times + words[start + length :])


def fluent_wrong(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """A grammatical answer that says something false.

    Opposites are exchanged (first/last, rows/columns, is/isn't) and numbers changed, at most
    four of them. A response that holds none of these words gets another function's answer with
    this function's name put in.
    """
    found = [m for m in _WORD_OR_NUMBER.finditer(response) if _false(m[0]) is not None]
    if not found:
        donor_symbol, answer = donors.answer(symbol, rng)
        name = symbol.rsplit(".", 1)[-1]
        return f"`{name}`: {answer}".replace(donor_symbol.rsplit(".", 1)[-1], name)
    chosen = sorted(rng.permutation(len(found))[:4], reverse=True)
    for index in chosen:
        match = found[index]
        response = response[: match.start()] + _false(match[0]) + response[match.end() :]
    return response


def wrong_identifier(response: str, symbol: str, donors: Donors, rng: np.random.Generator) -> str:
    """Names of functions and arguments replaced by names from other answers.

    A response without a name is said to be about another function.
    """

    def another(match: re.Match) -> str:
        name = donors.name(rng)
        return f"`{name}`" if match[0].startswith("`") else name

    if _IDENTIFIER.search(response):
        return _IDENTIFIER.sub(another, response)
    return f"`{donors.answer(symbol, rng)[0]}`: {response}"


def _false(word: str) -> str | None:
    """The opposite of a word, another number for a number, None where there is none."""
    if word[0].isdigit():
        return str(int(float(word)) + 3)
    other = _SWAP.get(word.lower())
    if other is None:
        return None
    return other.capitalize() if word[0].isupper() else other


_MAKERS: dict[str, Defect] = {one.__name__: one for one in (
    other_answer, scrambled, cut_short, repetitive, fluent_wrong, wrong_identifier)}  # fmt: skip


def twins(
    table: pd.DataFrame, kind: str, seed: int, donors_from: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A defective twin of every row, in the table's order.

    table : clean rows with columns id, source, symbol, question, prompt, response
    kind : one of KINDS
    donors_from : rows that lend answers and names; the table itself by default
    returns : same rows and columns, `response` and `messages` defective, `id` = "<id>#<kind>",
        `kind` the kind, `twin` the clean row's id. The same row, kind and seed with the same donors
        give the same text. A row that five draws left unchanged is left out.
    """
    if kind not in _MAKERS:
        raise InstructMiningError(f"Defect {kind!r} is unknown; known: {', '.join(KINDS)}.")
    donors = _Lenders(table if donors_from is None else donors_from)
    texts = [
        _make(kind, row.id, row.response, row.symbol, donors.of(row), seed)
        for row in table.itertuples(index=False)
    ]
    made = table.assign(response=texts, kind=kind, twin=table["id"], id=table["id"] + f"#{kind}")
    made = made[made["response"] != table["response"]]
    return with_row_hash(made.assign(messages=messages(made["prompt"], made["response"])))


def plant(table: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The clean rows and, beside some of them, their defective twins.

    share : defective rows among all rows of the result, the same in every source, 0 to 0.5; every
        kind in equal numbers inside every source
    returns : clean rows in their order, then the defective ones; columns `kind` ("" for a clean
        row) and `twin` (the clean row's id, "" for a clean row). A row has at most one twin.
    """
    if not 0 <= share <= 0.5:
        raise InstructMiningError(f"share is {share}; with a twin beside its row it is 0 to 0.5.")
    clean = table.assign(kind="", twin="")
    made = []
    for source, rows in clean.groupby("source", sort=True) if share else ():
        wanted = round(share / (1 - share) * len(rows))
        order = np.random.default_rng([seed, _number(source)]).permutation(len(rows))[:wanted]
        for position, kind in enumerate(KINDS):
            chosen = rows.iloc[np.sort(order[position :: len(KINDS)])]
            made.append(twins(chosen, kind, seed, donors_from=rows))
    return pd.concat([clean, *made], ignore_index=True)


class _Lenders:
    """Donors by source and kind of question; by source alone where that gives too few."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.by_source: dict[str, Donors] = {}
        self.by_question: dict[tuple[str, str], Donors] = {}
        for source, rows in table.groupby("source"):
            names = [n.strip("`") for r in rows["response"] for n in _IDENTIFIER.findall(r)]
            names += rows["symbol"].tolist()
            self.by_source[source] = Donors(rows["symbol"], rows["response"], names)
            for question, part in rows.groupby("question"):
                if part["symbol"].nunique() >= LEAST_DONORS:
                    donors = Donors(part["symbol"], part["response"], names)
                    self.by_question[source, question] = donors

    def of(self, row) -> Donors:
        everyone = self.by_source[row.source]
        if all(symbol == row.symbol for symbol in everyone.symbols):
            raise InstructMiningError(f"Source {row.source!r} has one function only: no donors.")
        return self.by_question.get((row.source, row.question), everyone)


def _make(kind: str, row_id: str, response: str, symbol: str, donors: Donors, seed: int) -> str:
    rng = np.random.default_rng([seed, _number(f"{row_id}#{kind}")])
    for _ in range(5):
        text = _MAKERS[kind](response, symbol, donors, rng)
        if text != response:
            break
    return text


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


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
    fitted = fitted[: data.libraries or None]
    unseen = [name for name in UNSEEN if name in set(table["source"])]
    parts = [_some(candidates[candidates["source"] == name], data.rows_per_source, data.seed)
             for name in fitted]  # fmt: skip
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
    asked = [("unseen sources", unseen, share) for share in data.defect_pools]
    asked.append(("unseen rows of fitted sources", fitted, FITTED_POOL_DEFECTS))
    return {f"{name}, {100 * share:.0f} % defects":
            _pool(rows[rows["source"].isin(sources)], share, data)
            for name, sources, share in asked}  # fmt: skip


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
    each = max(prompts // len(sources), 1) if prompts else len(rows)
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
