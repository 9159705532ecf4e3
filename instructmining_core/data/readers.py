"""One stream of raw records from JSON, JSONL, CSV, Parquet, Arrow, standard input or a hub's set.

The content decides, the suffix only helps: people name JSON lines `.json` and pipe without a name.
JSONL, CSV, Parquet and Arrow stream, also out of gzip, zstd, xz, bzip2 and zip; a JSON array is
read whole. A hub set is named with its commit.

The readers of a format yield (line, value): the line is 1-based, or 0 where a value is one of a
document; the value is a record, or a FormatError that says what is wrong with it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson
import zstandard

from ..config import InstructMiningError
from . import fields, formats
from .fields import FormatError, show, structured

PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXT, ".parquet", ".arrow", *PACKED)
HUB_NAME = re.compile(
    r"^(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>[\w.]+))?$"
)
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull`"),
    ((b"<!doctype html", b"<html", b"<head", b"<!--"),
     "a web page (a login or an error?): download the file itself"),
    (b"sqlite format 3", "an SQLite database: export the table as JSONL"),
    ((b"<?xml", b"<error"), "an XML page (an error of a server?): download the file itself"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it, and name the files"),
    (b"rar!", "a RAR archive: unpack it, and name the files"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of an old Excel: save it as CSV in UTF-8"),
    (b"%pdf", "a PDF: export its rows as JSONL"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
     "a Python pickle, which is never opened: save it as JSONL or Parquet"),
)  # fmt: skip
BOM = b"\xef\xbb\xbf"
MAX_FIELD = 2**31 - 1  # characters in one CSV field; Python's own limit of 131,072 is too small
MAX_RECORD = 1 << 25  # bytes of a line, of a CSV record, and of a packed document read whole
PACKING = 20  # what a packed file may unpack to, in times of its size, where it is read whole
# orjson would make a float of an integer with more digits.
MANY_DIGITS, DIGITS = b"0" * 19, bytes.maketrans(b"123456789", b"000000000")
GAP = re.compile(r"[\s,\ufeff]*")  # between values of a file
BROKEN = {  # what Python says of CSV -> what to mend
    "end of data": "a quote that is opened on this line is never closed",
    "expected after": "a quoted cell goes on behind its closing quote: is one never closed, or one "
                      'inside not written ""?',
    "new-line": "a carriage return without quotes around it, or for a line feed",
}  # fmt: skip
Found = Iterator[tuple[int, object]]


class Raw(NamedTuple):
    """One record as it stands in the file.

    row : int, its position, 0-based. line : int, 1-based line (JSONL, CSV) or record (otherwise).
    unit : "line" or "record". value : the decoded record, or None where `error` is set.
    notes : what of it was not read.
    """

    row: int
    line: int
    unit: str
    value: object
    error: FormatError | None = None
    notes: tuple[str, ...] = ()


def is_hub_name(where: str | Path) -> bool:
    """Whether `where` is "owner/name[/config][@revision][:split]" rather than a file."""
    text = str(where)
    path = text.rsplit(":", 1)[0].lower()
    if Path(text).exists() or path.endswith(SUFFIXES) or text.startswith((".", "/", "~")):
        return False
    return HUB_NAME.match(text) is not None


def read_raw(
    where: str | Path, stdin: BinaryIO | None = None, encoding: str | None = None
) -> Iterator[Raw]:
    """Every record of a file ("-": standard input) or a set that `resolve_set` named, in order,
    malformed ones with their error.

    stdin : read in place of the file; `where` then only names it. encoding : of its text, where it
    is not UTF-8, or UTF-16 with its mark. Raises InstructMiningError where the file as a whole
    cannot be read: absent, cut short, a broken JSON array. Nothing is yielded for blank lines.
    """
    name = str(where)
    hub = stdin is None and is_hub_name(name)
    with nullcontext() if hub else _opened(name, stdin) as stream:
        found = _hub_set(name) if hub else _records(name, stream, encoding)
        for row, (line, value) in enumerate(found):
            at = (row, line or row + 1, "line" if line else "record")
            yield Raw(*at, None, value) if isinstance(value, FormatError) else Raw(*at, value)


@contextmanager
def _opened(name: str, stdin: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked as long as they are packed; what fails is told in words."""
    try:
        with _unpacked(name, stdin) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
            zstandard.ZstdError) as error:  # fmt: skip
        raise InstructMiningError(
            f"{name}: expected a whole gzip file or other packed file, got one that breaks: "
            f"{error}; fetch it again"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise InstructMiningError(f"{name}: expected a readable file: {why}") from None


def count_records(where: str | Path, encoding: str | None = None) -> int | None:
    """How many records a file holds, read as fast as its format allows; None for standard input
    and hub names. For progress and estimates: a CSV or JSON file is read once for it.
    """
    name = str(where)
    if name == "-" or is_hub_name(name):
        return None
    if _plain_name(name).endswith((".jsonl", ".ndjson")):
        with _opened(name) as stream:
            return sum(1 for _ in text_lines(stream))
    if name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        with _opened(name) as stream, suppress(ValueError):
            return pq.read_metadata(stream).num_rows
    return sum(1 for _ in read_raw(name, encoding=encoding))


def _plain_name(name: str) -> str:
    name = name.lower()
    while name.endswith(PACKED):
        name = name.rpartition(".")[0]
    return name


def _unpacked(name: str, stdin: BinaryIO | None) -> BinaryIO:
    if name == "-" or stdin is not None:
        stream = io.BufferedReader(stdin or sys.stdin.buffer)
    else:
        if Path(name).is_dir():
            inside = [str(one) for kind in ("*.arrow", "*.parquet", "*.jsonl", "*/*.arrow")
                      for one in sorted(Path(name).glob(kind))]  # fmt: skip
            files = f": {', '.join(inside[:3])}" if inside else ""
            raise InstructMiningError(
                f"{name}: expected a file, got a folder; name the files in it{files}"
            )
        stream = open(name, "rb")
    for _ in range(4):
        head = stream.peek(8)[:8]
        unpack = next((one for magic, one in _UNPACK.items() if head.startswith(magic)), None)
        if unpack is None:
            break
        stream = io.BufferedReader(unpack(name, stream), 1 << 20)
    return stream


def _zip(name: str, stream: BinaryIO) -> BinaryIO:
    content = stream if stream.seekable() else io.BytesIO(whole(name, stream))
    try:
        archive = zipfile.ZipFile(content)
        inside = [one for one in archive.namelist() if not one.endswith("/")]
        inside = [one for one in inside if not re.search(r"^__MACOSX|(^|/)\.", one)]
        if len(inside) == 1:
            return archive.open(inside[0])
    except (RuntimeError, ValueError, struct.error) as error:  # a password, an unknown packing
        raise InstructMiningError(f"{name}: a zip archive that cannot be opened: {error}") from None
    if "[Content_Types].xml" in inside:
        raise InstructMiningError(f"{name}: a spreadsheet of Excel: save it as CSV in UTF-8")
    raise InstructMiningError(
        f"{name}: a zip archive of {len(inside)} files: unpack it, and name the files"
    )


_UNPACK = {
    b"\x1f\x8b": lambda name, stream: gzip.GzipFile(fileobj=stream),
    b"\x28\xb5\x2f\xfd": lambda name, stream: zstandard.ZstdDecompressor().stream_reader(
        stream, read_across_frames=True),
    b"\xfd7zXZ\x00": lambda name, stream: lzma.LZMAFile(stream),
    b"BZh": lambda name, stream: bz2.BZ2File(stream),
    b"PK\x03\x04": _zip,
}  # fmt: skip


def _records(name: str, stream: BinaryIO, encoding: str | None) -> Found:
    plain = _plain_name(name)
    head = stream.peek(4096)[:4096]
    start = head.removeprefix(BOM).lstrip()
    for magic, what in FOREIGN:
        if start[:40].lower().startswith(magic):
            raise InstructMiningError(f"{name}: {what}")
    if head[257:262] == b"ustar":
        raise InstructMiningError(f"{name}: a tar archive: unpack it, and name the files")
    if head[:4] == b"PAR1" or head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return _arrow(name, stream, head)
    if plain.endswith((".parquet", ".arrow")):
        raise InstructMiningError(f"{name}: expected Parquet or Arrow, got {show(head[:40])}")
    coding = encoding or _wide(head)
    if b"\0" in head and not coding and not plain.endswith(TEXT):
        raise InstructMiningError(f"{name}: binary data of no known kind: save it as JSONL")
    if coding:
        try:
            text = whole(name, stream).decode(coding).lstrip("\ufeff")
        except (UnicodeError, LookupError) as error:
            raise InstructMiningError(
                f"{name} is not in {coding}: {error}; name its encoding with --encoding"
            ) from None
        stream = io.BufferedReader(io.BytesIO(text.encode("utf-8", "surrogatepass")))
        head = stream.peek(4096)[:4096]
        start = head.lstrip()
    if not start and len(head) < 4096:
        return iter(())
    named_json = plain.endswith((".json", ".jsonl", ".ndjson"))
    json_inside = re.match(rb'[\[{]\s*["{]', start)  # a CSV header may begin with "[id]"
    if not json_inside and (plain.endswith((".csv", ".tsv")) or (
        start[:1] not in (b"[", b"{") and not named_json)):  # fmt: skip
        return read_csv(name, stream, "\t" if plain.endswith(".tsv") else ",")
    return read_json(name, stream)


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its byte order mark or its zero bytes; None for all else."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = [head[:64:2].count(0), head[1:64:2].count(0)]
    if max(zeros) > 4 * (min(zeros) + 1):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None


def _arrow(name: str, stream: BinaryIO, head: bytes) -> Found:
    """Rows of a Parquet file, or of Arrow's file or stream format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seekable = isinstance(getattr(stream, "raw", None), io.FileIO) and stream.seekable()
    source = stream if seekable else pa.BufferReader(whole(name, stream))
    try:
        if head[:4] == b"PAR1":
            batches = pq.ParquetFile(source).iter_batches(batch_size=1024)
        elif head[:6] == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = pa.ipc.open_stream(source)
        for batch in batches:
            batch.validate(full=True)  # a file's offsets may point anywhere
            yield from ((0, value) for value in _values_of(batch))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InstructMiningError(f"{name}: expected whole Parquet or Arrow data, which may be cut "
                                  f"short (fetch it again), got {show(str(error))}") from None


def _values_of(batch) -> list:
    """A batch's rows; where one cannot be had in Python (a date in the year 10000), its error."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [FormatError("values that Python can hold", str(error))]
        return [_values_of(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


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


def _hub_set(resolved: str) -> Found:
    """Every record of a set in its published order, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InstructMiningError(
            f"{resolved}: hub names need the `datasets` package: pip install 'instructmining[hub]'"
        ) from None
    named = HUB_NAME.match(resolved).groupdict()
    try:
        rows = load_dataset(named["name"], named["config"], split=named["split"],
                            revision=named["revision"], streaming=True)  # fmt: skip
        yield from ((0, value) for value in rows)
    except (ValueError, OSError, RuntimeError) as error:
        raise InstructMiningError(
            f"{resolved}: the hub's data set cannot be read: {error}"
        ) from error


def whole(name: str, stream: BinaryIO) -> bytes:
    """All of a stream; a packed one only as far as memory is safe."""
    if isinstance(getattr(stream, "raw", None), io.FileIO | io.BytesIO):
        return stream.read()
    size = os.path.getsize(name) if os.path.isfile(name) else 0
    limit = max(MAX_RECORD, PACKING * size)
    content = stream.read(limit + 1)
    if len(content) > limit:
        raise InstructMiningError(
            f"{name}: unpacks to one document of more than {limit >> 20:,} MiB, which is read "
            "whole; save it as JSON lines"
        )
    return content


def _not_utf8(data: bytes, at: int) -> FormatError:
    """The error of bytes that are no UTF-8 from `at` on, with what they may be in."""
    near = data[max(at - 20, 0) :][:200]
    high = sum(byte > 127 for byte in near)
    # Kana begin with 82 or 83; Cyrillic small letters are E0 to FF; in Chinese encodings the high
    # bytes come in pairs, in Western ones mostly alone.
    likely = next((coding for coding, bytes_, share in (
        ("shift_jis", rb"[\x82\x83][\x40-\xf1]", 6), ("cp1251", rb"[\xe0-\xff]{2}", 4),
        ("gb18030", rb"[\x81-\xfe][\xa1-\xfe]", 4),
    ) if share * len(re.findall(bytes_, near)) > high), "cp1252")  # fmt: skip
    return FormatError(
        f"UTF-8 text (this may be {likely}: name the encoding, as in --encoding {likely}, and look "
        "whether the texts are right)", near[:40],
    )  # fmt: skip


def loads(text: bytes) -> object:
    """JSON from UTF-8 bytes. orjson first; the slower reader takes what orjson refuses or rounds
    (lone surrogates, NaN, huge integers). Raises FormatError."""
    text = text.removeprefix(BOM)
    try:
        if MANY_DIGITS not in text.translate(DIGITS):
            return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise _not_utf8(text, error.start) from None
    except (ValueError, RecursionError) as error:  # broken, too deep, an integer beyond all use
        why, _, _ = str(error).partition(";")
        why = "nested too deeply" if isinstance(error, RecursionError) else why
        raise FormatError(f"JSON ({why})", text[:200].decode("utf-8", "replace")) from None


def text_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, blank ones left out; one that is too long is cut there."""
    number = 0
    while line := stream.readline(MAX_RECORD):
        number += 1
        if not line.isspace():
            yield number, line
        while len(line) == MAX_RECORD and line[-1:] != b"\n":  # the rest of a cut one
            line = stream.readline(MAX_RECORD)


def read_json(name: str, stream: BinaryIO) -> Found:
    """JSON lines; or, where the first line is not one of several values, a document."""
    lines = text_lines(stream)
    number, first = next(lines, (1, b"[]"))
    first = first.removeprefix(BOM)
    document = None
    try:
        values = _values(first)
        second = next(lines, None)
        if second is None:
            document = _rows(name, values[0]) if len(values) == 1 else values
        else:
            lines = chain([(number, first), second], lines)
    except FormatError:
        lines = chain([(number, first)], lines)
        if first.lstrip()[:1] == b"[" or first.rstrip()[-1:] in b"{[,:" or len(first) == MAX_RECORD:
            text = first + whole(name, stream)
            document, lines = _document(name, text), text_lines(io.BytesIO(text))
    if document is not None:
        yield from ((0, value) for value in document)
        return
    for number, line in lines:
        try:
            yield from ((number, value) for value in _values(line))
        except FormatError as error:
            yield number, error


def _document(name: str, text: bytes) -> list | None:
    """The records of one JSON value over many lines, or of several one after the other."""
    try:
        return _rows(name, loads(text))
    except FormatError as error:
        if text.lstrip()[:1] == b"[":
            raise InstructMiningError(
                f"{name}: expected one whole JSON array, got {error.got}: {error.expected}. "
                "An array that breaks cannot be read in part; mend it, or save it as JSON lines"
            ) from None
        return _in_sequence(text)


def _values(line: bytes) -> list:
    """The values of one line: JSON, also with a comma behind it, in quotes, several of them, or
    as Python writes it. Raises FormatError."""
    try:
        value = loads(line)
        value = structured(value) if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            return _rows("", value)
        return [value]
    except FormatError as error:
        if len(line) == MAX_RECORD:
            raise FormatError(f"a line of at most {MAX_RECORD >> 20} MiB", line[:60]) from None
        if several := _in_sequence(line):
            return several
        value = structured(line.decode("utf-8", "replace").rstrip().rstrip(","))
        if isinstance(value, dict) and "\ufffd" not in str(value):
            return [value]
        raise error from None


def _in_sequence(text: bytes) -> list | None:
    """Objects and lists one after the other, with commas or not; None where it is anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        whole = text.decode("utf-8", "surrogatepass")
        while (at := GAP.match(whole, at).end()) < len(whole):
            value, at = decoder.raw_decode(whole, at)
            if not isinstance(value, dict | list):
                return None
            values.append(value)
    except (ValueError, RecursionError):
        return None
    return values or None


def _is_turn(value: object) -> bool:
    """Whether this is a message of a bare list; Open-Assistant's single messages are no list."""
    return isinstance(value, dict) and "message_id" not in value and bool(
        value.keys() & {"role", "from"} and value.keys() & {*fields.CONTENT_KEYS, *fields.CALLS}
    )


def _rows(name: str, value: object) -> list:
    """The records of a whole document: a list's, a wrapper's, a table's, else the value itself."""
    if isinstance(value, list):
        return [value] if value and all(map(_is_turn, value)) else value
    if not isinstance(value, dict):
        return [value]
    names, data = value.get("columns"), value.get("data")  # of pandas, "split"
    if isinstance(names, list) and isinstance(data, list) and all(
        isinstance(row, list) for row in data
    ):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]
    parts = list(value.values())
    same = len(parts) > 1 and parts[0] and isinstance(parts[0], dict) and all(
        isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts)  # fmt: skip
    if same and all(map(str.isdecimal, parts[0])):  # column -> row -> value
        return [{key: part[row] for key, part in value.items()} for row in parts[0]]
    try:
        formats.conversations(value)
        return [value]
    except FormatError:
        pass
    talks = (isinstance(part, list) and part and all(map(_is_turn, part)) for part in parts)
    if same or (parts and all(talks)):  # id -> record
        return parts
    inside = {key: part for key, part in value.items()
              if isinstance(part, list) and part and all(isinstance(o, dict) for o in part)}
    if all(isinstance(row.get("row"), dict) for row in inside.get("rows", [{}])):  # of the hub
        return [row["row"] for row in inside["rows"]]
    if len(inside) == 1:
        return next(iter(inside.values()))
    if inside:
        raise InstructMiningError(
            f"{name}: one object around several lists of rows ({', '.join(map(repr, inside))}): "
            "save the list that is meant in a file of its own"
        )
    if len(parts) > 1 and all(isinstance(p, list) and len(p) == len(parts[0]) for p in parts):
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return [value]


def read_csv(name: str, stream: BinaryIO, delimiter: str) -> Found:
    """Records by strict quoting; after a broken one it goes on at the line behind its first."""
    csv.field_size_limit(MAX_FIELD)
    first = stream.readline(MAX_RECORD).removeprefix(BOM)
    lines = _CsvLines(stream, first)
    if told := re.fullmatch(rb'sep=([^"\r\n\x80-\xff])\s*', first):
        delimiter = told[1].decode()
        lines.record(delimiter)
    elif delimiter.encode() not in first:
        delimiter = max(delimiter, *",;\t|", key=lambda one: first.count(one.encode()))
    header = lines.record(delimiter) or []
    if isinstance(header, FormatError):
        raise InstructMiningError(f"{name}, line 1: {header}")
    if twice := [one for one in header if header.count(one) > 1]:
        raise InstructMiningError(f"{name}: the column {twice[0]!r} stands twice in the header; "
                                  "rename one of them")  # fmt: skip
    optional = _optional(header)
    lists = [one for one in header if one.strip().lower() in formats.LISTS]
    while cells := lines.record(delimiter):
        line = lines.number - len(lines.taken) + 1
        if not isinstance(cells, FormatError) and len(cells) != len(header):
            cells = FormatError(f"{len(header)} columns, as in the header", cells)
        if isinstance(cells, FormatError):
            lines.back()
            yield line, cells
        else:
            value = dict(zip(header, cells, strict=True))
            for one in optional:
                value[one] = None if value[one].lower() in formats.NO_VALUE else value[one]
            for one in lists:
                value[one] = formats.accepted(value[one])
            yield line, value


def _optional(header: list[str]) -> list[str]:
    """Columns where "None" or "nan" is no text: what may be missing, or has another beside it."""
    names = {one: one.strip().lower() for one in header}
    missing = (*formats.BESIDE, *formats.SYSTEM, "history")
    found = [one for one, name in names.items() if name in missing]
    for group in (formats.ASKED, formats.ANSWERS):
        same = [one for one, name in names.items() if name in group]
        found += same if len(same) > 1 else []
    return found


class _CsvLines:
    """Lines of a CSV file as text, of which those of the last record can be read again.

    number : of the last line read; taken : the lines of the last record
    """

    def __init__(self, stream: BinaryIO, first: bytes) -> None:
        self._stream, self._again, self._reader = stream, [first], None
        self.taken, self.number, self._size = [], 0, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._again.pop() if self._again else self._stream.readline(MAX_RECORD):
            self.taken.append(line)
            self.number += 1
            self._size += len(line)
            if self._size > MAX_RECORD:
                raise csv.Error(f"a record of more than {MAX_RECORD >> 20} MiB")
            yield line.decode("utf-8", "surrogatepass")

    def record(self, delimiter: str) -> list[str] | FormatError | None:
        """The next record's cells, or what is wrong with it; None at the end."""
        self._reader = self._reader or csv.reader(self, delimiter=delimiter, strict=True)
        while True:
            self.taken, self._size = [], 0
            try:
                cells = next(self._reader, None)
            except UnicodeDecodeError as error:
                return _not_utf8(self.taken[-1], error.start)
            except csv.Error as error:
                why = next((told for known, told in BROKEN.items() if known in str(error)), error)
                return FormatError(f"CSV ({why})", self.taken[0].decode("utf-8", "replace")[:200])
            if cells is None or cells:
                return cells

    def back(self) -> None:
        """Go back to the line behind the first of the last record."""
        self._again += reversed(self.taken[1:])
        self.number -= len(self.taken) - 1
        self._reader = None


