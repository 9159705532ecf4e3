"""Instruction data in: any published format becomes one table of conversations.

A *record table* is a DataFrame with one row a conversation:

`id` str, the record's own, else "<source>-<row>"; not made unique: rows are known by (file, row,
part); `source` str; `messages` list of {"role": "user" | "assistant" | "system", "content": str};
`file` str as it was named; `row` int, the record's position in that file, 0-based and counting
malformed ones; `part` int, 0 but for records that hold several conversations; `row_hash` str, the
identity of `messages`, "" for a malformed record. It is made here, once; what makes record tables
of other origin adds it by `with_row_hash`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
import pandas as pd

from ..config import InstructMiningError
from .fields import FormatError, Messages, is_answer
from .formats import as_record, conversations, record_id
from .readers import SUFFIXES, Raw, is_hub_name, read_raw, resolve_set

IDENTITY = ("content", "role", "train", "unread")  # what of a message tells rows apart
CHUNK_CHARACTERS = 64_000_000  # a chunk ends here too, so that long texts stay within memory


@dataclass(frozen=True)
class Problem:
    """A malformed record: where it is, what was expected, what stood there."""

    file: str
    line: int  # 1-based
    expected: str
    got: str
    unit: str = "line"  # "line", or "record" where the format has no lines
    row: int = -1  # position in the file, 0-based, as in the table's `row`

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}: expected {self.expected}, got {self.got}"


def row_hash(messages: Messages) -> str:
    """The identity of a conversation: first 32 hex digits of the sha256 of its canonical JSON.

    Roles and contents count, what is no text by its fingerprint `unread`, and whether an answer is
    taken out of training. Lone surrogates are hashed as they are.
    """
    plain = [
        {"content": m["content"], "role": m["role"]} if len(m) == 2 else
        {name: m[name] for name in IDENTITY if name in m}
        for m in messages
    ]  # fmt: skip
    try:
        text = orjson.dumps(plain)
    except TypeError:
        # orjson refuses lone surrogates; the two writers agree on everything else.
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
        text = text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


def with_row_hash(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `row_hash` made anew from `messages`."""
    return table.assign(row_hash=[row_hash(messages) for messages in table["messages"]])


def assistant_turns(messages: Messages) -> list[tuple[list[dict], str]]:
    """(context, response) of each answer to learn; the context is every message before it."""
    return [
        (list(messages[:i]), message["content"])
        for i, message in enumerate(messages)
        if is_answer(message)
    ]


def iter_rows(
    where: str | Path,
    *,
    revision: str = "main",
    paths: str = "best",
    stdin: BinaryIO | None = None,
    only: Container[int] | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> Iterator[tuple[str, Raw, list[Messages]]]:
    """(file, raw record, its conversations) for every record in order, malformed ones included.

    where : a file (JSON, JSONL, CSV, TSV, Parquet, Arrow, each also packed), "-" for standard
        input, or a hub name "owner/name[/config][@revision][:split]".
    only : positions that are wanted; the others are passed over.
    paths, columns : as in `formats.conversations`; stdin, encoding : as in `read_raw`

    A malformed record has no conversations and `raw.error` set. `file` is `where`, or for a hub
    name the name with the commit that was read. Errors are those of `read_raw`.
    """
    if paths not in ("best", "all"):
        raise InstructMiningError(f"paths is {paths!r}; it is 'best' or 'all'")
    name = str(where)
    if stdin is None and is_hub_name(name):
        name = resolve_set(name, revision)
    for raw in read_raw(name, stdin, encoding):
        if only is not None and raw.row not in only:
            continue
        found = []
        if raw.error is None:
            if not isinstance(raw.value, dict):
                raw = raw._replace(value=as_record(raw.value))
            try:
                found, notes = conversations(raw.value, paths, columns)
                if notes:
                    raw = raw._replace(notes=tuple(notes))
            except FormatError as error:
                raw = raw._replace(error=error)
        yield name, raw, found


def iter_records(
    where: str | Path,
    *,
    chunk_rows: int = 10_000,
    source: str | None = None,
    on_error: str = "raise",
    columns: Mapping[str, str] | None = None,
    **options,
) -> Iterator[tuple[pd.DataFrame, list[Problem]]]:
    """The record table in chunks of at most `chunk_rows` rows (fewer where texts are long).

    where, columns, options : as for `iter_rows`
    source : name for the `source` column; the file's stem or the set's name unless given.
    on_error : "raise" stops at a malformed record; "collect" leaves it out of the table and lists
        it; "keep" lists it and keeps an empty row in its place, with the text of the problem in
        an extra column `problem` ("" elsewhere).

    Yields (table, problems of this chunk); the table's `.attrs["notes"]` counts the records that
    hold what was not read, by what it is. Raises InstructMiningError.
    """
    if on_error not in ("raise", "collect", "keep"):
        raise InstructMiningError(f"on_error is {on_error!r}; it is 'raise', 'collect' or 'keep'")
    rows, problems, characters, notes = [], [], 0, Counter()
    stem = source if source is not None else source_name(where)
    for file, raw, found in iter_rows(where, columns=columns, **options):
        note = ""
        if raw.error is not None:
            problem = Problem(file, raw.line, raw.error.expected, raw.error.got, raw.unit, raw.row)
            if on_error == "raise":
                raise InstructMiningError(str(problem))
            problems.append(problem)
            if on_error == "keep":
                note, found = str(problem), [[]]
        if raw.notes:
            notes.update(raw.notes)
        name = record_id(raw.value, f"{stem}-{raw.row}", columns)
        for part, messages in enumerate(found):
            own = f"{name}#{part}" if part else name
            key = "" if note else row_hash(messages)
            rows.append((own, stem, messages, file, raw.row, part, key, note))
            characters += sum(len(message["content"]) for message in messages)
        if len(rows) >= chunk_rows or characters > CHUNK_CHARACTERS:
            yield _table(rows, on_error, notes), problems
            rows, problems, characters, notes = [], [], 0, Counter()
    if rows or problems:
        yield _table(rows, on_error, notes), problems


def read_records(
    where: str | Path, *, source: str | None = None, on_error: str = "raise"
) -> tuple[pd.DataFrame, list[Problem]]:
    """The whole record table of one file or hub set and its problems; see `iter_records`."""
    chunks = list(iter_records(where, source=source, on_error=on_error))
    tables = [table for table, _ in chunks] or [_table([], on_error, {})]
    problems = [problem for _, found in chunks for problem in found]
    return pd.concat(tables, ignore_index=True), problems


def source_name(where: str | Path) -> str:
    """A short name for a file or hub set: "data/alpaca.jsonl.gz" is "alpaca"."""
    text = str(where)
    if text == "-":
        return "stdin"
    if is_hub_name(text):
        return text.split("@")[0].rsplit(":", 1)[0].split("/", 1)[1]
    name = Path(text).name.encode("utf-8", "backslashreplace").decode()
    while Path(name).suffix.lower() in SUFFIXES and Path(name).stem:
        name = Path(name).stem
    return name


def _table(rows: list[tuple], on_error: str, notes: Mapping[str, int]) -> pd.DataFrame:
    columns = ["id", "source", "messages", "file", "row", "part", "row_hash", "problem"]
    table = pd.DataFrame(rows, columns=columns).astype({"row": "int64", "part": "int64"})
    table = table if on_error == "keep" else table.drop(columns="problem")
    if notes:
        table.attrs["notes"] = dict(notes)
    return table
