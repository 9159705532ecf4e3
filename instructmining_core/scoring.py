"""Score a record table: every indicator that was asked for, each row once, nothing lost.

`Scorer` keeps models open and is called table by table; `score` is the one-shot form. Importing
this module imports no model library: an indicator is imported when it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from instructmining_core.bank import Memory, Shelf, open_shelf
from instructmining_core.indicators import INDICATORS, Indicator, choose
from instructmining_core.indicators.reference import REFERENCE_ROWS, Reference
from instructmining_core.records import file_sha256
from instructmining_core.score_files import ScoreWriter, read_scores, write_scores
from instructmining_core.scoring_blocks import (
    characters,
    fill,
    read_rows,
    stacked,
    timed,
    unknown,
)
from instructmining_core.scoring_models import Models
from instructmining_core.scoring_progress import Progress
from instructmining_core.scoring_reference import kept_reference
from instructmining_core.templates import clean_text

if TYPE_CHECKING:
    from instructmining_core.profiles import ModelRef

__all__ = [
    "ScoreWriter", "Scorer", "ScoringError", "estimate_seconds", "read_scores", "score",
    "write_scores",
]  # fmt: skip

BLOCK_ROWS = 4096  # rows between two writes to the bank at most; fewer where they take long


class ScoringError(ValueError):
    """An indicator without its model, or without its reference."""


class Scorer:
    """Indicators with their models, opened once.

    models : role ("base", "ppl", "reward", "unieval", "encoder") -> ModelRef
    indicators : names of indicators or of their columns; None for all that need no model and
        those of the paper whose model is there
    bank : folder of the score bank, None to keep nothing
    reference : for pool-relative indicators; None until `make_reference`
    standins : folder of stand-in models, for "standin:" references
    reward_form : input form of the reward model (`indicators.reward.FORMS`), "" for its own
    """

    def __init__(
        self,
        models: Mapping[str, ModelRef] | None = None,
        *,
        indicators: Sequence[str] | None = None,
        bank: str | Path | None = None,
        reference: Reference | None = None,
        standins: str | Path | None = None,
        device: str | None = None,
        block_rows: int = BLOCK_ROWS,
        reward_form: str = "",
    ) -> None:
        self.models = Models(models or {}, standins, device, reward_form)
        self.indicators = self._chosen(indicators)
        self.bank = bank
        self.reference = reference
        self.block_rows = block_rows
        self._shelves: dict[str, Shelf] = {}
        self._file_hashes: dict[str, str] = {}

    def score(
        self, table: pd.DataFrame, *, progress: bool | Progress = False
    ) -> pd.DataFrame:
        """Score every row of a record table, in its order.

        progress : whether to show a bar; or the one of the whole job, of which this table is a part
        returns : id, source, file, file_sha256, row (part, where the table has it), row_hash, one
            column an indicator column, and `reasons`: JSON, column -> why it is NaN or what was
            cut to get it ("row" for a row that could not be read), "" where all is fine.
            `.attrs["indicators"]` tells for each column version, model, revision, dtype, stand_in
            and reference.

        Raises ScoringError if a pool-relative indicator is asked for without a reference.
        """
        conversations, hashes = read_rows(table)
        out = self._identity_columns(table, hashes)
        reasons: list[dict[str, str]] = [
            {"row": c.problem} if c.problem else {} for c in conversations
        ]
        if isinstance(progress, Progress):
            self._fill_columns(out, reasons, conversations, hashes, progress)
        else:
            with Progress(self.indicators, len(table), show=progress) as own:
                self._fill_columns(out, reasons, conversations, hashes, own)
        out["reasons"] = [json.dumps(r, ensure_ascii=False) if r else "" for r in reasons]
        frame = pd.DataFrame(out)
        frame.attrs["indicators"] = self.describe()
        return frame

    def _fill_columns(self, out, reasons, conversations, hashes, progress: Progress) -> None:
        """Each indicator's columns into `out`, and what is said of its values into `reasons`."""
        fine = [i for i, c in enumerate(conversations) if not c.problem]
        readable, names = [conversations[i] for i in fine], [hashes[i] for i in fine]
        for indicator in self.indicators:
            progress.done(indicator.name, len(conversations) - len(fine), known=True)
            values, why = self._values(indicator, readable, names, progress)
            for j, column in enumerate(indicator.columns):
                whole = np.full(len(conversations), np.nan)
                whole[fine] = values[:, j]
                out[column] = whole
                for i, row in zip(fine, why, strict=True):
                    if row[j]:
                        reasons[i][column] = row[j]

    def make_reference(
        self, table: pd.DataFrame, *, size: int = REFERENCE_ROWS, seed: int = 0,
        progress: bool = False,
    ) -> Reference:  # fmt: skip
        """Draw the reference of pool-relative indicators from a pool, and use it from now on.

        With a bank its embeddings are kept there, and no encoder is opened the next time.
        """
        conversations, hashes = read_rows(table)
        self.reference = kept_reference(
            self.models, conversations, hashes, self.bank, size=size, seed=seed, progress=progress
        )
        return self.reference

    def estimate_seconds(
        self, table: pd.DataFrame, *, sample: int = 64, seed: int = 0
    ) -> dict[str, float]:
        """Seconds that each indicator would take on `table`, from a timed sample of its rows.

        Scaled by characters. Rows that the bank has cost nothing, and where it has them all no
        model is opened; else it is opened before the clock starts.
        """
        conversations, hashes = read_rows(table)
        fine = [i for i, c in enumerate(conversations) if not c.problem]
        rng = np.random.default_rng(seed)
        seconds = dict.fromkeys((i.name for i in self.indicators), 0.0)
        for indicator in self.indicators:
            todo = [conversations[i] for i in fine]
            if indicator.role in self.models.roles:
                lacking = unknown(self._shelf(indicator), [hashes[i] for i in fine])
                todo = [todo[i] for i in lacking]
            if todo:
                some = [todo[i] for i in rng.permutation(len(todo))[:sample]]
                share = sum(map(characters, todo)) / max(1, sum(map(characters, some)))
                options = self._options(indicator, [""] * len(some))
                seconds[indicator.name] = timed(indicator, some, options) * share
        return seconds

    def describe(self) -> dict[str, dict[str, Any]]:
        """For each column: indicator, version, model, revision, dtype, stand_in, reference."""
        known = {}
        for indicator in self.indicators:
            entry = {"indicator": indicator.name, **self._key(indicator)}
            entry |= self.models.describe(indicator.role)
            known |= {column: dict(entry) for column in indicator.columns}
        return known

    def _chosen(self, names: Sequence[str] | None) -> list[Indicator]:
        given = self.models.roles
        if names is None:
            return [
                i for i in INDICATORS.values()
                if i.default and (i.role is None or i.role_optional or i.role in given)
            ]  # fmt: skip
        chosen = choose(list(names))
        for indicator in chosen:
            if indicator.role and not indicator.role_optional and indicator.role not in given:
                raise ScoringError(
                    f"{indicator.name} needs a model for the role {indicator.role!r}: give one in "
                    "`models` (on the command line: --profile or --models)"
                )
        return chosen

    def _identity_columns(self, table: pd.DataFrame, hashes: list[str]) -> dict[str, list]:
        out: dict[str, list] = {}
        for column in ("id", "source", "file"):
            found = table[column] if column in table else [""] * len(table)
            out[column] = [clean_text(str(value)) for value in found]
        out["file_sha256"] = [self._file_hash(name) for name in out["file"]]
        out["row"] = list(table["row"] if "row" in table else range(len(table)))
        if "part" in table:
            out["part"] = list(table["part"])
        out["row_hash"] = hashes
        return out

    def _file_hash(self, name: str) -> str:
        if name not in self._file_hashes:
            is_file = bool(name) and name != "-" and Path(name).is_file()
            self._file_hashes[name] = file_sha256(name) if is_file else ""
        return self._file_hashes[name]

    def _key(self, indicator: Indicator) -> dict[str, Any]:
        with_model = indicator.role in self.models.roles
        version = indicator.version if with_model or not indicator.role_optional \
            else indicator.version_without
        key: dict[str, Any] = {"version": version}
        if with_model:
            who = self.models.describe(indicator.role)
            key |= {name: who[name] for name in ("model", "revision", "dtype")}
            if form := self.models.other_form(indicator.role):
                key["form"] = form
        if indicator.pool_relative:
            key["reference"] = self._reference_of(indicator).describe()
        return key

    def _reference_of(self, indicator: Indicator) -> Reference:
        if self.reference is None:
            raise ScoringError(
                f"{indicator.name} is relative to a reference set: give `reference`, or call "
                "`make_reference` with the pool that the rule is fitted on"
            )
        return self.reference

    def _options(self, indicator: Indicator, names: Sequence[str]) -> dict[str, Any]:
        has_model = indicator.role in self.models.roles
        options: dict[str, Any] = {"model": self.models.open(indicator.role) if has_model else None}
        if indicator.pool_relative:
            options |= {"reference": self._reference_of(indicator), "row_hashes": list(names)}
        return options

    def _values(self, indicator, conversations, names, progress) -> tuple[np.ndarray, list]:
        if indicator.role not in self.models.roles:
            found = stacked(indicator, conversations, self._options(indicator, names))
            progress.done(indicator.name, len(names))
            return found
        shelf = self._shelf(indicator)
        missing = unknown(shelf, names)
        progress.done(indicator.name, len(names) - len(missing), known=True)
        fill(
            shelf, indicator, [conversations[i] for i in missing], [names[i] for i in missing],
            lambda block: self._options(indicator, block), self.block_rows, progress,
        )  # fmt: skip
        found = shelf.get(names)
        if isinstance(shelf, Memory):
            shelf.forget()
        return found

    def _shelf(self, indicator: Indicator) -> Shelf:
        key = {"indicator": indicator.name, **self._key(indicator)}
        where = json.dumps(key, sort_keys=True)
        if where not in self._shelves:
            self._shelves[where] = open_shelf(self.bank, key, indicator.columns)
        shelf = self._shelves[where]
        shelf.refresh()
        return shelf


def score(
    table: pd.DataFrame,
    models: Mapping[str, ModelRef] | None = None,
    *,
    indicators: Sequence[str] | None = None,
    bank: str | Path | None = None,
    reference: Reference | None = None,
    standins: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Open models, score one table, and return its frame; arguments and columns as in `Scorer`.

    Without a `reference` a seeded sample of the table itself is taken for pool-relative indicators.
    """
    scorer = Scorer(
        models, indicators=indicators, bank=bank, reference=reference, standins=standins,
        device=device,
    )  # fmt: skip
    if reference is None and any(i.pool_relative for i in scorer.indicators):
        scorer.make_reference(table, progress=progress)
    return scorer.score(table, progress=progress)


def estimate_seconds(
    table: pd.DataFrame, models: Mapping[str, ModelRef] | None = None, *, sample: int = 64,
    **options,
) -> dict[str, float]:
    """Seconds that each indicator would take on a table; `options` as in `Scorer`."""
    scorer = Scorer(models, **options)
    if scorer.reference is None and any(i.pool_relative for i in scorer.indicators):
        scorer.make_reference(table, size=min(len(table), 256))
    return scorer.estimate_seconds(table, sample=sample)
