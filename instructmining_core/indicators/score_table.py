"""Score tables on disk: Parquet, with what made each column in the file's own metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import InstructMiningError
from ..files import being_written

METADATA_KEY = b"instructmining"
PART = 1 << 16  # rows in memory at a time


class ScoreWriter:
    """Write a score table chunk by chunk; the file appears when all is written.

    >>> with ScoreWriter("scores.parquet") as writer:          # doctest: +SKIP
    ...     for table, problems in iter_records("data.jsonl"):
    ...         writer.write(scorer.score(table))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = being_written(self.path)
        self._writer: pq.ParquetWriter | None = None
        self._attrs: str | None = None

    def __enter__(self) -> ScoreWriter:
        return self

    def write(self, scores: pd.DataFrame) -> None:
        """Append a frame of `Scorer.score`; its attrs must equal those of the first one."""
        attrs = json.dumps(scores.attrs, sort_keys=True)
        table = pa.Table.from_pandas(scores, preserve_index=False)
        if self._writer is None:
            metadata = {**(table.schema.metadata or {}), METADATA_KEY: attrs.encode()}
            self._attrs = attrs
            schema = table.schema.with_metadata(metadata)
            self._writer = pq.ParquetWriter(self._file.__enter__(), schema, compression="zstd")
        if attrs != self._attrs:
            raise InstructMiningError(
                "this chunk was scored by other models or references than before"
            )
        self._writer.write_table(table.cast(self._writer.schema))

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.__exit__(*error)


def write_scores(scores: pd.DataFrame, path: str | Path) -> None:
    """Write a whole score table, atomically; its attrs go into the metadata."""
    with ScoreWriter(path) as writer:
        writer.write(scores)


class ScoreTable:
    """A score table on disk, of which a few columns, or a few rows, are in memory at a time.

    columns : their names; attrs : what made them, as in `read_scores`; len() : rows
    Raises InstructMiningError for any other file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise InstructMiningError(f"{path} is no Parquet file: {error}") from None
        found = (self._file.schema_arrow.metadata or {}).get(METADATA_KEY)
        if found is None:
            raise InstructMiningError(
                f"{path} is no score table; make one with `instructmining score`"
            )
        self.attrs = json.loads(found)
        self.columns = self._file.schema_arrow.names
        groups = self._file.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def parts(self, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Columns of all rows, some rows at a time; columns that the table lacks are left out."""
        known = [name for name in columns if name in self.columns]
        for batch in self._file.iter_batches(PART, columns=known):
            yield batch.to_pandas()

    def distinct(self, columns: Sequence[str]) -> pd.DataFrame:
        """The different rows of some columns, with the table's attrs."""
        found = pd.concat([part.drop_duplicates() for part in self.parts(columns)])
        found.attrs = self.attrs
        return found.drop_duplicates(ignore_index=True)

    def rows(self, positions: np.ndarray | None = None) -> pd.DataFrame:
        """The rows at some positions, in that order, which are their index; None: all."""
        if positions is None:
            found = self._file.read().replace_schema_metadata(None).to_pandas()
        else:
            groups = np.searchsorted(self._starts, positions, side="right") - 1
            parts = [self._file.schema_arrow.empty_table().to_pandas()]
            for group in np.unique(groups):
                here = positions[groups == group]
                part = self._file.read_row_group(int(group)).take(here - self._starts[group])
                parts.append(part.to_pandas().set_axis(here))
            found = pd.concat(parts[1:] or parts).loc[positions]
        found.attrs = self.attrs
        return found


def parts_of(scores: pd.DataFrame | ScoreTable, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Columns of a score table's rows: of one on disk some rows at a time, else all."""
    if isinstance(scores, ScoreTable):
        yield from scores.parts(columns)
    else:
        yield scores[[name for name in columns if name in scores]]


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read a score table and its attrs. Raises InstructMiningError for any other file."""
    return ScoreTable(path).rows()
