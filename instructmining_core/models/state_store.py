"""Arrays on disk under a budget: what a frozen model says of a row, computed once.

One folder holds segments (plain files, appended to) and an index (SQLite). An array is found by a
digest of what it belongs to and read through a memory map, whose pages processes share. When the
budget is passed the oldest segment goes. A segment that was cut off, or bytes that rotted, are
noticed (length, CRC-32): such an array counts as missing and is computed anew.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from filelock import FileLock

BUDGET = 8 << 30  # bytes of one store
SEGMENT = 256 << 20  # bytes at which a new segment begins


class StateStore:
    """Arrays of shape (n, width), one each digest; folder : made if need be."""

    def __init__(self, folder: str | Path, width: int, dtype: np.dtype | type) -> None:
        self.folder, self.width, self.dtype = Path(folder), width, np.dtype(dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        self._maps: dict[int, np.memmap] = {}
        self._sound: set[bytes] = set()
        with self._lock:
            try:
                self._open()
            except sqlite3.OperationalError:  # locked, read-only, disk full
                raise
            except sqlite3.DatabaseError:  # a broken index: all of it can be computed anew
                for path in (*self.folder.glob("index.sqlite*"), *self.folder.glob("*.bin")):
                    path.unlink()
                self._open()

    def _open(self) -> None:
        with closing(self._index()) as index, index:
            index.execute(
                "CREATE TABLE IF NOT EXISTS states (digest BLOB PRIMARY KEY, segment INTEGER, "
                "start INTEGER, rows INTEGER, crc INTEGER) WITHOUT ROWID"
            )
            index.execute("SELECT count(crc) FROM states")  # every page: a kill may have cut it off

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of the digests that have no sound array, each once, in their order."""
        wanted = list(dict.fromkeys(digests))
        places = self._places(wanted)
        return [one for one in wanted if one not in places or self._array(one, places) is None]

    def read(self, digests: Sequence[bytes]) -> list[np.ndarray]:
        """The arrays of digests, read-only, in their order. Raises KeyError where one is missing.

        An array stays readable after its segment has left.
        """
        places = self._places(digests)
        found = [self._array(one, places) for one in digests]
        if any(one is None for one in found):
            raise KeyError("a row's kept states have left the cache; fill it anew")
        return found

    def write(self, arrays: Mapping[bytes, np.ndarray]) -> None:
        """Keep arrays; those of the oldest segments leave where the budget is passed."""
        with self._lock, closing(self._index()) as index:
            segment = max(self._segments(), default=0)
            path = self._path(segment)
            size = path.stat().st_size if path.exists() else 0
            if size >= SEGMENT or size % self.dtype.itemsize:  # full, or cut off
                segment, size, path = segment + 1, 0, self._path(segment + 1)
            rows = []
            with path.open("ab") as file:
                start = size
                for digest, array in arrays.items():
                    data = np.ascontiguousarray(array, self.dtype)
                    if data.ndim != 2 or data.shape[1] != self.width:
                        raise ValueError(f"an array of shape {data.shape}, not (n, {self.width})")
                    file.write(data.data)
                    rows.append((digest, segment, start, len(data), zlib.crc32(data.data)))
                    start += data.nbytes
            # the index names bytes only after they lie in the file
            with index:
                index.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", rows)
            segments = self._segments()
            while len(segments) > 1 and self.bytes() > BUDGET:
                oldest = segments.pop(0)
                with index:
                    index.execute("DELETE FROM states WHERE segment = ?", (oldest,))
                self._path(oldest).unlink(missing_ok=True)

    def bytes(self) -> int:
        """Bytes of all segments."""
        return sum(self._path(n).stat().st_size for n in self._segments())

    def _places(self, digests: Sequence[bytes]) -> dict[bytes, tuple[int, int, int, int]]:
        found = {}
        with closing(self._index()) as index:
            for at in range(0, len(digests), 500):
                part = list(digests[at : at + 500])
                marks = ",".join("?" * len(part))
                query = f"SELECT * FROM states WHERE digest IN ({marks})"
                found |= {row[0]: tuple(row[1:]) for row in index.execute(query, part)}
        return found

    def _array(self, digest: bytes, places: Mapping) -> np.ndarray | None:
        if digest not in places:
            return None
        segment, start, rows, crc = places[digest]
        stop = start + rows * self.width * self.dtype.itemsize
        whole = self._map(segment, stop)
        if whole is None:
            return None
        data = whole[start:stop]
        if digest not in self._sound:
            if zlib.crc32(data) != crc:
                return None
            self._sound.add(digest)
        return data.view(self.dtype).reshape(rows, self.width)

    def _map(self, segment: int, stop: int) -> np.memmap | None:
        """A segment's bytes, mapped anew where it has grown; None where it ends before `stop`."""
        known = self._maps.get(segment)
        if known is None or len(known) < stop:
            path = self._path(segment)
            if not path.exists() or path.stat().st_size < stop:
                return None
            self._maps[segment] = np.memmap(path, np.uint8, "r")
        return self._maps[segment]

    def _index(self) -> sqlite3.Connection:
        return sqlite3.connect(self.folder / "index.sqlite", timeout=60)

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.bin"))

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment}.bin"
