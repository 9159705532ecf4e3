"""One stream of raw records from JSON, JSONL, CSV, Parquet, Arrow, standard input or a hub's set.

The content decides, the suffix only helps: people name JSON lines `.json` and pipe without a name.
JSONL, CSV, Parquet and Arrow stream, also out of gzip, zstd, xz, bzip2 and zip; a JSON array is
read whole. A hub set is named with its commit.
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
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from ..config import InstructMiningError
from .fields import BESIDE, NO_VALUE, SYSTEM, FormatError, show, structured
from .formats import conversations

PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", *PACKED)
HUB_NAME = re.compile(
    r"^(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>[\w.]+))?$"
)
BOM = b"\xef\xbb\xbf"
MAX_FIELD = 2**31 - 1  # characters in one CSV field; Python's own limit of 131,072 is too small
MAX_RECORD = 1 << 28  # bytes of a line, of a CSV record, and of a packed document read whole
PACKING = 20  # what a packed file may unpack to, in times of its size, where it is read whole
# orjson would make a float of such an integer; written out, it is found twice as fast.
MANY_DIGITS = re.compile(rb"\d" * 19)
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull`"),
    (b"<!doctype html", "a web page (a login or an error?): download the file itself"),
    (b"<html", "a web page (a login or an error?): download the file itself"),
    (b"sqlite format 3", "an SQLite database: export the table as JSONL"),
    (b"%pdf", "a PDF: export its rows as JSONL"),
    (b"\x80\x04", "a Python pickle, which is never opened: save it as JSONL or Parquet"),
    (b"\x80\x05", "a Python pickle, which is never opened: save it as JSONL or Parquet"),
)


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


def read_raw(where: str | Path, stdin: BinaryIO | None = None) -> Iterator[Raw]:
    """Every record of a file ("-": standard input) in order, malformed ones with their error.

    stdin : read in place of the file; `where` then only names it. Raises InstructMiningError where
    the file as a whole cannot be read: absent, cut short, a broken JSON array, no data at all.
    Nothing is yielded for blank lines.
    """
    name = str(where)
    with _told(name), _opened(name, stdin) as stream:
        yield from _records(name, stream)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of the system and of packed files, in words."""
    from zstandard import ZstdError

    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
            ZstdError) as error:  # fmt: skip
        raise InstructMiningError(
            f"{name}: expected a whole gzip file or other packed file, got one that breaks: "
            f"{error}; fetch it again"
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
    if _plain_name(name).endswith((".jsonl", ".ndjson")):
        with _told(name), _opened(name, None) as stream:
            return sum(1 for _ in _lines(stream))
    return sum(1 for _ in read_raw(name))


def _plain_name(name: str) -> str:
    name = name.lower()
    while name.endswith(PACKED):
        name = name.rpartition(".")[0]
    return name


def _opened(name: str, stdin: BinaryIO | None) -> BinaryIO:
    """The file's bytes, unpacked as long as they are packed."""
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


def _zstd(name: str, stream: BinaryIO) -> BinaryIO:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)


def _zip(name: str, stream: BinaryIO) -> BinaryIO:
    content = stream if stream.seekable() else io.BytesIO(_whole(name, stream))
    try:
        archive = zipfile.ZipFile(content)
        inside = [one for one in archive.namelist() if not one.endswith("/")]
        inside = [one for one in inside if not one.startswith("__MACOSX")]
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
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\xfd7zXZ\x00": lambda name, stream: lzma.LZMAFile(stream),
    b"BZh": lambda name, stream: bz2.BZ2File(stream),
    b"PK\x03\x04": _zip,
}


def _whole(name: str, stream: BinaryIO) -> bytes:
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


def _records(name: str, stream: BinaryIO) -> Iterator[Raw]:
    plain = _plain_name(name)
    head = stream.peek(4096)[:4096]
    start = head.removeprefix(BOM).lstrip()
    for magic, what in FOREIGN:
        if start[: len(magic)].lower() == magic:
            raise InstructMiningError(f"{name}: {what}")
    if head[257:262] == b"ustar":
        raise InstructMiningError(f"{name}: a tar archive: unpack it, and name the files")
    if head[:4] == b"PAR1" or head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return _arrow(name, stream, head)
    if plain.endswith((".parquet", ".arrow")):
        raise InstructMiningError(f"{name}: expected Parquet or Arrow, got {show(head[:40])}")
    if coding := _wide(head):
        try:
            text = _whole(name, stream).decode(coding).lstrip("\ufeff")
        except UnicodeDecodeError as error:
            raise InstructMiningError(f"{name}: looks like {coding}, but is not: {error}") from None
        stream = io.BufferedReader(io.BytesIO(text.encode("utf-8", "surrogatepass")))
        start = stream.peek(4096).lstrip()
    if not start and len(head) < 4096:
        return iter(())
    named_json = plain.endswith((".json", ".jsonl", ".ndjson"))
    if plain.endswith((".csv", ".tsv")) or (start[:1] not in (b"[", b"{") and not named_json):
        return _csv(name, stream, "\t" if plain.endswith(".tsv") else ",")
    return _json(name, stream)


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


def not_utf8(data: bytes) -> FormatError:
    """The error of bytes that are no UTF-8, with the encoding that they may be in."""
    likely = "?"
    for coding in ("gb18030", "cp1252", "latin-1"):
        try:
            text = data.decode(coding)
        except UnicodeDecodeError:
            continue
        if coding != "gb18030" or sum("\u4e00" <= c <= "\u9fff" for c in text) > 1:
            likely = coding
            break
    return FormatError(
        f"UTF-8 text (this may be {likely}: `iconv -f {likely} -t utf-8` makes it UTF-8)",
        data[:40],
    )


def loads(text: bytes) -> object:
    """JSON from UTF-8 bytes. orjson first; the slower reader takes what orjson refuses or rounds
    (lone surrogates, NaN, huge integers). Raises FormatError."""
    text = text.removeprefix(BOM)
    try:
        if not MANY_DIGITS.search(text):
            return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise not_utf8(text[max(error.start - 20, 0) :][:200]) from None
    except (ValueError, RecursionError) as error:  # broken, too deep, an integer beyond all use
        why, _, _ = str(error).partition(";")
        raise FormatError(f"JSON ({why})", text[:200].decode("utf-8", "replace")) from None


def _lines(stream: BinaryIO, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, blank ones left out; one that is too long is cut there."""
    number = first
    while line := stream.readline(MAX_RECORD):
        if len(line) == MAX_RECORD:
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        if line.strip():
            yield number, line
        number += 1


def _json(name: str, stream: BinaryIO) -> Iterator[Raw]:
    """JSON lines; or, where the first line is not one of several values, a document."""
    number, first = 1, stream.readline(MAX_RECORD)
    while first and not first.strip():
        number, first = number + 1, stream.readline(MAX_RECORD)
    if not first:
        return
    lines = _lines(stream, number + 1)
    if len(first) == MAX_RECORD and first[:1] in b"[{":  # a document on one long line
        yield from _document(name, first + _whole(name, stream))
        return
    try:
        value = _values(first)
    except FormatError:
        if first.strip()[:1] != b"[" and first.rstrip()[-1:] not in b"{[,:":
            yield from _json_lines(_chained((number, first), lines))
            return
        yield from _document(name, first + _whole(name, stream))
        return
    second = next(lines, None)
    if second is None:
        if len(value) == 1 and isinstance(value[0], dict | list):
            value = _rows(name, value[0])
        yield from (Raw(row, number if len(value) == 1 else row + 1,
                        "line" if len(value) == 1 else "record", one)
                    for row, one in enumerate(value))  # fmt: skip
        return
    yield from _json_lines(_chained((number, first), _chained(second, lines)))


def _chained(first, rest):
    yield first
    yield from rest


def _document(name: str, text: bytes) -> Iterator[Raw]:
    """One JSON value over many lines, or several one after the other."""
    try:
        values = _rows(name, loads(text))
    except FormatError as error:
        if text.lstrip()[:1] == b"[":
            raise InstructMiningError(
                f"{name}: expected one whole JSON array, got {error.got}: {error.expected}. "
                "An array that breaks cannot be read in part; mend it, or save it as JSON lines"
            ) from None
        values = _in_sequence(text)
        if values is None:
            return (yield from _json_lines(_lines(io.BytesIO(text))))
    for row, value in enumerate(values):
        yield Raw(row, row + 1, "record", value)


def _json_lines(lines: Iterator[tuple[int, bytes]]) -> Iterator[Raw]:
    row = 0
    for number, line in lines:
        try:
            values = _values(line)
        except FormatError as error:
            values = [error]
        for value in values:
            error = value if isinstance(value, FormatError) else None
            yield Raw(row, number, "line", None if error else value, error)
            row += 1


def _values(line: bytes) -> list:
    """The values of one line: JSON, also with a comma behind it, in quotes, several of them, or
    as Python writes it. Raises FormatError."""
    try:
        value = loads(line)
        return [structured(value) if isinstance(value, str) else value]
    except FormatError as error:
        if len(line) == MAX_RECORD:
            raise FormatError(f"a line of at most {MAX_RECORD >> 20} MiB", line[:60]) from None
        several = _in_sequence(line)
        if several:
            return several
        value = structured(line.decode("utf-8", "replace").rstrip().rstrip(","))
        if isinstance(value, dict) and "\ufffd" not in str(value):
            return [value]
        raise error from None


def _in_sequence(text: bytes) -> list | None:
    """Objects and lists one after the other, with commas or not; None where it is anything else."""
    try:
        whole = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(whole):
        gap = re.compile(r"[\s,\ufeff]*").match(whole, at)
        if gap.end() == len(whole):
            break
        try:
            value, at = decoder.raw_decode(whole, gap.end())
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict | list):
            return None
        values.append(value)
    return values or None


def _rows(name: str, value: object) -> list:
    """The records of a whole document: a list's, a wrapper's, a table's, else the value itself."""
    if isinstance(value, list):
        talk = value and all(isinstance(one, dict) and "role" in one for one in value)
        return [value] if talk and all("content" in one for one in value) else value
    if not isinstance(value, dict):
        return [value]
    parts = list(value.values())
    if set(value) >= {"columns", "data"} and isinstance(value["columns"], list):  # pandas, "split"
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    if len(parts) > 1 and all(isinstance(part, dict) and part.keys() == parts[0].keys()
                              and all(map(str.isdecimal, part)) for part in parts):  # fmt: skip
        return [{key: part[row] for key, part in value.items()} for row in parts[0]]
    try:
        conversations(value)
        return [value]
    except FormatError:
        pass
    inside = {key: part for key, part in value.items()
              if isinstance(part, list) and part and all(isinstance(o, dict) for o in part)}
    if len(inside) == 1:
        return next(iter(inside.values()))
    if inside:
        raise InstructMiningError(
            f"{name}: one object around several lists of rows ({', '.join(map(repr, inside))}): "
            "save the list that is meant in a file of its own"
        )
    if len(parts) > 1 and all(isinstance(part, list) and len(part) == len(parts[0])
                              for part in parts):  # fmt: skip
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return [value]


def _csv(name: str, stream: BinaryIO, delimiter: str) -> Iterator[Raw]:
    """Records by strict quoting; after a broken one it goes on at the line behind its first."""
    csv.field_size_limit(MAX_FIELD)
    lines = _CsvLines(stream)
    first = lines.take().removeprefix(BOM)
    told = re.fullmatch(rb"sep=(.)\s*", first)
    if told:
        delimiter, first = told[1].decode("latin-1"), lines.take()
    elif delimiter.encode() not in first:
        delimiter = max(delimiter, *",;\t|", key=lambda one: first.count(one.encode()))
    header = _cells([first], delimiter)
    if isinstance(header, FormatError):
        raise InstructMiningError(f"{name}, line 1: expected {header.expected}, got {header.got}")
    twice = [one for one in header if header.count(one) > 1]
    if twice:
        raise InstructMiningError(f"{name}: the column {twice[0]!r} stands twice in the header; "
                                  "rename one of them")  # fmt: skip
    optional = [one for one in header if one.strip().lower() in (*BESIDE, *SYSTEM, "history")]
    row = 0
    while record := lines.record():
        line = lines.number - len(record) + 1
        cells = _cells(record, delimiter, closed=lines.closed)
        if not cells:
            continue
        if not isinstance(cells, FormatError) and len(cells) != len(header):
            cells = FormatError(f"{len(header)} columns, as in the header", cells)
        if isinstance(cells, FormatError):
            lines.back_to(record[1:])
            yield Raw(row, line, "line", None, cells)
        else:
            value = dict(zip(header, cells, strict=True))
            for one in optional:  # what became of a missing cell; an answer may well be "None"
                value[one] = None if value[one].lower() in NO_VALUE else value[one]
            yield Raw(row, line, "line", value)
        row += 1


class _CsvLines:
    """Lines of a CSV file, put together to records by their quotes.

    number : of the last line taken; closed : whether the last record's quotes were
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._again, self.number, self.closed = stream, [], 0, True

    def take(self) -> bytes:
        self.number += 1
        return self._again.pop() if self._again else self._stream.readline(MAX_RECORD)

    def back_to(self, lines: list[bytes]) -> None:
        """Give lines back, to be taken again."""
        self._again += reversed(lines)
        self.number -= len(lines)

    def record(self) -> list[bytes]:
        """The lines of the next record: as many as it takes to close every quote."""
        taken, quotes, size = [], 0, 0
        while size < MAX_RECORD and (line := self.take()):
            taken.append(line)
            quotes += line.count(b'"')
            size += len(line)
            if quotes % 2 == 0:
                self.closed = True
                return taken
        if size < MAX_RECORD:
            self.number -= 1  # the end of the file is no line
        self.closed = not taken
        return taken


def _cells(record: list[bytes], delimiter: str, closed: bool = True) -> list[str] | FormatError:
    """A record's cells, or what is wrong with it."""
    text = b"".join(record)
    try:
        decoded = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        return not_utf8(text[max(error.start - 20, 0) :][:200])
    if not closed:
        return FormatError("CSV (a quote that is opened on this line is never closed)",
                           record[0].decode("utf-8", "replace")[:200])  # fmt: skip
    try:
        return next(csv.reader([decoded], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return FormatError(f"CSV ({str(error).partition(' - ')[0]})", decoded[:200])


def _arrow(name: str, stream: BinaryIO, head: bytes) -> Iterator[Raw]:
    """Rows of a Parquet file, or of Arrow's file or stream format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seekable = isinstance(getattr(stream, "raw", None), io.FileIO) and stream.seekable()
    source = stream if seekable else pa.BufferReader(_whole(name, stream))
    row = 0
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
            for value in _values_of(batch):
                error = value if isinstance(value, FormatError) else None
                yield Raw(row, row + 1, "record", None if error else value, error)
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InstructMiningError(
            f"{name}: expected Parquet or Arrow, got {show(str(error))}"
        ) from None


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
