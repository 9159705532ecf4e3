"""Records of text: JSON in every wrapping that people have, JSON lines, CSV and TSV.

Each reader yields (line, value): the line is 1-based, or 0 where a value is one of a document; the
value is a record, or a FormatError that says what is wrong with it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import orjson

from ..config import InstructMiningError
from .fields import (
    ANSWERS,
    ASKED,
    BESIDE,
    CALLS,
    CONTENT_KEYS,
    LISTS,
    NO_VALUE,
    SYSTEM,
    FormatError,
    structured,
)
from .formats import conversations

BOM = b"\xef\xbb\xbf"
MAX_FIELD = 2**31 - 1  # characters in one CSV field; Python's own limit of 131,072 is too small
MAX_RECORD = 1 << 25  # bytes of a line, of a CSV record, and of a packed document read whole
PACKING = 20  # what a packed file may unpack to, in times of its size, where it is read whole
# orjson would make a float of an integer with more digits.
MANY_DIGITS, DIGITS = b"0" * 19, bytes.maketrans(b"123456789", b"000000000")
GAP = re.compile(r"[\s,\ufeff]*")  # between values of a file
Found = Iterator[tuple[int, object]]


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
    # In Chinese encodings the high bytes come in pairs, in Western ones mostly alone.
    pairs = len(re.findall(rb"[\x81-\xfe][\xa1-\xfe]", near))
    likely = "gb18030" if 4 * pairs > sum(byte > 127 for byte in near) else "cp1252"
    return FormatError(
        f"UTF-8 text (this may be {likely}: name the encoding, as in --encoding {likely})",
        near[:40],
    )


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
    except FormatError:
        if first.lstrip()[:1] == b"[" or first.rstrip()[-1:] in b"{[,:" or len(first) == MAX_RECORD:
            text = first + whole(name, stream)
            document, lines = _document(name, text), text_lines(io.BytesIO(text))
            number, first = next(lines)
    else:
        second = next(lines, None)
        if second is None and len(values) == 1 and isinstance(values[0], dict | list):
            document = _rows(name, values[0])
        elif second is None:
            document = values
        else:
            lines = chain([second], lines)
    if document is None:
        yield from _json_lines(chain([(number, first)], lines))
    else:
        yield from ((0, value) for value in document)


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


def _json_lines(lines: Iterable[tuple[int, bytes]]) -> Found:
    for number, line in lines:
        try:
            yield from ((number, value) for value in _values(line))
        except FormatError as error:
            yield number, error


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
        value.keys() & {"role", "from"} and value.keys() & {*CONTENT_KEYS, *CALLS}
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
        conversations(value)
        return [value]
    except FormatError:
        pass
    if same:  # id -> record
        return parts
    inside = {key: part for key, part in value.items()
              if isinstance(part, list) and part and all(isinstance(o, dict) for o in part)}
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
    if told := re.fullmatch(rb'sep=([^"\r\n])\s*', first):
        delimiter, _ = told[1].decode("latin-1"), next(lines)
    elif delimiter.encode() not in first:
        delimiter = max(delimiter, *",;\t|", key=lambda one: first.count(one.encode()))
    header, optional, lists = None, [], []
    while cells := lines.record(delimiter):
        if header is None:
            header = _header(name, cells)
            optional = _optional(header)
            lists = [one for one in header if one.strip().lower() in LISTS]
            continue
        line = lines.number - len(lines.taken) + 1
        if not isinstance(cells, FormatError) and len(cells) != len(header):
            cells = FormatError(f"{len(header)} columns, as in the header", cells)
        if isinstance(cells, FormatError):
            lines.back()
            yield line, cells
        else:
            value = dict(zip(header, cells, strict=True))
            for one in optional:
                value[one] = None if value[one].lower() in NO_VALUE else value[one]
            for one in lists:
                value[one] = structured(value[one])
            yield line, value


def _optional(header: list[str]) -> list[str]:
    """Columns where "None" or "nan" is no text: what may be missing, or has another beside it."""
    names = {one: one.strip().lower() for one in header}
    found = [one for one, name in names.items() if name in (*BESIDE, *SYSTEM, "history")]
    for group in (ASKED, ANSWERS):
        same = [one for one, name in names.items() if name in group]
        found += same if len(same) > 1 else []
    return found


def _header(name: str, cells: list[str] | FormatError) -> list[str]:
    if isinstance(cells, FormatError):
        raise InstructMiningError(f"{name}, line 1: expected {cells.expected}, got {cells.got}")
    twice = [one for one in cells if cells.count(one) > 1]
    if twice:
        raise InstructMiningError(f"{name}: the column {twice[0]!r} stands twice in the header; "
                                  "rename one of them")  # fmt: skip
    return cells


class _CsvLines:
    """Lines of a CSV file as text, of which those of the last record can be read again.

    number : of the last line read; taken : the lines of the last record
    """

    def __init__(self, stream: BinaryIO, first: bytes) -> None:
        self._stream, self._again, self._reader = stream, [first], None
        self.taken, self.number, self._size = [], 0, 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else self._stream.readline(MAX_RECORD)
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.number += 1
        self._size += len(line)
        if self._size > MAX_RECORD:
            raise csv.Error(f"a record of more than {MAX_RECORD >> 20} MiB")
        return line.decode("utf-8", "surrogatepass")

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
                why = str(error).partition(" - ")[0]
                if why == "unexpected end of data":
                    why = "a quote that is opened on this line is never closed"
                return FormatError(f"CSV ({why})", self.taken[0].decode("utf-8", "replace")[:200])
            if cells is None or cells:
                return cells

    def back(self) -> None:
        """Go back to the line behind the first of the last record."""
        self._again += reversed(self.taken[1:])
        self.number -= len(self.taken) - 1
        self._reader = None


