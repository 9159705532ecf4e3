"""One stream of raw records from JSON, JSONL, CSV, Parquet, Arrow, standard input or a hub's set.

The content decides, the suffix only helps: people name JSON lines `.json` and pipe without a name.
JSONL, CSV, Parquet and Arrow stream, also out of gzip, zstd, xz, bzip2 and zip; a JSON array is
read whole. A hub set is named with its commit. What is in a text is read by `text_files`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..config import InstructMiningError
from .fields import FormatError, show
from .text_files import BOM, Found, read_csv, read_json, text_lines, whole

PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXT, ".parquet", ".arrow", *PACKED)
HUB_NAME = re.compile(
    r"^(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>[\w.]+))?$"
)
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull`"),
    (b"<!doctype html", "a web page (a login or an error?): download the file itself"),
    (b"<html", "a web page (a login or an error?): download the file itself"),
    (b"sqlite format 3", "an SQLite database: export the table as JSONL"),
    (b"<?xml", "an XML page (an error of a server?): download the file itself"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it, and name the files"),
    (b"rar!", "a RAR archive: unpack it, and name the files"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of an old Excel: save it as CSV in UTF-8"),
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
    if stdin is None and is_hub_name(name):
        yield from _numbered(_hub_set(name))
        return
    with _told(name), _opened(name, stdin) as stream:
        yield from _numbered(_records(name, stream, encoding))


def _numbered(found: Found) -> Iterator[Raw]:
    for row, (line, value) in enumerate(found):
        error = value if isinstance(value, FormatError) else None
        yield Raw(row, line or row + 1, "line" if line else "record", None if error else value,
                  error)  # fmt: skip


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


def count_records(where: str | Path, encoding: str | None = None) -> int | None:
    """How many records a file holds, read as fast as its format allows; None for standard input
    and hub names. For progress and estimates: a CSV or JSON file is read once for it.
    """
    name = str(where)
    if name == "-" or is_hub_name(name):
        return None
    if _plain_name(name).endswith((".jsonl", ".ndjson")):
        with _told(name), _opened(name, None) as stream:
            return sum(1 for _ in text_lines(stream))
    if _plain_name(name) == name.lower() and name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        with _told(name), _opened(name, None) as stream, suppress(ValueError):
            return pq.read_metadata(stream).num_rows
    return sum(1 for _ in read_raw(name, encoding=encoding))


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
    content = stream if stream.seekable() else io.BytesIO(whole(name, stream))
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


def _records(name: str, stream: BinaryIO, encoding: str | None) -> Found:
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
    if plain.endswith((".csv", ".tsv")) or (start[:1] not in (b"[", b"{") and not named_json):
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
