"""What a study has on disk: its results, and the committed evidence where they are not there.

Results lie in `results/<profile>/`; a notebook opened without them reads the committed evidence of
the same profile, or of any published one; a warning says so, and so does `notes`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pandas as pd

from . import paths


class MissingInput(RuntimeError):
    """A stage was opened before the one that makes its input, and no evidence is committed."""


class StudyFiles:
    """The files of one profile's study, found, read and written whole or not at all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = paths.results(name)
        self.notes: list[str] = []
        self._asked: dict[str, list[str]] = {}

    def find(self, name: str) -> Path:
        """The file `name` of this study: from its results, else from the committed evidence.

        Raises MissingInput naming the command that makes it.
        """
        here = self.folder / name
        if here.exists():
            return here
        published = [paths.evidence(self.name)]
        published += sorted((paths.root() / "evidence").glob("*"))
        for folder in published:
            if (folder / name).exists():
                note = f"{name} is read from the committed evidence of `{folder.name}`."
                if note not in self.notes:
                    self.notes.append(note)
                    warnings.warn(note, stacklevel=3)
                return folder / name
        raise MissingInput(
            f"{here} is not there and no evidence holds it; run "
            f"`make study PROFILE={self.name}`, or the notebooks before this one."
        )

    def has_own(self, name: str) -> bool:
        """True where `find` gives this profile's own file, not another profile's evidence."""
        return (self.folder / name).exists() or (paths.evidence(self.name) / name).exists()

    def frame(self, name: str) -> pd.DataFrame:
        """A saved frame by file name (`.parquet` or `.csv`)."""
        path = self.find(name)
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)

    def save(self, frame: pd.DataFrame, name: str) -> None:
        """Write a frame whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        if name.endswith(".csv"):
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)
        part.replace(self.folder / name)

    def claim(self, claim: str, *, ours: str, detectable: str, verdict: str) -> None:
        """Record what this run says of one of the paper's claims (`paper.claims`)."""
        folder = self.folder / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"claim": claim, "ours": ours, "detectable": detectable, "verdict": verdict}
        part = folder / f"{claim}.part"
        part.write_text(json.dumps(record, indent=2), encoding="utf-8")
        part.replace(folder / f"{claim}.json")

    def list_runs(self, purpose: str, run_ids: list[str]) -> None:
        """Which runs a purpose asked for last: the ledger keeps those of earlier designs too.

        A purpose may ask in several calls (one a base, one a trial): the list is of all that this
        object has asked for.
        """
        asked = self._asked.setdefault(purpose, [])
        asked += [run_id for run_id in run_ids if run_id not in asked]
        folder = self.folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{purpose}.part"
        part.write_text(json.dumps(asked), encoding="utf-8")
        part.replace(folder / f"{purpose}.json")
