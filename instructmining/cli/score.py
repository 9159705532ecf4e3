"""`instructmining score`: files in, one score table out, a chunk of rows in memory at a time."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from instructmining_core import files
from instructmining_core.config import REFERENCE_ROWS, InstructMiningError
from instructmining_core.data.formats import NAMES
from instructmining_core.data.readers import count_records
from instructmining_core.data.records import Problem, iter_records
from instructmining_core.indicators.score_table import ScoreWriter
from instructmining_core.indicators.scorer import ParsedTable, Scorer, job_bar, read_rows

from ..profile import load_profile
from .models import asked_models, folder_notes, opened_study, standin_folder

REFERENCE_SEED = 0
LONG_JOB = 60  # seconds above which the estimate is told before the start
SHOWN = 20  # kinds of problems printed; the file beside the table lists all
MARKUP = {  # note -> what is looked for in answers
    "hold HTML, whose tags count as words and tokens":
        re.compile(r"</?(?:p|div|br|a|span|table|t[dr]|[uo]l|li|h[1-6]|img)\b[^>]*>"),
    "spell marks of models (<|endoftext|>, </s>, [PAD]), which stay text here but may end or part "
    "texts for reward models, UniEval and encoders":
        re.compile(r"<\|\w+\|>|</?s>|\[/?(?:INST|PAD|SEP|CLS|MASK)\]"
                   r"|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"),
}  # fmt: skip
Scored = Iterator[tuple[ParsedTable, pd.DataFrame]]


class Inputs:
    """What is scored: record tables of all files in turn, with what was malformed in them.

    names : files, hub sets, or "-" for standard input, which is kept as a file inside the block
    out : the score table to be written
    paths : of OASST trees, "best" or "all"; revision : of hub sets
    on_error : "collect" keeps malformed records as rows without values, "raise" stops at the first
    columns : "question=A,answer=B": which of the records' columns hold what
    encoding : of text that is not UTF-8
    """

    def __init__(
        self, names: Sequence[str], out: str, paths: str, revision: str, on_error: str,
        chunk_rows: int, columns: str | None, encoding: str | None,
    ) -> None:  # fmt: skip
        if len(set(names)) < len(names):
            raise InstructMiningError("a file is named twice; each row is scored once")
        if Path(out).suffix != ".parquet":
            raise InstructMiningError(f"{out}: a score table is Parquet; name it with .parquet")
        files.refuse_overwrite(out, names)
        for name in names:
            if "=" in name and not Path(name).exists():
                raise InstructMiningError(
                    f"there is no file {name}; if it is a model, give --models before each: "
                    f"--models A=x --models {name}"
                )
        self.names, self.out, self.revision = names, out, revision
        self.on_error, self.chunk_rows = on_error, chunk_rows
        asked = {"columns": asked_columns(columns), "encoding": encoding}
        self.read = {"paths": paths, **{name: one for name, one in asked.items() if one}}
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()  # what was not read, and in how many records
        self.piped_sha256: dict[str, str] = {}
        self._piped: dict[str, Path] = {}
        self._open = ExitStack()

    def __enter__(self) -> Inputs:
        for name in self.names:  # a pipe (`<(zcat f)`) can be read but once, as "-" can
            if name == "-" or Path(name).is_fifo():
                folder = self._open.enter_context(tempfile.TemporaryDirectory())
                kept = self._piped[name] = _spooled(name, Path(folder))
                self.piped_sha256[name] = files.file_sha256(kept)
        coding = self.read.get("encoding")
        counts = [count_records(self._piped.get(name, name), coding) for name in self.names]
        self.total = sum(counts) if None not in counts else None
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def tables(self) -> Iterator[pd.DataFrame]:
        """Record tables of at most `chunk_rows` rows; malformed records go to `problems`."""
        for table, problems in self._read("keep" if self.on_error == "collect" else "raise"):
            self.problems += problems
            self.notes.update(table.attrs.get("notes", {}))
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
            stream = self._piped[name].open("rb", buffering=0) if name in self._piped else None
            yield from iter_records(
                name, chunk_rows=self.chunk_rows, revision=self.revision, on_error=on_error,
                stdin=stream, **self.read,
            )  # fmt: skip


def asked_columns(text: str | None) -> dict[str, str]:
    """Our names of fields -> the records' own, from "question=A,answer=B"."""
    columns = {}
    for pair in text.split(",") if text else ():
        ours, _, theirs = pair.partition("=")
        if ours.strip().lower() not in NAMES or not theirs:
            raise InstructMiningError(
                f"--columns {pair!r}: write OURS=YOURS, as in question=A,answer=B; ours are "
                "question, context, answer, system, messages, text, chosen, id and the other names "
                "that are read"
            )
        columns[ours.strip().lower()] = theirs
    return columns


def _spooled(name: str, folder: Path) -> Path:
    """A pipe as a file: it is hashed and counted before it is scored."""
    kept = folder / "stdin"
    with kept.open("wb") as target, ExitStack() as opened:
        source = sys.stdin.buffer if name == "-" else opened.enter_context(open(name, "rb"))
        shutil.copyfileobj(source, target, 1 << 20)
    return kept


def open_scorer(
    models: Sequence[str], names: Sequence[str] | None, *, profile: str | None, bank: Path | None,
    form: str | None, allow_standins: bool,
) -> Scorer:  # fmt: skip
    """The scorer of the chosen indicators, stand-ins built where they are needed and allowed.

    models : "ROLE=ID", in place of the profile's; form : of the reward model's input, likewise
    """
    known, roles = load_profile(profile) if profile else None, asked_models(profile, models)
    scorer = Scorer(
        roles, indicators=names, bank=bank,
        reward_form=form or (known.models.reward_form if known else ""),
        template=known.finetune.template if known else "auto",
    )  # fmt: skip
    needed = {one.role for one in scorer.indicators}
    used = {role: ref for role, ref in roles.items() if role in needed}
    scorer.models.standins = standin_folder(used, allow_standins)
    for note in folder_notes(used) if used else ():
        _say(note)
    if bank is None and any(one.role and not one.role_optional for one in scorer.indicators):
        scorer.bank = files.cache() / "bank"
    return scorer


def reference_of(
    scorer: Scorer, inputs: Inputs, given: Path | None, profile: str | None, *, show: bool
) -> None:
    """Give the scorer its reference: a file's, a profile's own, or one drawn from the inputs.

    A profile whose rule is published brings it along, and its data need not be there. One that is
    drawn is kept beside the score table, and told.
    """
    from instructmining_core.indicators.neighbours import Reference
    from instructmining_core.regression.rule_card import shipped_reference

    if given or profile and (given := shipped_reference(profile)):
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


def score_files(scorer: Scorer, inputs: Inputs, *, show: bool, engine: str) -> None:
    """Score all inputs and write the table; progress and problems go to standard error."""
    ways = {"local": _scored_here, "ray": _scored_on_ray}
    tally: dict[str, list] = {}
    counted = 0
    with ScoreWriter(inputs.out) as writer:
        for rows, frame in ways[engine](scorer, inputs, show):
            for name, sha256 in inputs.piped_sha256.items():
                piped = frame["file"] == name
                frame["file_sha256"] = frame["file_sha256"].mask(piped, sha256)
            frame.attrs["read"] = inputs.read
            writer.write(frame)
            inputs.notes.update(_notes(rows, frame))
            counted += len(frame)
            for column in scorer.describe():
                tally.setdefault(column, []).append(frame[column].to_numpy(np.float32))
        if not tally:
            raise InstructMiningError(f"no records in {', '.join(inputs.names)}: nothing to score")
        if len(inputs.problems) == counted:
            kinds = "\n".join(_kinds(inputs.problems))
            raise InstructMiningError(f"none of the {counted:,} records can be read:\n{kinds}")
    _report(inputs, tally)


def _scored_here(scorer: Scorer, inputs: Inputs, show: bool) -> Scored:
    start = time.perf_counter()
    with ExitStack() as shown:
        for number, rows in enumerate(map(read_rows, inputs.tables())):
            if number == 0:
                _estimate(scorer, rows, inputs.total, time.perf_counter() - start)
                bar = shown.enter_context(job_bar(inputs.total, show=show))
            yield rows, scorer.score(rows, progress=bar)


def _scored_on_ray(scorer: Scorer, inputs: Inputs, show: bool) -> Scored:
    from ..ray_engine import scored

    with job_bar(inputs.total, show=show) as bar:
        for rows, frame in scored(scorer, inputs.tables()):
            bar.update(len(frame))
            yield rows, frame


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
    told = {}
    for name, parts in tally.items():
        values = pd.Series(np.concatenate(parts))
        found = values[np.isfinite(values)]
        spread = found.quantile([0.01, 0.5, 0.99])
        told[name] = [len(found), values.isna().sum(), found.astype(float).mean(), *spread]
    named = ["values", "NaN", "mean", "1 %", "median", "99 %"]
    table = pd.DataFrame.from_dict(told, "index", columns=named)
    rows = len(values)
    sys.stdout.write(f"{table.to_string(float_format=lambda x: f'{x:.4g}')}\n\n")
    sys.stdout.write(f"{rows:,} rows in {inputs.out}\n")
    listed = Path(f"{inputs.out}.problems.jsonl")
    listed.unlink(missing_ok=True)
    problems = inputs.problems
    if problems:
        text = "".join(json.dumps(vars(problem)) + "\n" for problem in problems)
        listed.write_text(text, encoding="utf-8")
        _say("\n".join([f"{len(problems)} malformed records, kept as rows without values and "
                        f"listed in {listed}:", *_kinds(problems)]))  # fmt: skip
    if inputs.notes:
        _say("\n".join(["notes:", *(f"  {count:,} rows: {note}"
                                    for note, count in inputs.notes.most_common())]))  # fmt: skip


def _kinds(problems: list[Problem]) -> list[str]:
    """The problems by what was expected, each with the first place."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\d+", "0", problem.expected), []).append(problem)
    lines = [f"  {found[0]}" + (f" (and {len(found) - 1:,} more like it)" if found[1:] else "")
             for found in kinds.values()]  # fmt: skip
    more = [f"  and {len(lines) - SHOWN} more kinds"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _notes(rows: ParsedTable, frame: pd.DataFrame) -> Counter[str]:
    """What a reader of these scores must know, and of how many rows."""
    found: Counter[str] = Counter()
    for talk in rows.conversations:
        answers = "\n".join(talk.messages[end]["content"] for end in talk.ends)
        if "<" in answers or "[" in answers:
            found.update(note for note, mark in MARKUP.items() if mark.search(answers))
    if "script" in frame:
        found["are mostly not in Latin script, where counts of words say little"] = int(
            (frame["script"] < 0.5).sum()
        )
    for one in frame["reasons"][frame["reasons"].str.contains("cut to fit", regex=False)]:
        found.update(f"were cut to fit the model of {name}"
                     for name, why in sorted(json.loads(one).items()) if "cut to fit" in why)
    return +found


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
