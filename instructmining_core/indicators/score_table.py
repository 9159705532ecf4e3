"""Score tables on disk: Parquet, with what made each column in the file's own metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import InstructMiningError
from ..files import being_written

METADATA_KEY = b"instructmining"


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


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read a score table and its attrs. Raises InstructMiningError for any other file."""
    try:
        table = pq.read_table(path, partitioning=None)
    except pa.ArrowInvalid as error:
        raise InstructMiningError(f"{path} is no Parquet file: {error}") from None
    found = (table.schema.metadata or {}).get(METADATA_KEY)
    if found is None:
        raise InstructMiningError(
            f"{path} is no score table; make one with `instructmining score`"
        )
    frame = table.replace_schema_metadata(None).to_pandas()
    frame.attrs = json.loads(found)
    return frame
