"""`instructmining score`: files in, one score table out, a chunk of rows in memory at a time.

The reference set of `score`: from a file, a profile's own, or drawn from the scored files.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core import files
from instructmining_core.data.readers import count_records
from instructmining_core.data.records import Problem, RecordError, iter_records, row_hash
from instructmining_core.indicators import Indicator
from instructmining_core.indicators.progress import Progress
from instructmining_core.indicators.score_table import ScoreWriter
from instructmining_core.indicators.scorer import Scorer

from .models import asked_form, asked_models, opened_study, standin_folder

REFERENCE_SEED = 0


def set_reference(args: argparse.Namespace, scorer: Scorer, piped: Path | None = None) -> None:
    """Give the scorer the reference that the options ask for; one that is drawn is kept beside OUT.

    piped : standard input as a file, where it is among the scored files
    """
    from instructmining_core.config import REFERENCE_ROWS
    from instructmining_core.indicators.neighbours import Reference

    if args.reference:
        scorer.reference = Reference.read(Path(args.reference))
        return
    show = not args.quiet
    if args.profile:
        study = opened_study(args.profile)
        rows, seed = study.data.candidates, study.profile.data.seed
        size = min(study.profile.models.reference_rows, len(rows))
        reference = scorer.make_reference(rows, size=size, seed=seed, progress=show)
    else:
        rows = _bottom_rows(args, REFERENCE_ROWS, piped)
        reference = scorer.make_reference(rows, seed=REFERENCE_SEED, progress=show)
    kept = Path(f"{args.out}.reference.npz")
    reference.save(kept)
    sys.stderr.write(
        f"knn_6 is measured against {len(reference.row_hashes)} rows, kept in {kept}; score other "
        f"data with --reference {kept}\n"
    )


def _bottom_rows(args: argparse.Namespace, size: int, piped: Path | None) -> pd.DataFrame:
    """A sample of distinct rows in one pass: those of the lowest hashes, whatever their order."""
    heap: list[tuple[int, str, list]] = []
    inside: set[str] = set()
    for messages in _conversations(args, piped):
        own = row_hash(messages)
        if own in inside:
            continue
        salted = hashlib.sha256(f"{REFERENCE_SEED} {own}".encode()).digest()
        entry = (-int.from_bytes(salted[:8]), own, messages)
        inside.add(own)
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            inside.discard(heapq.heappushpop(heap, entry)[1])
    return pd.DataFrame({"messages": [messages for *_, messages in heap]})


def _conversations(args: argparse.Namespace, piped: Path | None):
    """The messages of every readable record of all files in turn."""
    for name in args.files:
        stream = piped.open("rb", buffering=0) if name == "-" else None
        for table, _ in iter_records(
            name, on_error="collect", paths=args.paths, revision=args.revision,
            chunk_rows=args.chunk_rows, stdin=stream,
        ):  # fmt: skip
            yield from table["messages"]


LONG_JOB = 60  # seconds above which the estimate is told before the start
SHOWN = 20  # problems printed; the file beside the table lists all


def score(args: argparse.Namespace) -> None:
    """Score the named files and write the table; progress and problems go to standard error."""
    if args.chunk_rows < 1:
        raise ValueError(f"--chunk-rows is {args.chunk_rows}; it must be above 0")
    if len(set(args.files)) < len(args.files):
        raise RecordError("a file is named twice; each row is scored once")
    if Path(args.out).suffix != ".parquet":
        raise ValueError(f"{args.out}: a score table is Parquet; name it with .parquet")
    with tempfile.TemporaryDirectory() as folder:
        piped = _spooled(Path(folder)) if "-" in args.files else None
        scorer = make_scorer(args, piped)
        tables = _Tables(args, piped)
        tally = _run(args, scorer, tables)
    _report(args, tally, tables.problems)


def make_scorer(args: argparse.Namespace, piped: Path | None = None) -> Scorer:
    """The scorer that the options ask for, stand-ins built where they are allowed.

    piped : standard input as a file, where it is among the scored files
    """
    names = args.indicators.split(",") if args.indicators else None
    roles = asked_models(args.profile, args.models)
    wanted = Scorer(roles, indicators=names).indicators
    roles = {role: ref for role, ref in roles.items() if role in {i.role for i in wanted}}
    standins = standin_folder(args.profile, roles, args.allow_standins)
    bank = args.bank or (files.cache() / "bank" if _with_models(wanted) else None)
    form = asked_form(args.profile, args.reward_form)
    scorer = Scorer(roles, indicators=names, bank=bank, standins=standins, reward_form=form)
    if any(i.pool_relative for i in scorer.indicators):
        set_reference(args, scorer, piped)
    return scorer


def _with_models(indicators: Sequence[Indicator]) -> bool:
    return any(one.role and not one.role_optional for one in indicators)


class _Tables:
    """The record tables of all files in turn, with what was malformed in them."""

    def __init__(self, args: argparse.Namespace, piped: Path | None) -> None:
        self.args, self.piped, self.problems = args, piped, []
        counts = [count_records(piped if name == "-" else name) for name in args.files]
        self.total = sum(counts) if None not in counts else None
        self.piped_sha256 = ""
        if piped:
            with piped.open("rb") as stream:
                self.piped_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    def __iter__(self) -> Iterator[pd.DataFrame]:
        keep = "keep" if self.args.on_error == "collect" else "raise"
        for name in self.args.files:
            stream = self.piped.open("rb", buffering=0) if name == "-" else None
            for table, problems in iter_records(
                name, chunk_rows=self.args.chunk_rows, revision=self.args.revision,
                on_error=keep, paths=self.args.paths, stdin=stream,
            ):  # fmt: skip
                self.problems += problems
                yield table


def _spooled(folder: Path) -> Path:
    """Standard input as a file: it is hashed and counted before it is scored."""
    kept = folder / "stdin"
    with kept.open("wb") as target:
        while block := sys.stdin.buffer.read(1 << 20):
            target.write(block)
    return kept


def _run(args: argparse.Namespace, scorer: Scorer, tables: _Tables) -> dict[str, list]:
    tally: dict[str, list] = {}
    start = time.perf_counter()
    with ScoreWriter(args.out) as writer, ExitStack() as shown:
        for number, table in enumerate(tables):
            if number == 0:
                reading = time.perf_counter() - start
                seconds = _estimate(scorer, table, tables.total, reading)
                bar = shown.enter_context(Progress(
                    scorer.indicators, tables.total, seconds=seconds, show=not args.quiet
                ))  # fmt: skip
            frame = scorer.score(table, progress=bar)
            if tables.piped_sha256:
                piped = frame["file"] == "-"
                frame["file_sha256"] = frame["file_sha256"].mask(piped, tables.piped_sha256)
            frame.attrs["read"] = {"paths": args.paths}
            writer.write(frame)
            for column in scorer.describe():
                tally.setdefault(column, []).append(frame[column].to_numpy(np.float32))
        if not tally:
            raise RecordError(f"no records in {', '.join(args.files)}: nothing to score")
    return tally


def _estimate(
    scorer: Scorer, table: pd.DataFrame, total: int | None, reading: float
) -> Mapping[str, float]:
    """Seconds of each indicator on `table`, from a timed sample; told where the job is a long one.

    reading : seconds that reading `table` took
    """
    rows = total or len(table)
    sample = int(np.clip(rows // 100, 4, 64))
    share = rows / max(len(table), 1)
    found = scorer.estimate_seconds(table, sample=sample)
    seconds = {name: part * share for name, part in {"(reading)": reading, **found}.items()}
    if sum(seconds.values()) >= LONG_JOB:
        of = f"{rows:,} rows" if total else f"the first {rows:,} rows (the total is not known)"
        lines = [f"estimated time for {of}, from {sample} of them; "
                 "what is in the bank is not redone:"]  # fmt: skip
        lines += [f"  {name:<12} {_duration(s)}" for name, s in seconds.items()]
        _say("\n".join([*lines, f"  {'all':<12} {_duration(sum(seconds.values()))}"]))
    return found


def _report(args: argparse.Namespace, tally: dict[str, list], problems: list[Problem]) -> None:
    columns = {name: np.concatenate(parts) for name, parts in tally.items()}
    table = pd.DataFrame(
        {name: {"values": int(np.isfinite(v).sum()), "NaN": int(np.isnan(v).sum()), **_spread(v)}
         for name, v in columns.items()}
    ).T.astype({"values": int, "NaN": int})  # fmt: skip
    rows = len(next(iter(columns.values())))
    sys.stdout.write(f"{table.to_string(float_format=lambda x: f'{x:.4g}')}\n\n")
    sys.stdout.write(f"{rows:,} rows in {args.out}\n")
    listed = Path(f"{args.out}.problems.jsonl")
    listed.unlink(missing_ok=True)
    if problems:
        text = "".join(json.dumps(vars(problem)) + "\n" for problem in problems)
        listed.write_text(text, encoding="utf-8")
        shown = [f"  {problem}" for problem in problems[:SHOWN]]
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        _say("\n".join([f"{len(problems)} malformed records, kept as rows without values and "
                        f"listed in {listed}:", *shown, *more]))  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, float]:
    found = values[np.isfinite(values)]
    if not len(found):
        return dict.fromkeys(("mean", "1 %", "median", "99 %"), np.nan)
    low, middle, high = np.percentile(found, (1, 50, 99))
    return {"mean": float(found.mean(dtype=np.float64)), "1 %": low, "median": middle, "99 %": high}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
