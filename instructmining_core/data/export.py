"""From a score table back to the records that were scored, and chosen records out to a file.

The records are read from the very files, checked by hash. They go out in the columns they came in:
JSON, JSONL, CSV, TSV or Parquet by suffix, also gzipped. A text may hold what a format cannot (a
lone surrogate in Parquet): it is then spelt out as `\\ud800`, and the number of such texts is
returned. JSON keeps everything.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path

import orjson
import pandas as pd

from ..config import InstructMiningError
from ..files import file_sha256, write_atomic
from .formats import Messages
from .readers import is_hub_name
from .records import iter_rows, row_hash

WRITABLE = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def output_format(path: str | Path) -> str:
    """The suffix that decides the format, ".gz" left out. Raises InstructMiningError."""
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    if suffix not in WRITABLE:
        raise InstructMiningError(
            f"{path}: the suffix names the format; it is one of {', '.join(WRITABLE)}, "
            "each also with .gz"
        )
    return suffix


def write_rows(rows: Sequence[dict], path: str | Path) -> int:
    """Write records to `path`, whole or not at all.

    rows : records with their own fields. In CSV and Parquet the columns are all fields in the
        order in which they first occur; a field that a record lacks is empty there. Lists and
        objects go into CSV as JSON.
    Returns the number of texts that had to be spelt out. Raises InstructMiningError.
    """
    suffix = output_format(path)
    if suffix in (".csv", ".tsv"):
        content, changed = _csv(rows, "," if suffix == ".csv" else "\t"), 0
    elif suffix == ".parquet":
        content, changed = _parquet(rows)
    else:
        content, changed = _json(rows, array=suffix == ".json"), 0
    if str(path).lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time stamp: same rows, same bytes
    write_atomic(path, content)
    return changed


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value, default=str)
    except TypeError:
        # Lone surrogates and integers above 64 bits; ASCII escapes carry both.
        return json.dumps(value, ensure_ascii=True, default=str).encode()


def _json(rows: Sequence[dict], array: bool) -> bytes:
    lines = [_dumps(row) for row in rows]
    if not array:
        return b"".join(line + b"\n" for line in lines)
    return b"[\n" + b",\n".join(lines) + b"\n]\n"


def _columns(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv(rows: Sequence[dict], delimiter: str) -> bytes:
    def cell(value: object) -> object:
        return _dumps(value).decode() if isinstance(value, list | dict) else value

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(rows), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: Sequence[dict]) -> tuple[bytes, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, changed = {}, 0
    for name in _columns(rows):
        cleaned = [_spelt_out(row.get(name)) for row in rows]
        changed += sum(count for _, count in cleaned)
        values = [value for value, _ in cleaned]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            # One field, several types: JSON text holds them all.
            columns[name] = pa.array([None if v is None else _dumps(v).decode() for v in values])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue(), changed


def _spelt_out(value: object) -> tuple[object, int]:
    """The value with its lone surrogates spelt out, and how many texts had any."""
    if isinstance(value, str):
        spelt = value.encode("utf-8", "backslashreplace").decode()
        return spelt, int(spelt != value)
    if isinstance(value, list):
        parts = [_spelt_out(part) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        parts = {key: _spelt_out(part) for key, part in value.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(c for _, c in parts.values())
    return value, 0


Key = tuple[str, int, int]  # file as it was named, row, part


class SourceRows:
    """The records behind a score table.

    scores : with file, file_sha256 and row (part); `.attrs["read"]["paths"]` says how OASST trees
        were read
    beside : folder that relative names are also looked for in (the score table's)
    moved : files that may be scored ones under a new name; matched by sha256

    Raises InstructMiningError at once where a file is absent or has changed.
    """

    def __init__(
        self, scores: pd.DataFrame, *, beside: Path | None = None, moved: Sequence[str | Path] = ()
    ) -> None:
        self.paths = scores.attrs.get("read", {}).get("paths", "best")
        self.files: dict[str, str] = {}
        self.records: dict[Key, dict] = {}
        others = {file_sha256(path): str(path) for path in moved}
        named = scores[["file", "file_sha256"]].drop_duplicates()
        self.sha256 = dict(zip(named["file"], named["file_sha256"], strict=True))
        for name, sha256 in self.sha256.items():
            self.files[name] = _located(name, sha256, beside, others)

    def fetch(self, rows: pd.DataFrame) -> list[Messages]:
        """The conversations of rows of the score table, in their order.

        The records themselves are kept in `records`, by (file, row, part). Each file is read once
        a call, as far as its last row asked for. Raises InstructMiningError where a row says
        something else than when it was scored.
        """
        keys = keys_of(rows)
        found: dict[Key, Messages] = {}
        for name, path in self.files.items():
            wanted = {row for file, row, _ in keys if file == name}
            if wanted:
                self._read(name, path, wanted, found)
        hashes = rows["row_hash"] if "row_hash" in rows else [""] * len(rows)
        for key, own in zip(keys, hashes, strict=True):
            if key not in found or (own and row_hash(found[key]) != own):
                raise InstructMiningError(
                    f"{key[0]}, row {key[1]}: not the record that was scored; score "
                    "the file again with this version"
                )
        return [found[key] for key in keys]

    def record(self, key: Key) -> dict:
        """A fetched record in its own fields; of several conversations in it, only this one."""
        return self.records[key]

    def _read(self, name: str, path: str, wanted: set[int], found: dict[Key, Messages]) -> None:
        last = max(wanted)
        for _, raw, conversations in iter_rows(path, paths=self.paths, only=wanted):
            for part, messages in enumerate(conversations):
                key = (name, raw.row, part)
                found[key] = messages
                self.records[key] = _one_part(raw.value, part, messages, len(conversations))
            if raw.row == last:
                return


def keys_of(rows: pd.DataFrame) -> list[Key]:
    """(file, row, part) of each row of a score or record table."""
    parts = rows["part"] if "part" in rows else [0] * len(rows)
    keys = zip(rows["file"], rows["row"], parts, strict=True)
    return [(str(file), int(row), int(part)) for file, row, part in keys]


def _one_part(raw: dict, part: int, messages: Messages, parts: int) -> dict:
    if parts == 1:
        return raw
    if isinstance(raw.get("instances"), list):
        return {**raw, "instances": [raw["instances"][part]]}
    return {**raw, "messages": messages}  # which path of the tree; read back before the tree


def _located(name: str, sha256: str, beside: Path | None, others: dict[str, str]) -> str:
    if sha256 and sha256 in others:
        return others[sha256]
    if not sha256 and is_hub_name(name):
        return name
    places = [Path(name), *([beside / name, beside / Path(name).name] if beside else [])]
    there = [place for place in places if place.is_file()] if name != "-" else []
    for place in there:
        if file_sha256(place) == sha256:
            return str(place)
    offered = f"; none of {', '.join(others.values())} is it" if others else ""
    if there:
        raise InstructMiningError(
            f"{there[0]} has changed since it was scored: its sha256 was {sha256}, now it is "
            f"{file_sha256(there[0])}{offered}. Score it again, or name the old file with --data"
        )
    what = "standard input" if name == "-" else name
    raise InstructMiningError(
        f"{what} was scored and is needed again, but is not there{offered}. Name the file with "
        f"--data; its sha256 is {sha256}"
    )
