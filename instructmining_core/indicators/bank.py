"""The score cache: what was computed once is not computed again, in one SQLite file.

A row is known by its hash under a key: indicator, version, model, revision, dtype and, for
pool-relative indicators, the reference. Values are kept as the bytes of float64, exact with their
NaN. Every write is one transaction: a kill loses at most the block that was being computed, and a
second writer waits for the first. Each row carries a checksum, so that a damaged file is an error
and never a wrong value.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from struct import pack, unpack

from ..config import InstructMiningError

FILE = "scores.sqlite"
WAIT_SECONDS = 60.0  # for another writer, whose transactions take well under a second
_APPLICATION = 0x1357AC0E  # in the file's header: an SQLite file of another program is refused
_FORMAT = 1
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, key TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS scores (
    key INTEGER NOT NULL, row_hash TEXT NOT NULL, data BLOB NOT NULL, reasons TEXT NOT NULL,
    checksum INTEGER NOT NULL, PRIMARY KEY (key, row_hash)
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
COMMIT;
"""

Scores = tuple[tuple[float, ...], tuple[str, ...]]  # a row's values and reasons, one a column


class ScoreCache:
    """The scores of all keys in one folder.

    folder : of the file, made if need be
    key (of the methods) : indicator, version, model, revision, dtype, ... (`key_hash`)

    Raises InstructMiningError where the file is damaged or another program's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._file = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self._open()

    def get(self, key: Mapping, row_hashes: Sequence[str]) -> dict[str, Scores]:
        """Row hash -> (values, reasons) of those rows that are known."""
        name = key_hash(key)
        with self._explained():
            found = self._file.execute(
                "SELECT row_hash, data, reasons, checksum FROM scores"
                " WHERE key = (SELECT id FROM keys WHERE hash = ?)"
                " AND row_hash IN (SELECT value FROM json_each(?))",
                (name, json.dumps(list(row_hashes))),
            ).fetchall()
        for row, data, reasons, checksum in found:
            # SQLite keeps text or nothing in any column, so a damaged byte may change the type
            if type(data) is not bytes or checksum != _checksum(name, row, data, reasons):
                raise self._damaged(f"the checksum of row {row} is wrong")
        found = [(row, unpack(f"<{len(data) // 8}d", data), why) for row, data, why, _ in found]
        return {
            row: (values, tuple(json.loads(why)) if why else ("",) * len(values))
            for row, values, why in found
        }

    def add(self, key: Mapping, scores: Mapping[str, Scores]) -> None:
        """Keep rows for good, in one transaction; those that were known are replaced."""
        name = key_hash(key)
        rows = []
        for row, (values, reasons) in scores.items():
            data = pack(f"<{len(values)}d", *values)
            why = json.dumps(reasons) if any(reasons) else ""
            rows.append((name, row, data, why, _checksum(name, row, data, why)))
        with self._explained(), self._file:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute(
                "INSERT OR IGNORE INTO keys (hash, key) VALUES (?, ?)",
                (name, json.dumps(dict(key), sort_keys=True)),
            )
            self._file.executemany(
                "INSERT OR REPLACE INTO scores"
                " VALUES ((SELECT id FROM keys WHERE hash = ?), ?, ?, ?, ?)", rows,
            )  # fmt: skip

    def _open(self) -> None:
        """Make the tables of a new file, unless another process does; refuse one not ours."""
        if self._marks() == (0, 0) and not self._file.execute(
            "SELECT count(*) FROM sqlite_master"
        ).fetchone()[0]:
            self._file.executescript(_TABLES)
        if self._marks() != (_APPLICATION, _FORMAT):
            raise InstructMiningError(
                f"{self.path} is no score cache of this version; move it, or name another folder"
            )

    def _marks(self) -> tuple[int, int]:
        """Whose file it is, and in which form."""
        return tuple(
            self._file.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, read-only, disk full
            raise InstructMiningError(f"the score cache {self.path}: {error}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, why: object) -> InstructMiningError:
        return InstructMiningError(
            f"the score cache {self.path} is damaged ({why}); delete it to score anew"
        )


def key_hash(key: Mapping) -> str:
    """First 16 hex of the sha256 of a key; weights known by hash are known wherever they lie."""
    known = dict(key)
    if str(known.get("revision", "")).startswith("sha256:"):
        known.pop("model", None)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _checksum(key: str, row: str, data: bytes, reasons: str) -> int:
    return zlib.crc32(f"{key} {row} {reasons}".encode() + data)
