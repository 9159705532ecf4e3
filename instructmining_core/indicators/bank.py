"""The score bank: what was computed once is not computed again.

A folder of Parquet parts. Each key (indicator, version, model, revision, dtype and, for
pool-relative indicators, the reference's hash) has a folder of its own with `key.json` and parts of
columns `row_hash`, one value and one reason for each of the indicator's columns. A part is written
under a hidden name and renamed, under a name of its own, so that a kill leaves nothing half written
and two processes never touch one file; readers take the union of the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

_REASON = "_reason"


class BankError(RuntimeError):
    """A bank with a part that cannot be read."""


@dataclass
class ScoreCache:
    """The scores of one key that are known so far, by row hash.

    columns : of the indicator
    values : row hash -> (one value a column, one reason a column)
    """

    folder: Path
    columns: tuple[str, ...]
    values: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)

    def refresh(self) -> None:
        """Read the parts that came since the last look, from any process."""
        for part in sorted(self.folder.glob("part-*.parquet")):
            if part.name not in self.parts:
                self._take(_read(part, self.columns))
                self.parts.add(part.name)

    def missing(self, row_hashes: Sequence[str]) -> list[int]:
        """Positions of the rows that are not known."""
        return [i for i, name in enumerate(row_hashes) if name not in self.values]

    def add(
        self, row_hashes: Sequence[str], values: np.ndarray, reasons: Sequence[Sequence[str]]
    ) -> None:
        """Store rows for good, as one new part.

        values : float64, shape (n, columns); reasons : n sequences of one string a column
        """
        table = {"row_hash": list(row_hashes)}
        for j, column in enumerate(self.columns):
            table[column] = np.asarray(values[:, j], dtype=np.float64)
            table[column + _REASON] = [row[j] for row in reasons]
        frame = pd.DataFrame(table)
        name = f"part-{os.getpid()}-{uuid.uuid4().hex}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}"
        with partial.open("wb") as stream:
            pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.folder / name)
        self.parts.add(name)
        self._take(frame)

    def get(self, row_hashes: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        """Values, shape (n, columns), and reasons of known rows; KeyError for an unknown one."""
        found = [self.values[name] for name in row_hashes]
        values = np.array([value for value, _ in found], dtype=np.float64)
        return values.reshape(len(found), len(self.columns)), [reason for _, reason in found]

    def _take(self, frame: pd.DataFrame) -> None:
        values = frame[list(self.columns)].to_numpy(dtype=np.float64).tolist()
        reasons = frame[[c + _REASON for c in self.columns]].to_numpy(dtype=object).tolist()
        for name, value, reason in zip(frame["row_hash"], values, reasons, strict=True):
            self.values[name] = (tuple(value), tuple(reason))


def open_shelf(bank: str | Path | None, key: Mapping, columns: Sequence[str]) -> ScoreCache | Memory:
    """The shelf of a key; without a bank one that forgets.

    key : indicator, version, model, revision, dtype, and reference for pool-relative indicators
    """
    if bank is None:
        return Memory(Path(), tuple(columns))
    folder = Path(bank) / f"{key['indicator']}-{key_hash(key)}"
    folder.mkdir(parents=True, exist_ok=True)
    named = folder / "key.json"
    if not named.exists():
        partial = folder / f".key-{uuid.uuid4().hex}"
        partial.write_text(json.dumps(dict(key), indent=1, sort_keys=True))
        os.replace(partial, named)
    shelf = ScoreCache(folder, tuple(columns))
    shelf.refresh()
    return shelf


class Memory(ScoreCache):
    """A shelf that lives only as long as the process."""

    def refresh(self) -> None:
        """Nothing to read."""

    def add(self, row_hashes, values, reasons) -> None:
        """Keep rows until `forget`."""
        for name, value, reason in zip(row_hashes, values.tolist(), reasons, strict=True):
            self.values[name] = (tuple(value), tuple(reason))

    def forget(self) -> None:
        """Drop all rows, so that scoring chunk by chunk does not grow."""
        self.values.clear()


def key_hash(key: Mapping) -> str:
    """First 16 hex of the sha256 of a key; weights known by hash are known wherever they lie."""
    known = dict(key)
    if str(known.get("revision", "")).startswith("sha256:"):
        known.pop("model", None)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _read(part: Path, columns: Sequence[str]) -> pd.DataFrame:
    wanted = ["row_hash", *columns, *(c + _REASON for c in columns)]
    try:
        return pq.read_table(part, columns=wanted, partitioning=None).to_pandas()
    except (OSError, pa.ArrowInvalid) as error:
        raise BankError(f"cannot read {part}: {error}; delete that file to score it anew") from None
