"""Score a record table: every indicator that was asked for, each row once, nothing lost.

`Scorer` keeps models open and is called table by table; `score` is the one-shot form. Importing
this module imports no model library: an indicator is imported when it is first used.

The models of a scoring run: named at once, opened when first needed, opened once.

A pool's reference for pool-relative indicators, embedded once and kept in the bank.

The same rows and the same encoder give the same embeddings, so a second run opens no encoder.

Rows on their way through an indicator: read, sorted into blocks, computed, stored.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..config import REFERENCE_ROWS
from ..data.records import file_sha256, row_hash
from ..data.tokenization import clean_text
from ..models.loading import identity, open_tokenizer
from . import INDICATORS, ROLES, Indicator, choose
from .bank import Memory, ScoreCache, key_hash, open_shelf
from .progress import Progress
from .score_table import ScoreWriter, read_scores, write_scores
from .turns import CheckedConversation, read

if TYPE_CHECKING:
    from ..config import ModelRef
    from ..models.hub import Resolved
    from .neighbours import Reference


_NOBODY = {"model": "", "revision": "", "dtype": "", "stand_in": False, "note": ""}


class Models:
    """Role -> model.

    roles : the roles that have a model
    reward_form : input form of the reward model, "" for its own (`reward.FORMS`)
    """

    def __init__(
        self,
        refs: Mapping[str, ModelRef],
        standins: str | Path | None = None,
        device: str | None = None,
        reward_form: str = "",
    ) -> None:
        unknown = sorted(set(refs) - set(ROLES))
        if unknown:
            raise ValueError(f"unknown role {', '.join(unknown)}; known: {', '.join(ROLES)}")
        self.refs = dict(refs)
        self.roles = frozenset(refs)
        self.standins = Path(standins) if standins is not None else None
        self.device = device
        self.reward_form = reward_form
        self._open: dict[str, Any] = {}
        self._resolved: dict[str, Resolved] = {}

    def describe(self, role: str | None) -> dict[str, Any]:
        """Model id, revision, dtype, stand_in and a note; empty for a role without a model.

        Nothing is loaded: weights are only hashed (folders) or resolved to a commit (hub).
        """
        if role not in self.roles:
            return dict(_NOBODY)
        if role in self._open:
            return identity(self._open[role])
        resolved = self._resolve(role)
        return {
            "model": resolved.id, "revision": resolved.revision, "dtype": self._dtype(role),
            "stand_in": resolved.stand_in, "note": self._note(role),
        }  # fmt: skip

    def open(self, role: str) -> Any:
        """The opened model of a role."""
        if role not in self._open:
            self._open[role] = self._load(role)
        return self._open[role]

    def _load(self, role: str) -> Any:
        ref = self.refs[role]
        if role == "base":
            return open_tokenizer(ref, standins=self.standins)
        if role == "ppl":
            from ..models.causal_lm import load_lm as load
        elif role == "reward":
            from .reward import load as load_reward

            load = partial(load_reward, form=self.reward_form)
        elif role == "unieval":
            from .unieval import load
        else:
            from .embedding import load
        return load(ref, device=self.device, standins=self.standins)

    def _resolve(self, role: str) -> Resolved:
        if role not in self._resolved:
            from ..models import hub

            self._resolved[role] = hub.resolve(self.refs[role], standins=self.standins)
        return self._resolved[role]

    def _dtype(self, role: str) -> str:
        if role == "base":
            return ""
        from ..models import hub

        dtype = hub.pick_dtype(self.refs[role].dtype, self.device or hub.pick_device())
        return str(dtype).removeprefix("torch.")

    def _note(self, role: str) -> str:
        if role != "reward":
            return ""
        from .reward import note_of

        return note_of(self._config(role), self.reward_form)

    def other_form(self, role: str) -> str:
        """The input form of a reward model where it is not its own, else ""; part of cache keys."""
        if role != "reward" or not self.reward_form:
            return ""
        from .reward import form_of

        return "" if self.reward_form == form_of(self._config(role)) else self.reward_form

    def _config(self, role: str) -> Any:
        from transformers import AutoConfig

        from ..models import hub

        folder = hub.fetch(self._resolve(role)).folder
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def kept_reference(
    models: Models,
    conversations: Sequence[CheckedConversation],
    row_hashes: Sequence[str],
    bank: str | Path | None,
    *,
    size: int,
    seed: int = 0,
    progress: bool = False,
) -> Reference:
    """The reference that `make_reference` draws from a pool; from the bank where it has it."""
    from .neighbours import make_reference, reference_hash, sample_reference

    readable = [i for i, conversation in enumerate(conversations) if not conversation.problem]
    chosen = [readable[i] for i in sample_reference([row_hashes[i] for i in readable], size, seed)]
    names = tuple(row_hashes[i] for i in chosen)
    who = {name: models.describe("encoder")[name] for name in ("model", "revision", "dtype")}
    path = None
    if bank is not None:
        path = Path(bank) / "references" / f"{reference_hash(names)}-{key_hash(who)}.npz"
        kept = _read(path)
        if kept is not None and kept.row_hashes == names:
            return replace(kept, model=who["model"])  # the same weights may lie elsewhere now
    made = make_reference(
        models.open("encoder"), [conversations[i] for i in chosen], list(names), size=size,
        seed=seed, progress=progress,
    )  # fmt: skip
    if path is not None:
        made.save(path)
    return made


def _read(path: Path) -> Reference | None:
    """A kept reference; None where there is none, or only a broken file (it is made anew)."""
    from .neighbours import Reference

    try:
        return Reference.read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


BLOCK_SECONDS = 10  # of work between two writes to the bank: what a kill may cost
FIRST_ROWS = 8  # of the first block, before the speed is known; later ones grow fourfold at most
_RETRIED = "out of memory"  # a reason that another machine or another day may not give


def read_rows(table: pd.DataFrame) -> tuple[list[CheckedConversation], list[str]]:
    """The checked conversation and the row hash of each row; a row that cannot be read has "".

    A column `problem` (`read_records(on_error="keep")`) takes the place of our own finding.
    """
    conversations = [read(messages) for messages in table["messages"]]
    if "problem" in table:
        conversations = [
            CheckedConversation((), (), clean_text(problem)) if problem else conversation
            for conversation, problem in zip(conversations, table["problem"], strict=True)
        ]
    hashes = [
        "" if c.problem else row_hash(messages)
        for c, messages in zip(conversations, table["messages"], strict=True)
    ]
    return conversations, hashes


def stacked(
    indicator: Indicator, conversations: Sequence[CheckedConversation], options: Mapping[str, Any]
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """An indicator's columns side by side.

    options : keywords of its `compute`
    returns : values, float64, shape (n, columns), and n tuples of one reason a column
    """
    columns = indicator.load()(conversations, **options)
    ordered = [columns[name] for name in indicator.columns]
    values = np.column_stack([column.values for column in ordered])
    return values, list(zip(*(column.reasons for column in ordered), strict=True))


def timed(indicator: Indicator, conversations: Sequence[CheckedConversation], options: Mapping) -> float:
    """Seconds that an indicator takes on these rows; a call on the first one warms it up before."""
    compute = indicator.load()
    first = {"row_hashes": options["row_hashes"][:1]} if "row_hashes" in options else {}
    compute(conversations[:1], **{**options, **first})
    start = time.perf_counter()
    compute(conversations, **options)
    return time.perf_counter() - start


def unknown(shelf: ScoreCache, names: Sequence[str]) -> list[int]:
    """Positions of the distinct rows that the shelf lacks, each at its first place."""
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    order = list(first)
    return [first[order[i]] for i in shelf.missing(order)]


def fill(
    shelf: ScoreCache,
    indicator: Indicator,
    conversations: Sequence[CheckedConversation],
    names: Sequence[str],
    options_of: Callable[[list[str]], Mapping[str, Any]],
    block_rows: int,
    progress: Progress,
) -> None:
    """Compute rows and put them on a shelf block by block, so that a kill loses one block.

    names : row hashes; options_of : row hashes of a block -> keywords of `compute`
    block_rows : rows of a block at most; it is smaller where they would take over `BLOCK_SECONDS`

    Longest first: rows of one length share a block, so batches inside it have little padding, and
    the time left is never told too short.
    """
    sizes = np.array([characters(c) for c in conversations], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    whole = max(1, int(sizes.sum()))
    first, rows = 0, min(FIRST_ROWS, block_rows)
    while first < len(order):
        block = order[first : first + rows]
        hashes = [names[i] for i in block]
        options = {**options_of(hashes), "progress": progress.meter}  # opens the model
        start = time.perf_counter()
        with progress.working(indicator.name):
            found = stacked(indicator, [conversations[i] for i in block], options)
        seconds = time.perf_counter() - start
        store(shelf, hashes, *found)
        done = int(sizes[block].sum())
        progress.done(indicator.name, len(order) * done / whole)
        first += len(block)
        affordable = BLOCK_SECONDS * done / max(seconds, 1e-9)
        rows = rows_within(sizes[order[first:]], affordable, min(block_rows, 4 * len(block)))


def rows_within(sizes: np.ndarray, affordable: float, most: int) -> int:
    """How many of the next rows to take: as many as are affordable, at least 1, at most `most`.

    sizes : shape (n,), characters of the rows in order; affordable : characters

    >>> rows_within(np.array([50, 30, 30, 10]), 100, 8)
    2
    """
    return int(np.clip(np.searchsorted(np.cumsum(sizes), affordable, side="right"), 1, most))


def store(
    shelf: ScoreCache, names: Sequence[str], values: np.ndarray, reasons: Sequence[tuple[str, ...]]
) -> None:
    """Put rows on the shelf, and on disk those whose reason is not a passing one."""
    passing = [any(_RETRIED in why for why in row) for row in reasons]
    lasting = [i for i, now in enumerate(passing) if not now]
    if lasting:
        shelf.add([names[i] for i in lasting], values[lasting], [reasons[i] for i in lasting])
    for i, now in enumerate(passing):
        if now:
            shelf.values[names[i]] = (tuple(values[i]), tuple(reasons[i]))


def characters(conversation: CheckedConversation) -> int:
    """Characters of all its messages."""
    return sum(len(m["content"]) for m in conversation.messages)


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
        self._shelves: dict[str, ScoreCache] = {}
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

    def _shelf(self, indicator: Indicator) -> ScoreCache:
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
