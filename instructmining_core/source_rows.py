"""Back from a score table to the records that were scored, in the very files, checked by hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from instructmining_core.messages import Conversation
from instructmining_core.readers import file_sha256, is_hub_name
from instructmining_core.records import iter_rows, row_hash

Key = tuple[str, int, int]  # file as it was named, row, part


class SourceError(ValueError):
    """A scored file that is not there, or is not the one that was scored."""


class SourceRows:
    """The records behind a score table.

    scores : with file, file_sha256 and row (part); `.attrs["read"]["paths"]` says how OASST trees
        were read
    beside : folder that relative names are also looked for in (the score table's)
    moved : files that may be scored ones under a new name; matched by sha256

    Raises SourceError at once where a file is absent or has changed.
    """

    def __init__(
        self, scores: pd.DataFrame, *, beside: Path | None = None, moved: Sequence[str | Path] = ()
    ) -> None:
        self.paths = scores.attrs.get("read", {}).get("paths", "best")
        self.files: dict[str, str] = {}
        self.records: dict[Key, dict] = {}
        others = {file_sha256(path): str(path) for path in moved}
        named = scores[["file", "file_sha256"]].drop_duplicates()
        self.sha256 = dict(zip(named["file"], named["file_sha256"], strict=True))
        for name, sha256 in self.sha256.items():
            self.files[name] = _located(name, sha256, beside, others)

    def fetch(self, rows: pd.DataFrame) -> list[Conversation]:
        """The conversations of rows of the score table, in their order.

        The records themselves are kept in `records`, by (file, row, part). Each file is read once
        a call, as far as its last row asked for. Raises SourceError where a row says something
        else than when it was scored.
        """
        keys = keys_of(rows)
        found: dict[Key, Conversation] = {}
        for name, path in self.files.items():
            wanted = {row for file, row, _ in keys if file == name}
            if wanted:
                self._read(name, path, wanted, found)
        hashes = rows["row_hash"] if "row_hash" in rows else [""] * len(rows)
        for key, own in zip(keys, hashes, strict=True):
            if key not in found or (own and row_hash(found[key]) != own):
                raise SourceError(
                    f"{key[0]}, row {key[1]}: not the record that was scored; score "
                    "the file again with this version"
                )
        return [found[key] for key in keys]

    def record(self, key: Key) -> dict:
        """A fetched record in its own fields; of several conversations in it, only this one."""
        return self.records[key]

    def _read(self, name: str, path: str, wanted: set[int], found: dict[Key, Conversation]) -> None:
        last = max(wanted)
        for _, raw, conversations in iter_rows(path, paths=self.paths, only=wanted):
            for part, messages in enumerate(conversations):
                key = (name, raw.row, part)
                found[key] = messages
                self.records[key] = _one_part(raw.value, part, messages, len(conversations))
            if raw.row == last:
                return


def keys_of(rows: pd.DataFrame) -> list[Key]:
    """(file, row, part) of each row of a score or record table."""
    parts = rows["part"] if "part" in rows else [0] * len(rows)
    keys = zip(rows["file"], rows["row"], parts, strict=True)
    return [(str(file), int(row), int(part)) for file, row, part in keys]


def _one_part(raw: dict, part: int, messages: Conversation, parts: int) -> dict:
    if parts == 1:
        return raw
    if isinstance(raw.get("instances"), list):
        return {**raw, "instances": [raw["instances"][part]]}
    return {**raw, "messages": messages}  # which path of the tree; read back before the tree


def _located(name: str, sha256: str, beside: Path | None, others: dict[str, str]) -> str:
    if sha256 and sha256 in others:
        return others[sha256]
    if not sha256 and is_hub_name(name):
        return name
    places = [Path(name), *([beside / name, beside / Path(name).name] if beside else [])]
    there = [place for place in places if place.is_file()] if name != "-" else []
    for place in there:
        if file_sha256(place) == sha256:
            return str(place)
    offered = f"; none of {', '.join(others.values())} is it" if others else ""
    if there:
        raise SourceError(
            f"{there[0]} has changed since it was scored: its sha256 was {sha256}, now it is "
            f"{file_sha256(there[0])}{offered}. Score it again, or name the old file with --data"
        )
    what = "standard input" if name == "-" else name
    raise SourceError(
        f"{what} was scored and is needed again, but is not there{offered}. Name the file with "
        f"--data; its sha256 is {sha256}"
    )
