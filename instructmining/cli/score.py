"""`instructmining score`: files in, one score table out, a chunk of rows in memory at a time."""

from __future__ import annotations

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
from instructmining_core.config import REFERENCE_ROWS, InstructMiningError, ModelRef
from instructmining_core.data.readers import count_records
from instructmining_core.data.records import Problem, iter_records
from instructmining_core.indicators.score_table import ScoreWriter
from instructmining_core.indicators.scorer import ParsedTable, Scorer, job_bar, read_rows

from .models import asked_template, opened_study, standin_folder

REFERENCE_SEED = 0
LONG_JOB = 60  # seconds above which the estimate is told before the start
SHOWN = 20  # problems printed; the file beside the table lists all


class Inputs:
    """What is scored: record tables of all files in turn, with what was malformed in them.

    names : files, hub sets, or "-" for standard input, which is kept as a file inside the block
    out : the score table to be written
    paths : of OASST trees, "best" or "all"; revision : of hub sets
    on_error : "collect" keeps malformed records as rows without values, "raise" stops at the first
    """

    def __init__(
        self, names: Sequence[str], out: str, paths: str, revision: str, on_error: str,
        chunk_rows: int,
    ) -> None:  # fmt: skip
        if len(set(names)) < len(names):
            raise InstructMiningError("a file is named twice; each row is scored once")
        if Path(out).suffix != ".parquet":
            raise InstructMiningError(f"{out}: a score table is Parquet; name it with .parquet")
        for name in names:
            if Path(name).exists() and Path(out).exists() and Path(name).samefile(out):
                raise InstructMiningError(
                    f"{out} is one of the files to be scored, and would be overwritten; "
                    "name another file with -o"
                )
            if "=" in name and not Path(name).exists():
                raise InstructMiningError(
                    f"there is no file {name}; if it is a model, give --models before each: "
                    f"--models A=x --models {name}"
                )
        self.names, self.out, self.paths, self.revision = names, out, paths, revision
        self.on_error, self.chunk_rows = on_error, chunk_rows
        self.problems: list[Problem] = []
        self.piped_sha256 = ""
        self._open = ExitStack()

    def __enter__(self) -> Inputs:
        if "-" in self.names:
            folder = self._open.enter_context(tempfile.TemporaryDirectory())
            self._piped = _spooled(Path(folder))
            with self._piped.open("rb") as stream:
                self.piped_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        counts = [count_records(self._piped if name == "-" else name) for name in self.names]
        self.total = sum(counts) if None not in counts else None
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def tables(self) -> Iterator[pd.DataFrame]:
        """Record tables of at most `chunk_rows` rows; malformed records go to `problems`."""
        for table, problems in self._read("keep" if self.on_error == "collect" else "raise"):
            self.problems += problems
            yield table

    def sample(self, size: int) -> pd.DataFrame:
        """Distinct well-formed rows in one pass: those of the lowest hashes, whatever the order."""
        heap: list[tuple[int, str, list]] = []
        inside: set[str] = set()
        for table, _ in self._read("collect"):
            for own, messages in zip(table["row_hash"], table["messages"], strict=True):
                if own in inside:
                    continue
                salted = hashlib.sha256(f"{REFERENCE_SEED} {own}".encode()).digest()
                entry = (-int.from_bytes(salted[:8]), own, messages)
                inside.add(own)
                if len(heap) < size:
                    heapq.heappush(heap, entry)
                else:
                    inside.discard(heapq.heappushpop(heap, entry)[1])
        return pd.DataFrame([(own, messages) for _, own, messages in heap],
                            columns=["row_hash", "messages"])  # fmt: skip

    def _read(self, on_error: str) -> Iterator[tuple[pd.DataFrame, list[Problem]]]:
        for name in self.names:
            stream = self._piped.open("rb", buffering=0) if name == "-" else None
            yield from iter_records(
                name, chunk_rows=self.chunk_rows, revision=self.revision, on_error=on_error,
                paths=self.paths, stdin=stream,
            )  # fmt: skip


def _spooled(folder: Path) -> Path:
    """Standard input as a file: it is hashed and counted before it is scored."""
    kept = folder / "stdin"
    with kept.open("wb") as target:
        while block := sys.stdin.buffer.read(1 << 20):
            target.write(block)
    return kept


def open_scorer(
    roles: Mapping[str, ModelRef], names: Sequence[str] | None, *, profile: str | None,
    bank: Path | None, form: str, allow_standins: bool,
) -> Scorer:  # fmt: skip
    """The scorer of the chosen indicators, stand-ins built where they are needed and allowed."""
    scorer = Scorer(
        roles, indicators=names, bank=bank, reward_form=form, template=asked_template(profile)
    )
    needed = {one.role for one in scorer.indicators}
    used = {role: ref for role, ref in roles.items() if role in needed}
    scorer.models.standins = standin_folder(used, allow_standins)
    if bank is None and any(one.role and not one.role_optional for one in scorer.indicators):
        scorer.bank = files.cache() / "bank"
    return scorer


def reference_of(
    scorer: Scorer, inputs: Inputs, given: Path | None, profile: str | None, *, show: bool
) -> None:
    """Give the scorer its reference: a file's, a profile's own, or one drawn from the inputs.

    One that is drawn is kept beside the score table, and told.
    """
    from instructmining_core.indicators.neighbours import Reference

    if given:
        scorer.reference = Reference.read(given)
        return
    if profile:
        study = opened_study(profile)
        rows, seed = study.data.candidates, study.profile.data.seed
        size = min(study.profile.models.reference_rows, len(rows))
        reference = scorer.make_reference(rows, size=size, seed=seed, progress=show)
    else:
        rows = inputs.sample(REFERENCE_ROWS)
        reference = scorer.make_reference(rows, seed=REFERENCE_SEED, progress=show)
    kept = Path(f"{inputs.out}.reference.npz")
    reference.save(kept)
    _say(f"knn_6 is measured against {len(reference.row_hashes)} rows, kept in {kept}; score other "
         f"data with --reference {kept}")  # fmt: skip


def score_files(scorer: Scorer, inputs: Inputs, *, show: bool) -> None:
    """Score all inputs and write the table; progress and problems go to standard error."""
    tally: dict[str, list] = {}
    start = time.perf_counter()
    with ScoreWriter(inputs.out) as writer, ExitStack() as shown:
        for number, rows in enumerate(map(read_rows, inputs.tables())):
            if number == 0:
                _estimate(scorer, rows, inputs.total, time.perf_counter() - start)
                bar = shown.enter_context(job_bar(inputs.total, show=show))
            frame = scorer.score(rows, progress=bar)
            if inputs.piped_sha256:
                piped = frame["file"] == "-"
                frame["file_sha256"] = frame["file_sha256"].mask(piped, inputs.piped_sha256)
            frame.attrs["read"] = {"paths": inputs.paths}
            writer.write(frame)
            for column in scorer.describe():
                tally.setdefault(column, []).append(frame[column].to_numpy(np.float32))
        if not tally:
            raise InstructMiningError(f"no records in {', '.join(inputs.names)}: nothing to score")
    _report(inputs, tally)


def _estimate(scorer: Scorer, first: ParsedTable, total: int | None, reading: float) -> None:
    """Time a sample of the first rows, and tell what the job will take where it is a long one.

    reading : seconds that reading `first` took
    """
    rows = total or len(first.table)
    sample = int(np.clip(rows // 100, 4, 64))
    share = rows / max(len(first.table), 1)
    found = scorer.estimate_seconds(first, sample=sample)
    seconds = {name: part * share for name, part in {"(reading)": reading, **found}.items()}
    if sum(seconds.values()) >= LONG_JOB:
        of = f"{rows:,} rows" if total else f"the first {rows:,} rows (the total is not known)"
        lines = [f"estimated time for {of}, from {sample} of them; "
                 "what is in the bank is not redone:"]  # fmt: skip
        lines += [f"  {name:<12} {_duration(s)}" for name, s in seconds.items()]
        _say("\n".join([*lines, f"  {'all':<12} {_duration(sum(seconds.values()))}"]))


def _report(inputs: Inputs, tally: dict[str, list]) -> None:
    columns = {name: np.concatenate(parts) for name, parts in tally.items()}
    table = pd.DataFrame(
        {name: {"values": int(np.isfinite(v).sum()), "NaN": int(np.isnan(v).sum()), **_spread(v)}
         for name, v in columns.items()}
    ).T.astype({"values": int, "NaN": int})  # fmt: skip
    rows = len(next(iter(columns.values())))
    sys.stdout.write(f"{table.to_string(float_format=lambda x: f'{x:.4g}')}\n\n")
    sys.stdout.write(f"{rows:,} rows in {inputs.out}\n")
    listed = Path(f"{inputs.out}.problems.jsonl")
    listed.unlink(missing_ok=True)
    problems = inputs.problems
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
