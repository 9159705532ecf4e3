"""Finished runs in a few Parquet files, to be committed: small, only added to, exact.

Each sitting adds one part, named by its last day and by what it holds, so that parts of two
machines lie side by side. From a row the record comes back as it was, number for number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import being_written, clear_leftovers
from .ledger import Ledger, settled, tidy
from .run_spec import Record

UNIT = 1e6  # losses have six decimals (`run`): as whole millionths they are exact and half the size
WHOLE, MILLIONTHS = pa.list_(pa.int32()), pa.list_(pa.int64())
PAGE = 1 << 26  # bytes: rows of one page share their hashes and settings, which zstd then sees


class RunArchive:
    """A folder of Parquet parts, one row a finished run; read as a `Ledger` is.

    Columns: run_id, purpose, status; `record`, the record as JSON without its losses by prompt; and
    these, `<evaluation set>.<column>`, a list with one value a prompt: int32 as it is (tokens),
    int64 in millionths of a nat. A run that two parts hold is that of the first by name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def has(self, run_id: str) -> bool:
        """Whether the run is here, and so finished."""
        return run_id in self._rows

    def read(self, run_id: str) -> Record | None:
        """The whole record of a run, or None."""
        if not self.has(run_id):
            return None
        part, row, text = self._rows[run_id]
        record = json.loads(text)
        for name in part.column_names:
            values = part[name][row].as_py() if "." in name else None
            if values is not None:
                evaluation, _, column = name.rpartition(".")
                if part.schema.field(name).type.value_type == pa.int64():
                    values = [None if one is None else one / UNIT for one in values]
                record["examples"][evaluation][column] = values
        return record

    def records(self) -> dict[str, Record]:
        """Every record by run_id, without its losses by prompt."""
        return {run_id: json.loads(text) for run_id, (_, _, text) in self._rows.items()}

    def load(self) -> pd.DataFrame:
        """One row a run, sorted by run_id; see `ledger.tidy`."""
        return tidy([record for _, record in sorted(self.records().items())])

    def append(self, records: Iterable[Record]) -> Path | None:
        """Add the finished runs among `records` that no part holds, as one part; None without any.

        What is there is not touched, and a part is there whole or not at all.
        """
        clear_leftovers(self.folder)
        new = {one["run_id"]: one for one in records
               if settled(one) and not self.has(one["run_id"])}  # fmt: skip
        if not new:
            return None
        digest = hashlib.sha256("\n".join(sorted(new)).encode()).hexdigest()[:8]
        last = max(record["ended"] for record in new.values())
        path = self.folder / f"{last[:10]}-{digest}.parquet"
        table = _table([new[run_id] for run_id in sorted(new)])
        with being_written(path) as temporary:
            losses = [f"{name}.list.element" for name in table.column_names if "." in name]
            pq.write_table(table, temporary, compression="zstd", compression_level=19,
                           use_dictionary=False, data_page_size=PAGE, row_group_size=len(table),
                           use_byte_stream_split=losses)  # fmt: skip
        del self._rows
        return path

    @cached_property
    def _rows(self) -> dict[str, tuple[pa.Table, int, str]]:
        """run_id -> its part, its row there, its record's JSON."""
        found: dict[str, tuple[pa.Table, int, str]] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            part = pq.read_table(path, partitioning=None)
            texts = zip(part["run_id"].to_pylist(), part["record"].to_pylist(), strict=True)
            for row, (run_id, text) in enumerate(texts):
                found.setdefault(run_id, (part, row, text))
        return found


class ContinuedLedger(Ledger):
    """A ledger that goes on from an archive: what is finished there is not run again."""

    def __init__(self, folder: str | Path, archive: RunArchive) -> None:
        super().__init__(folder)
        self.archive = archive

    def read(self, run_id: str) -> Record | None:
        """The record in the ledger; where that is not finished, the archive's, if it has one."""
        record = super().read(run_id)
        return record if settled(record) else self.archive.read(run_id) or record

    def kept(self, run_ids: Iterable[str]) -> int:
        """How many of these runs are finished in the archive alone."""
        return sum(self.archive.has(one) and not settled(super(ContinuedLedger, self).read(one))
                   for one in set(run_ids))  # fmt: skip

    def records(self) -> dict[str, Record]:
        """Every record by run_id; those of the archive without their losses by prompt."""
        own, kept = super().records(), self.archive.records()
        return kept | {name: one for name, one in own.items() if settled(one) or name not in kept}


def _table(records: Sequence[Record]) -> pa.Table:
    """One row a record, as `RunArchive` tells; what is no list of numbers stays in the JSON."""
    lists: dict[str, list] = {}
    for row, record in enumerate(records):
        for evaluation, columns in record["examples"].items():
            for column, values in columns.items():
                name = f"{evaluation}.{column}"
                lists.setdefault(name, [None] * len(records))[row] = values
    packed = {name: one for name in sorted(lists) if (one := _packed(lists[name])) is not None}
    texts = []
    for record in records:
        rest = {evaluation: {column: values for column, values in columns.items()
                             if f"{evaluation}.{column}" not in packed}
                for evaluation, columns in record["examples"].items()}  # fmt: skip
        texts.append(json.dumps(record | {"examples": rest}))
    plain = {"run_id": [one["run_id"] for one in records],
             "purpose": [one["spec"]["purpose"] for one in records],
             "status": [one["status"] for one in records], "record": texts}  # fmt: skip
    return pa.table(plain | packed)


def _packed(lists: Sequence[list | None]) -> pa.Array | None:
    """One column over the runs as `WHOLE` or `MILLIONTHS`; None where neither gives it back."""
    numbers = [one for values in lists if values for one in values if one is not None]
    if all(type(one) is int and abs(one) < 2**31 for one in numbers):
        return pa.array(lists, WHOLE)
    if not all(type(one) is float and round(one * UNIT) / UNIT == one for one in numbers):
        return None
    return pa.array([values and [None if one is None else round(one * UNIT) for one in values]
                     for values in lists], MILLIONTHS)  # fmt: skip
