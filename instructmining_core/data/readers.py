"""One stream of raw records from JSON, JSONL, CSV, Parquet, standard input or a set of the hub.

The content decides, the suffix only helps: people name JSON lines `.json` and pipe without a name.
JSONL, CSV and Parquet stream; a JSON array is read whole. A hub set is named with its commit.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from ..config import InstructMiningError
from .formats import FormatError, show

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
HUB_NAME = re.compile(
    r"^(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>[\w.]+))?$"
)
BOM = b"\xef\xbb\xbf"
MAX_FIELD = 2**31 - 1  # characters in one CSV field; Python's own limit of 131,072 is too small


class Raw(NamedTuple):
    """One record as it stands in the file.

    row : int, its position, 0-based. line : int, 1-based line (JSONL, CSV) or record (otherwise).
    unit : "line" or "record". value : the decoded record, or None where `error` is set.
    """

    row: int
    line: int
    unit: str
    value: object
    error: FormatError | None = None


def is_hub_name(where: str | Path) -> bool:
    """Whether `where` is "owner/name[/config][@revision][:split]" rather than a file."""
    text = str(where)
    path = text.rsplit(":", 1)[0].lower()
    if Path(text).exists() or path.endswith(SUFFIXES) or text.startswith((".", "/", "~")):
        return False
    return HUB_NAME.match(text) is not None


def read_raw(where: str | Path, stdin: BinaryIO | None = None) -> Iterator[Raw]:
    """Every record of a file ("-": standard input) in order, malformed ones with their error.

    Raises InstructMiningError where the file as a whole cannot be read: absent, not gzip, a broken
    JSON array, not Parquet. Nothing is yielded for blank lines.
    """
    name = str(where)
    try:
        with _opened(name, stdin) as stream:
            yield from _records(name, stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InstructMiningError(
            f"{name}: expected a whole gzip file, got one that breaks: {error}"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise InstructMiningError(f"{name}: expected a readable file: {why}") from None


def count_records(where: str | Path) -> int | None:
    """How many records a file holds, read as fast as its format allows; None for standard input
    and hub names. For progress and estimates: a CSV or JSON file is read once for it.
    """
    name = str(where)
    if name == "-" or is_hub_name(name):
        return None
    if name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        with _opened(name, None) as stream:
            return sum(1 for line in stream if line.strip())
    if name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_metadata(name).num_rows
    return sum(1 for _ in read_raw(name))


def _opened(name: str, stdin: BinaryIO | None) -> BinaryIO:
    if name == "-":
        stream = io.BufferedReader(stdin or sys.stdin.buffer)
    else:
        if Path(name).is_dir():
            raise InstructMiningError(
                f"{name}: expected a file, got a folder; name the files in it"
            )
        stream = open(name, "rb")
    if stream.peek(2)[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 20)
    return stream


def _records(name: str, stream: BinaryIO) -> Iterator[Raw]:
    plain = name.lower().removesuffix(".gz")
    head = stream.peek(4096).removeprefix(BOM).lstrip()
    if stream.peek(4)[:4] == b"PAR1" or plain.endswith(".parquet"):
        return _parquet(name, stream)
    if plain.endswith((".csv", ".tsv")):
        return _csv(name, stream, "\t" if plain.endswith(".tsv") else ",")
    if head[:1] == b"[":
        return _array(name, stream.read())
    if head[:1] == b"{" or plain.endswith((".json", ".jsonl", ".ndjson")):
        return _objects(name, stream, lines_only=plain.endswith((".jsonl", ".ndjson")))
    if not head:
        return iter(())
    return _csv(name, stream, ",")


def loads(text: bytes) -> object:
    """JSON from UTF-8 bytes. orjson first; the slower reader takes what orjson refuses (lone
    surrogates, NaN, huge integers). Raises FormatError."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise FormatError("UTF-8 text", text[error.start :][:20]) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"JSON ({error})", text[:200].decode("utf-8", "replace")) from None


def _lines(stream: BinaryIO, first: int = 1) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, first):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield number, line


def _objects(name: str, stream: BinaryIO, lines_only: bool) -> Iterator[Raw]:
    """JSON lines; or, where the first line is no value by itself, one object over many lines."""
    if not lines_only:
        first = stream.readline()
        try:
            loads(first.removeprefix(BOM).strip() or b"{}")
            lines = _lines(stream, 2)
            yield from _json_lines(_chain(first, lines))
            return
        except FormatError:
            text = first + stream.read()
        try:
            whole = loads(text.removeprefix(BOM))
        except FormatError:
            stream = io.BytesIO(text)
        else:
            inner = whole.get("data") if isinstance(whole, dict) else None
            yield from _elements(inner if isinstance(inner, list) else [whole])
            return
    yield from _json_lines(_lines(stream))


def _chain(first: bytes, rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield from _lines(io.BytesIO(first))
    yield from rest


def _json_lines(lines: Iterator[tuple[int, bytes]]) -> Iterator[Raw]:
    for row, (number, line) in enumerate(lines):
        try:
            yield Raw(row, number, "line", loads(line))
        except FormatError as error:
            yield Raw(row, number, "line", None, error)


def _elements(values: list) -> Iterator[Raw]:
    for row, value in enumerate(values):
        yield Raw(row, row + 1, "record", value)


def _array(name: str, text: bytes) -> Iterator[Raw]:
    try:
        values = loads(text.removeprefix(BOM))
    except FormatError as error:
        raise InstructMiningError(
            f"{name}: expected one whole JSON array, got {error.got}: {error.expected}. "
            "An array that breaks cannot be read in part; mend it, or save it as JSON lines"
        ) from None
    return _elements(values)


def _csv(name: str, stream: BinaryIO, delimiter: str) -> Iterator[Raw]:
    csv.field_size_limit(MAX_FIELD)
    source = _CsvLines(stream)
    reader = csv.reader(source, delimiter=delimiter)
    header = _csv_cells(reader, source)
    if isinstance(header, FormatError):
        raise InstructMiningError(f"{name}, line 1: expected {header.expected}, got {header.got}")
    row, start = 0, reader.line_num + 1
    while (cells := _csv_cells(reader, source)) is not None:
        line, start = start, reader.line_num + 1
        if not cells:
            continue
        error = cells if isinstance(cells, FormatError) else None
        if error is None and any(number >= line for number in source.bad):
            error = FormatError("UTF-8 text", ",".join(cells))
        elif error is None and len(cells) != len(header):
            error = FormatError(f"{len(header)} columns, as in the header", cells)
        value = None if error else dict(zip(header, cells, strict=True))
        yield Raw(row, line, "line", value, error)
        source.bad.clear()
        row += 1


class _CsvLines:
    """Lines of a CSV file as text. last : the latest; bad : numbers of those that were not UTF-8"""

    def __init__(self, stream: BinaryIO) -> None:
        self.lines, self.last, self.bad = enumerate(stream, 1), "", []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self.lines)
        line = line.removeprefix(BOM) if number == 1 else line
        try:
            self.last = line.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.bad.append(number)
            self.last = line.decode("utf-8", "replace")
        return self.last


def _csv_cells(reader, source: _CsvLines) -> list[str] | FormatError | None:
    """The next record's cells; None at the end; what is wrong where the reader refuses a line.

    It then starts anew at the next line: a stray carriage return costs its own record only.
    """
    try:
        return next(reader, None)
    except csv.Error as error:
        return FormatError(f"CSV ({str(error).partition(' - ')[0]})", source.last[:200])


def _parquet(name: str, stream: BinaryIO) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    seekable = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)
    source = stream if seekable and stream.seekable() else pa.BufferReader(stream.read())
    row = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                yield Raw(row, row + 1, "record", value)
                row += 1
    except pa.ArrowInvalid as error:
        raise InstructMiningError(f"{name}: expected Parquet, got {show(str(error))}") from None


def resolve_set(where: str, revision: str = "main") -> str:
    """`where` with its commit and split filled in: "owner/name[/config]@<commit>:<split>".

    where : "owner/name[/config][@revision][:split]"; the split is "train" unless named.
    revision : branch, tag or commit to resolve where `where` names none.
    Raises InstructMiningError without network, and for a set that is gated or does not exist.
    """
    from huggingface_hub import HfApi

    named = HUB_NAME.match(where).groupdict()
    wanted = named["revision"] or revision
    try:
        commit = HfApi().dataset_info(named["name"], revision=wanted).sha
    except Exception as error:
        raise InstructMiningError(
            f"{where}: expected a file here or a data set of the hub at {wanted!r}; the hub says: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. If it is "
            "gated, accept its terms on its page and run `hf auth login`"
        ) from error
    config = f"/{named['config']}" if named["config"] else ""
    return f"{named['name']}{config}@{commit}:{named['split'] or 'train'}"


def read_set(resolved: str) -> Iterator[Raw]:
    """Every record of a set in its published order, streamed.

    resolved : what `resolve_set` returned. Raises InstructMiningError.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise InstructMiningError(
            f"{resolved}: hub names need the `datasets` package: pip install 'instructmining[hub]'"
        ) from None
    named = HUB_NAME.match(resolved).groupdict()
    try:
        rows = load_dataset(
            named["name"],
            named["config"],
            split=named["split"],
            revision=named["revision"],
            streaming=True,
        )
        for row, value in enumerate(rows):
            yield Raw(row, row + 1, "record", value)
    except (ValueError, OSError, RuntimeError) as error:
        raise InstructMiningError(
            f"{resolved}: the hub's data set cannot be read: {error}"
        ) from error
