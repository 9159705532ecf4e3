"""From a score table back to the records that were scored, and chosen records out to a file.

The records are read from the very files, checked by hash. They go out in the columns they came in:
JSON, JSONL, CSV, TSV or Parquet by suffix, also gzipped. A text may hold what a format cannot (a
lone surrogate in Parquet, bytes in JSON): it is then spelt out (`\\ud800`, base64), and the number
of such texts is returned. Rows of a Parquet file go to Parquet with their types and metadata.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..config import InstructMiningError
from ..files import file_sha256, write_atomic
from .fields import Messages, bytes_text, json_bytes
from .readers import is_hub_name
from .records import iter_rows, row_hash

if TYPE_CHECKING:
    import pyarrow as pa

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


def write_rows(
    rows: Sequence[dict], path: str | Path, *, table: pa.Table | None = None,
    hashes: Sequence[str] = (), columns: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """Write records to `path`, whole or not at all.

    rows : records with their own fields. In CSV and Parquet the columns are all fields in the
        order in which they first occur; a field that a record lacks is empty there. Lists and
        objects go into CSV as JSON, as do those that Parquet has no one type for.
    table : the same rows as the Parquet file they come from has them: taken for Parquet, with
        their types and the file's metadata
    hashes : row_hash of each row; what was written is read back, and must say the same, read by
        `columns` as in `formats.conversations`
    Returns the number of texts that had to be spelt out. Raises InstructMiningError.
    """
    suffix, changed = output_format(path), []
    if suffix == ".parquet" and table is not None:
        content = _parquet_bytes(table)
    else:
        rows = _spelt_out(list(rows), suffix == ".parquet", changed)
        if suffix in (".csv", ".tsv"):
            content = _csv(rows, "," if suffix == ".csv" else "\t")
        elif suffix == ".parquet":
            content = _parquet(rows)
        else:
            content = _json(rows, array=suffix == ".json")
    if str(path).lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time stamp: same rows, same bytes
    if any(hashes):
        _read_back(content, path, hashes, columns, spelt_out=len(changed))
    write_atomic(path, content)
    return len(changed)


def _read_back(content: bytes, path: str | Path, hashes: Sequence[str],
               columns: Mapping[str, str] | None, spelt_out: int) -> None:  # fmt: skip
    found = [
        (row_hash(talks[0]) if talks else "", raw)
        for _, raw, talks in iter_rows(path, stdin=io.BytesIO(content), columns=columns)
    ]
    wrong = [i for i, (own, _) in enumerate(found) if own != hashes[i]] if len(found) == len(
        hashes) else [0]  # fmt: skip
    if len(wrong) > spelt_out:
        raise InstructMiningError(
            f"{path}: this format cannot hold these rows: {len(wrong)} of {len(hashes)} would be "
            f"read back as others, the first is row {wrong[0] + 1}; write .jsonl instead"
        )


def _json(rows: Sequence[dict], array: bool) -> bytes:
    lines = [json_bytes(row) for row in rows]
    if not array:
        return b"".join(line + b"\n" for line in lines)
    return b"[\n" + b",\n".join(lines) + b"\n]\n"


def _columns(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv(rows: Sequence[dict], delimiter: str) -> bytes:
    """Every text in quotes: Python before 3.11.9 leaves a lone carriage return without."""

    def cell(value: object) -> object:
        return json_bytes(value).decode() if isinstance(value, list | dict | bool) else value

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(rows), delimiter=delimiter, lineterminator="\n",
                            quoting=csv.QUOTE_NONNUMERIC)  # fmt: skip
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: Sequence[dict]) -> bytes:
    import pyarrow as pa

    columns = {}
    for name in _columns(rows):
        values = [row.get(name) for row in rows]
        nested = any(isinstance(value, list | dict) for value in values)
        try:
            column = columns[name] = pa.array(values)
            exact = not nested or _unfilled(column.to_pylist()) == _unfilled(values)
            if exact and nested:
                _parquet_bytes(pa.table({name: column}))  # Parquet has no empty objects
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            exact = False
        if not exact:
            # One field, several types or other keys in each row: JSON text holds them all.
            columns[name] = pa.array([
                v if v is None or isinstance(v, str) else json_bytes(v).decode() for v in values
            ])  # fmt: skip
    return _parquet_bytes(pa.table(columns))


def _unfilled(values: Sequence[object]) -> bytes:
    """A column as bytes to be compared; messages without the null fields that Arrow adds."""
    return json_bytes([
        [{key: one for key, one in entry.items() if one is not None} if isinstance(entry, dict)
         and "content" in entry else entry for entry in value] if isinstance(value, list) else value
        for value in values
    ])  # fmt: skip


def _parquet_bytes(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _spelt_out(value: Any, parquet: bool, changed: list[str]) -> Any:
    """The value with its bytes as text or, for Parquet, its lone surrogates spelt out.

    Texts that had any go to `changed`; bytes that are UTF-8 are text. NaN is null.
    """
    if isinstance(value, list):
        return [_spelt_out(part, parquet, changed) for part in value]
    if isinstance(value, dict):
        return {key: _spelt_out(part, parquet, changed) for key, part in value.items()}
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, str if parquet else bytes):
        spelt = value.encode("utf-8", "backslashreplace").decode() if parquet else bytes_text(value)
        if value not in (spelt, spelt.encode()):
            changed.append(spelt)
        return spelt
    return value


Key = tuple[str, int, int]  # file as it was named, row, part


class SourceRows:
    """The records behind a score table.

    scores : with file, file_sha256 and row (part); `.attrs["read"]` says how OASST trees were
        read, by which columns, and in which encoding
    beside : folder that relative names are also looked for in (the score table's)
    moved : files that may be scored ones under a new name; matched by sha256

    Raises InstructMiningError at once where a file is absent or has changed.
    """

    def __init__(
        self, scores: pd.DataFrame, *, beside: Path | None = None, moved: Sequence[str | Path] = ()
    ) -> None:
        self.read = scores.attrs.get("read", {})
        self.files: dict[str, str] = {}
        self.records: dict[Key, dict] = {}
        self.parted = False  # whether a record was taken apart into its conversations
        others = {file_sha256(path): str(path) for path in moved}
        named = scores[["file", "file_sha256"]].drop_duplicates()
        self.sha256 = dict(zip(named["file"], named["file_sha256"], strict=True))
        for name, sha256 in self.sha256.items():
            self.files[name] = _located(name, sha256, beside, others)

    def fetch(self, rows: pd.DataFrame) -> list[Messages]:
        """The conversations of rows of the score table, in their order.

        Those of the last call are kept in `records` by (file, row, part), in their own fields; of
        several conversations in one, only this one. Each file is read once a call, as far as its
        last row asked for. Raises InstructMiningError where a row says something else than when it
        was scored.
        """
        keys = keys_of(rows)
        found: dict[Key, Messages] = {}
        self.records, self.parted = {}, False
        for name, path in self.files.items():
            wanted = {row for file, row, _ in keys if file == name}
            last = max(wanted, default=-1)
            for _, raw, talks in iter_rows(path, only=wanted, **self.read) if wanted else ():
                for part, messages in enumerate(talks):
                    key = (name, raw.row, part)
                    found[key] = messages
                    self.records[key] = _one_part(raw.value, part, messages, len(talks))
                self.parted |= len(talks) > 1
                if raw.row == last:
                    break
        hashes = rows["row_hash"] if "row_hash" in rows else [""] * len(rows)
        for key, own in zip(keys, hashes, strict=True):
            if key not in found or (own and row_hash(found[key]) != own):
                raise InstructMiningError(
                    f"{key[0]}, row {key[1]}: not the record that was scored; score "
                    "the file again with this version"
                )
        return [found[key] for key in keys]

    def table(self, keys: Sequence[Key], column: str, scores: Sequence[float]) -> pa.Table | None:
        """Fetched rows as their Parquet files have them, with the scores as a last column.

        None where they are not all whole rows of Parquet files of one schema.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        used = {file: self.files[file] for file, _, _ in keys}
        others = [one for one in used.values() if Path(one).suffix.lower() != ".parquet"]
        if self.parted or others:
            return None
        parts, places = [], {}
        for file, path in used.items():
            wanted, start = sorted({row for name, row, _ in keys if name == file}), 0
            for batch in pq.ParquetFile(path).iter_batches():
                own = [row - start for row in wanted if start <= row < start + batch.num_rows]
                for one in own:
                    places[file, start + one, 0] = len(places)
                parts.append(pa.Table.from_batches([batch]).take(own))
                start += batch.num_rows
        if any(not part.schema.equals(parts[0].schema) for part in parts):
            return None
        schema = pq.read_schema(next(iter(used.values())))
        table = pa.concat_tables(parts).take([places[key] for key in keys])
        table = table.append_column(column, pa.array(scores, pa.float64()))
        kept = dict(schema.metadata or {})
        features = json.loads(kept.get(b"huggingface", b"{}"))
        if "features" in features.get("info", {}):
            features["info"]["features"][column] = {"dtype": "float64", "_type": "Value"}
            kept[b"huggingface"] = json.dumps(features).encode()
        return table.replace_schema_metadata(kept)


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
