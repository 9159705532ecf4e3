"""Score record tables: every indicator that was asked for, each row once, nothing lost.

A table is parsed once; then, for each indicator, what the cache knows is taken from there, and the
rest is sorted into blocks, computed and stored. Importing this module imports no model library: an
indicator is imported and a model opened when it is first used.
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..config import REFERENCE_ROWS, InstructMiningError
from ..data.records import row_hash
from ..data.tokenization import clean_text, template_version
from ..files import file_sha256
from ..models.heads import HEAD_PREFIX, head_path, read_head
from ..models.loading import open_tokenizer
from . import ROLES, Indicator, chosen_indicators
from .bank import ScoreCache, Scores, key_hash
from .turns import CheckedConversation, Column, read

if TYPE_CHECKING:
    from ..config import ModelRef
    from ..models.causal_lm import LM
    from .neighbours import Reference

BLOCK_SECONDS = 10  # of work between two writes to the cache: what a kill may cost
BLOCK_ROWS = 4096  # of a block at most
FIRST_ROWS = 8  # of the first block, before the speed is known; later ones grow fourfold at most
LOG_SECONDS = 30  # between two states of the bar in a log file
_RETRIED = "out of memory"  # a reason that another machine or another day may not give
_MODEL_FREE = 0.02  # of the time of an indicator with a model, where no time was measured
_LEAST = 0.01  # of all time, so that no indicator's work leaves the bar where it is

Pass = tuple[Indicator, ...]  # indicators that one call of one function computes


@dataclass(frozen=True)
class ParsedTable:
    """A record table with what the indicators read of it.

    table : the record table itself
    conversations : one a row; those of unreadable rows have a `problem`
    row_hashes : one a row, "" for an unreadable one
    """

    table: pd.DataFrame
    conversations: list[CheckedConversation]
    row_hashes: list[str]

    @cached_property
    def readable(self) -> list[int]:
        """Positions of the rows that can be scored."""
        return [i for i, c in enumerate(self.conversations) if not c.problem]


def read_rows(table: pd.DataFrame) -> ParsedTable:
    """Check and clean every row of a record table.

    A column `problem` (`read_records(on_error="keep")`) takes the place of our own finding, a
    column `row_hash` that of hashing.
    """
    conversations = [read(messages) for messages in table["messages"]]
    if "problem" in table:
        conversations = [
            CheckedConversation((), (), clean_text(problem)) if problem else conversation
            for conversation, problem in zip(conversations, table["problem"], strict=True)
        ]
    known = table["row_hash"] if "row_hash" in table else [None] * len(table)
    hashes = [
        "" if c.problem else name or row_hash(messages)
        for c, name, messages in zip(conversations, known, table["messages"], strict=True)
    ]
    return ParsedTable(table, conversations, hashes)


class Models:
    """Role -> model: named at once, opened when first needed, opened once.

    refs : the roles that have a model
    standins : folder of stand-in models, for "standin:" references
    device : "cpu", "cuda"; None takes a GPU where there is one
    reward_form : input form of the reward model (`reward.FORMS`), "" for its own
    template : that the model of perplexity reads rows in, as in `tokenization.encode_many`
    keep_layers : finetuning will train so many top layers of the model of perplexity: what enters
        them is kept of the pass that heads and perplexity share (0: nothing is)
    """

    def __init__(
        self,
        refs: Mapping[str, ModelRef],
        standins: str | Path | None = None,
        device: str | None = None,
        reward_form: str = "",
        template: str = "auto",
        keep_layers: int = 0,
    ) -> None:
        if unknown := ", ".join(sorted(set(refs) - set(ROLES))):
            raise InstructMiningError(f"unknown role {unknown}; known: {', '.join(ROLES)}")
        self.refs = dict(refs)
        self.standins = Path(standins) if standins is not None else None
        self.device, self.reward_form = device, reward_form
        self.template, self.keep_layers = template, keep_layers
        self.asked: frozenset[str | None] = frozenset()  # roles of the indicators that are wanted
        self.opened: dict[str, Any] = {}
        self._described: dict[str | None, dict[str, Any]] = {}

    def open(self, role: str | None) -> Any:
        """The opened model of a role; None for a role without one."""
        if role not in self.opened and role in self.refs:
            self.opened[role] = one = self._load(role)
            if hasattr(one, "reads"):  # a head: its pass also keeps what finetuning will need
                layers = self.keep_layers if one.reads(self.describe("ppl")) else 0
                one.lm.pooled.keep_below(layers)
        return self.opened.get(role)

    def describe(self, role: str | None) -> dict[str, Any]:
        """Model id, revision, dtype, stand_in and a note; empty for a role without a model.

        Also `form` of a reward model whose input form is not its own, and `template` (its version)
        of the model of perplexity. No weights are loaded, only hashed or resolved to a commit.
        """
        if role not in self._described:
            self._described[role] = self._describe(role)
        return self._described[role]

    def key(self, role: str | None) -> dict[str, Any]:
        """What of a model is part of a cache key."""
        about = self.describe(role)
        parts = ("model", "revision", "dtype", "form", "template") if role in self.refs else ()
        return {name: about[name] for name in parts if name in about}

    def _load(self, role: str) -> Any:
        ref, options = self.refs[role], {"device": self.device, "standins": self.standins}
        if role == "base":
            return open_tokenizer(ref, standins=self.standins)
        if role == "ppl":
            from ..models.causal_lm import load_lm

            return self._read_by_a_head() or load_lm(ref, **options, template=self.template)
        if role == "reward":
            from .reward import load_reward_model

            return load_reward_model(ref, form=self.reward_form, **options)
        if role == "unieval":
            from .unieval import load_evaluator

            return load_evaluator(ref, **options)
        from .embedding import load_encoder

        return load_encoder(ref, **options)

    def _read_by_a_head(self) -> LM | None:
        """The base of an asked head, where it is the model of perplexity: one pass for both."""
        for one in sorted(self.asked & {"reward", "unieval"}):
            head = self.open(one) if self.refs[one].id.startswith(HEAD_PREFIX) else None
            if head and head.reads(self.describe("ppl")):
                return head.lm
        return None

    def _describe(self, role: str | None) -> dict[str, Any]:
        if role not in self.refs:
            return {**dict.fromkeys(("model", "revision", "dtype", "note"), ""), "stand_in": False}
        from ..models import hub

        ref = self.refs[role]
        resolved = hub.resolve(ref, standins=self.standins)
        device = self.device or hub.pick_device()
        dtype = "" if role == "base" else hub.pick_dtype(ref.dtype, device)
        about = {
            "model": resolved.id, "revision": resolved.revision,
            "dtype": str(dtype).removeprefix("torch."), "stand_in": resolved.stand_in, "note": "",
        }  # fmt: skip
        if ref.id.startswith(HEAD_PREFIX):
            return about | {"note": read_head(head_path(ref.id)).note}
        if role == "ppl":
            tokenizer = open_tokenizer(ref, standins=self.standins).tokenizer
            about["template"] = template_version(tokenizer, self.template)
        if role == "reward":
            from transformers import AutoConfig

            from .reward import form_of, note_of

            folder = hub.fetch(resolved).folder
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            about["note"] = note_of(config, self.reward_form)
            if self.reward_form not in ("", form_of(config)):
                about["form"] = self.reward_form
        return about


class Scorer:
    """Indicators with their models, opened once, for any number of tables.

    models : role ("base", "ppl", "reward", "unieval", "encoder") -> ModelRef
    indicators : names of indicators or of their columns; None for all that need no model and
        those of the paper whose model is there
    bank : folder of the score cache, None to keep nothing
    reference : for pool-relative indicators; None until `make_reference`
    options : of `Models`
    """

    def __init__(
        self,
        models: Mapping[str, ModelRef] | None = None,
        *,
        indicators: Sequence[str] | None = None,
        bank: str | Path | None = None,
        reference: Reference | None = None,
        **options,
    ) -> None:
        self.models = Models(models or {}, **options)
        self.indicators = chosen_indicators(indicators, self.models.refs)
        self.models.asked = frozenset(one.role for one in self.indicators) & set(self.models.refs)
        self.bank = Path(bank) if bank is not None else None
        self.reference = reference
        self._shares = _shares(self._passes)
        self._file_hashes: dict[str, str] = {}

    def score(
        self, table: pd.DataFrame | ParsedTable, *, progress: bool | tqdm = False
    ) -> pd.DataFrame:
        """Score every row of a record table, in its order.

        progress : whether to show a bar; or the one (`job_bar`) of the whole job, of which this
            table is a part
        returns : id, source, file, file_sha256, row (part, where the table has it), row_hash, one
            column an indicator column, and `reasons`: JSON, column -> why it is NaN or what was
            cut to get it ("row" for a row that could not be read), "" where all is fine.
            `.attrs["indicators"]` tells for each column version, model, revision, dtype, stand_in,
            template and reference.
        Raises InstructMiningError for a pool-relative indicator without a reference.
        """
        rows = _parsed(table)
        with (job_bar(len(rows.conversations), show=progress) if isinstance(progress, bool)
              else nullcontext(progress)) as bar:  # fmt: skip
            columns = self._columns(rows, bar)
        out = self._identity_columns(rows)
        reasons = [{"row": c.problem} if c.problem else {} for c in rows.conversations]
        for name, column in columns.items():
            out[name] = np.full(len(reasons), np.nan)
            out[name][rows.readable] = column.values
            for i, reason in zip(rows.readable, column.reasons, strict=True):
                if reason:
                    reasons[i][name] = reason
        out["reasons"] = [json.dumps(r, ensure_ascii=False) if r else "" for r in reasons]
        frame = pd.DataFrame(out)
        frame.attrs["indicators"] = self.describe()
        return frame

    def make_reference(
        self, table: pd.DataFrame | ParsedTable, *, size: int = REFERENCE_ROWS, seed: int = 0,
        progress: bool = False,
    ) -> Reference:  # fmt: skip
        """Draw the reference of pool-relative indicators from a pool, and use it from now on.

        With a `bank` its embeddings are kept there: the same rows and the same encoder give the
        same embeddings, so no encoder is opened the next time.
        """
        from .neighbours import make_reference, reference_hash, sample_reference

        rows = _parsed(table)
        hashes = [rows.row_hashes[i] for i in rows.readable]
        chosen = [rows.readable[i] for i in sample_reference(hashes, size, seed)]
        names = tuple(rows.row_hashes[i] for i in chosen)
        who = self.models.key("encoder")
        path = None
        if self.bank is not None:
            kept = f"{reference_hash(names)}-{key_hash(who)}.npz"
            path = self.bank / "references" / kept
        found = _kept_reference(path)
        if found is None or found.row_hashes != names:
            conversations = [rows.conversations[i] for i in chosen]
            encoder = self.models.open("encoder")
            found = make_reference(encoder, conversations, names, progress=progress)
            if path is not None:
                found.save(path)
        self.reference = replace(found, model=who["model"])  # the same weights may lie elsewhere
        return self.reference

    def estimate_seconds(
        self, table: pd.DataFrame | ParsedTable, *, sample: int = 64
    ) -> dict[str, float]:
        """Seconds that each indicator would take on `table`, from a timed sample of its rows.

        Scaled by characters. Rows that the cache has cost nothing, and where it has them all no
        model is opened; else it is opened before the clock starts. Indicators that share a pass
        are one entry ("ppl + ifd"). The bar of later tables is divided by these times.
        """
        rows = _parsed(table)
        random = np.random.default_rng(0)
        seconds = {}
        for each in self._passes:
            todo = rows.readable
            if self._cached(each):
                known = self._known(each, rows.row_hashes)
                lacking = _lacking(known, [rows.row_hashes[i] for i in todo])
                todo = [todo[i] for wanted in lacking.values() for i in wanted]
            some = [rows.conversations[todo[i]] for i in random.permutation(len(todo))[:sample]]
            whole = sum(characters(rows.conversations[i]) for i in todo)
            share = whole / max(1, sum(map(characters, some)))
            seconds[_name(each)] = self._timed(each, some) * share if some else 0.0
        self._shares = _shares(self._passes, seconds)
        return seconds

    def describe(self) -> dict[str, dict[str, Any]]:
        """For each column: indicator, version, model and what it depends on, reference."""
        return {
            column: {**self._key(i), **self.models.describe(i.role)}
            for i in self.indicators
            for column in i.columns
        }

    def keys(self) -> list[dict[str, Any]]:
        """The cache's key of each indicator that goes through it."""
        return [self._key(i) for each in self._passes if self._cached(each) for i in each]

    @cached_property
    def _passes(self) -> list[Pass]:
        """The indicators, those of one shared function together."""
        found: dict[str, Pass] = {}
        for i in self.indicators:
            name = i.where if i.shared else i.name
            found[name] = (*found.get(name, ()), i)
        return list(found.values())

    @cached_property
    def cache(self) -> ScoreCache | None:
        """What was computed before and what is; another engine may put its own in its place."""
        return None if self.bank is None else ScoreCache(self.bank)

    def _cached(self, each: Pass) -> bool:
        """Whether a pass goes through the cache: what needs no model is computed as fast."""
        return each[0].role in self.models.refs

    def _columns(self, rows: ParsedTable, bar: tqdm) -> dict[str, Column]:
        """Every indicator's columns over the readable rows, in the order of the indicators."""
        conversations = [rows.conversations[i] for i in rows.readable]
        names = [rows.row_hashes[i] for i in rows.readable]
        columns: dict[str, Column] = {}
        for each in self._passes:
            _advance(bar, self._shares[_name(each)], len(rows.row_hashes) - len(names), known=True)
            if self._cached(each):
                columns |= self._through_cache(each, conversations, names, bar)
            else:
                columns |= each[0].load()(conversations, **self._options(each[0], names))
                _advance(bar, self._shares[_name(each)], len(names))
        return {column: columns[column] for i in self.indicators for column in i.columns}

    def _through_cache(
        self, each: Pass, conversations: Sequence[CheckedConversation], names: Sequence[str],
        bar: tqdm,
    ) -> dict[str, Column]:  # fmt: skip
        """The columns of a pass: what is known, and the distinct rows that are not, by blocks.

        Longest first: rows of one length share a block, so batches inside it have little padding,
        and the time left is never told too short.
        """
        known = self._known(each, names)
        lacking = _lacking(known, names)
        share, todo = self._shares[_name(each)], sum(map(len, lacking.values()))
        _advance(bar, share, len(names) - todo, known=True)
        for wanted, places in lacking.items():
            self.models.open(each[0].role)  # before a block is timed
            sizes = np.array([characters(conversations[i]) for i in places], dtype=np.int64)
            for block in blocks(sizes):
                here = [conversations[places[i]] for i in block]
                hashes = [names[places[i]] for i in block]
                options = self._options(each[0], hashes)
                found = _computed([each[j] for j in wanted], here, options)
                for j, rows in zip(wanted, found, strict=True):
                    scores = dict(zip(hashes, rows, strict=True))
                    known[j] |= scores
                    self._keep(each[j], scores)
                done = sizes[block].sum() / max(1, sizes.sum())
                _advance(bar, share, len(places) * done)
        columns = {}
        for indicator, scores in zip(each, known, strict=True):
            rows = [scores[name] for name in names]
            for c, column in enumerate(indicator.columns):
                values = np.array([values[c] for values, _ in rows], dtype=np.float64)
                columns[column] = Column(values, [reasons[c] for _, reasons in rows])
        return columns

    def _known(self, each: Pass, names: Sequence[str]) -> list[dict[str, Scores]]:
        if self.cache is None:
            return [{} for _ in each]
        return [self.cache.get(self._key(i), names) for i in each]

    def _keep(self, indicator: Indicator, scores: Mapping[str, Scores]) -> None:
        """Store rows for good, but for those whose reason is a passing one."""
        if self.cache is not None:
            self.cache.add(self._key(indicator), {
                name: (values, reasons) for name, (values, reasons) in scores.items()
                if not any(_RETRIED in reason for reason in reasons)
            })  # fmt: skip

    def _key(self, indicator: Indicator) -> dict[str, Any]:
        """What a value depends on, apart from the row."""
        with_model = indicator.role in self.models.refs
        version = indicator.version if with_model or not indicator.role_optional \
            else indicator.version_without
        key = {"indicator": indicator.name, "version": version, **self.models.key(indicator.role)}
        if indicator.pool_relative:
            key["reference"] = self._reference_of(indicator).describe()
        return key

    def _reference_of(self, indicator: Indicator) -> Reference:
        if self.reference is None:
            raise InstructMiningError(
                f"{indicator.name} is relative to a reference set: give `reference`, or call "
                "`make_reference` with the pool that the rule is fitted on"
            )
        return self.reference

    def _options(self, indicator: Indicator, names: Sequence[str]) -> dict[str, Any]:
        """Keywords of an indicator's function, its model opened."""
        options: dict[str, Any] = {"model": self.models.open(indicator.role)}
        if indicator.pool_relative:
            options |= {"reference": self._reference_of(indicator), "row_hashes": list(names)}
        return options

    def _timed(self, each: Pass, conversations: Sequence[CheckedConversation]) -> float:
        """Seconds of a pass over these rows; a call on the first one warms it up before."""
        _computed(each, conversations[:1], self._options(each[0], [""]))
        options = self._options(each[0], [""] * len(conversations))
        start = time.perf_counter()
        _computed(each, conversations, options)
        return time.perf_counter() - start

    def _identity_columns(self, rows: ParsedTable) -> dict[str, Any]:
        table, out = rows.table, {}
        for column in ("id", "source", "file"):
            found = table[column] if column in table else [""] * len(table)
            out[column] = [clean_text(str(value)) for value in found]
        known = table["file_sha256"] if "file_sha256" in table else map(self.file_hash, out["file"])
        out["file_sha256"] = list(known)
        out["row"] = list(table["row"] if "row" in table else range(len(table)))
        if "part" in table:
            out["part"] = list(table["part"])
        out["row_hash"] = rows.row_hashes
        return out

    def file_hash(self, name: str) -> str:
        """sha256 of a file, taken once; "" for what is none."""
        if name not in self._file_hashes:
            is_file = bool(name) and name != "-" and Path(name).is_file()
            self._file_hashes[name] = file_sha256(name) if is_file else ""
        return self._file_hashes[name]


def score(
    table: pd.DataFrame, models: Mapping[str, ModelRef] | None = None, *, progress: bool = False,
    **options,
) -> pd.DataFrame:
    """Open models, score one table, and return its frame; `options` and columns as in `Scorer`.

    Without a `reference` a seeded sample of the table itself is taken for pool-relative indicators.
    """
    scorer, rows = Scorer(models, **options), read_rows(table)
    if scorer.reference is None and any(i.pool_relative for i in scorer.indicators):
        scorer.make_reference(rows, progress=progress)
    return scorer.score(rows, progress=progress)


def job_bar(total: int | None, *, show: bool = True) -> tqdm:
    """A bar for a whole scoring job, of `total` rows (None: not known): rows a second, time left.

    A row counts as done by parts, one for each indicator, as large as its share of the time.
    """
    return tqdm(
        total=total, desc="score", unit="row", unit_scale=True, disable=not show, smoothing=0,
        mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS, miniters=0,
    )  # fmt: skip


def blocks(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of rows block by block, longest first, each block as large as time allows.

    sizes : shape (n,), characters of each row. The time that the caller takes for a block tells
    how many characters fit into `BLOCK_SECONDS`.
    """
    order = np.argsort(-sizes, kind="stable")
    first, rows = 0, min(FIRST_ROWS, BLOCK_ROWS)
    while first < len(order):
        block = order[first : first + rows]
        start = time.perf_counter()
        yield block
        seconds = time.perf_counter() - start
        first += len(block)
        affordable = BLOCK_SECONDS * int(sizes[block].sum()) / max(seconds, 1e-9)
        fitting = np.searchsorted(np.cumsum(sizes[order[first:]]), affordable, side="right")
        rows = int(np.clip(fitting, 1, min(BLOCK_ROWS, 4 * len(block))))


def characters(conversation: CheckedConversation) -> int:
    """Characters of all its messages."""
    return sum(len(m["content"]) for m in conversation.messages)


def _parsed(table: pd.DataFrame | ParsedTable) -> ParsedTable:
    return table if isinstance(table, ParsedTable) else read_rows(table)


def _computed(
    each: Sequence[Indicator], conversations: Sequence[CheckedConversation], options: Mapping
) -> list[list[Scores]]:
    """Values and reasons of each indicator, row by row, from one call of their function."""
    if each[0].shared:
        options = {**options, "columns": [c for i in each for c in i.columns]}
    columns = each[0].load()(conversations, **options)
    found = []
    for indicator in each:
        own = [columns[name] for name in indicator.columns]
        values = zip(*(column.values.tolist() for column in own), strict=True)
        found.append(list(zip(values, zip(*(c.reasons for c in own), strict=True), strict=True)))
    return found


def _lacking(
    known: Sequence[Mapping[str, Scores]], names: Sequence[str]
) -> dict[tuple[int, ...], list[int]]:
    """Distinct rows at their first place, grouped by the indicators that do not know them.

    known : one mapping an indicator of a pass; returns its numbers -> positions in `names`
    """
    found: dict[tuple[int, ...], list[int]] = {}
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    for name in dict.fromkeys(names):
        wanted = tuple(j for j, scores in enumerate(known) if name not in scores)
        if wanted:
            found.setdefault(wanted, []).append(first[name])
    return found


def _kept_reference(path: Path | None) -> Reference | None:
    """A kept reference; None where there is none, or only a broken file (it is made anew)."""
    from .neighbours import Reference

    try:
        return Reference.read(path) if path is not None else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _name(each: Pass) -> str:
    return " + ".join(i.name for i in each)


def _shares(
    passes: Sequence[Pass], seconds: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Each pass's part of a row, by its measured time or by a rough guess; they sum to 1."""
    if not (seconds and sum(seconds.values()) > 0):
        seconds = {_name(each): 1.0 if each[0].role and not each[0].role_optional else _MODEL_FREE
                   for each in passes}  # fmt: skip
    least = _LEAST * sum(seconds.values())
    cost = {name: max(part, least) for name, part in seconds.items()}
    whole = sum(cost.values())
    return {name: part / whole for name, part in cost.items()}


def _advance(bar: tqdm, share: float, rows: float, *, known: bool = False) -> None:
    """Move by the rows that a pass has finished; what was `known` does not count in the rate."""
    if not bar.disable:
        if known:
            bar.initial += share * rows
        bar.update(share * rows)
