"""Rows out, in the columns they came in: JSON, JSONL, CSV, TSV or Parquet by suffix, also gzipped.

A text may hold what a format cannot (a lone surrogate in Parquet): it is then spelt out as
`\\ud800`, and the number of such texts is returned. JSON keeps everything.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import orjson

WRITABLE = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class RowFileError(ValueError):
    """A file name whose suffix names no format that can be written."""


def output_format(path: str | Path) -> str:
    """The suffix that decides the format, ".gz" left out. Raises RowFileError."""
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    if suffix not in WRITABLE:
        raise RowFileError(
            f"{path}: the suffix names the format; it is one of {', '.join(WRITABLE)}, "
            "each also with .gz"
        )
    return suffix


def write_rows(rows: Sequence[dict], path: str | Path) -> int:
    """Write records to `path`, whole or not at all.

    rows : records with their own fields. In CSV and Parquet the columns are all fields in the
        order in which they first occur; a field that a record lacks is empty there. Lists and
        objects go into CSV as JSON.
    Returns the number of texts that had to be spelt out. Raises RowFileError.
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
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
