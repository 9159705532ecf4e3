"""A sweep under `accelerate launch`: several processes at each run, the first one keeps the ledger.

    accelerate launch --num_processes 4 -m instructmining_core.finetuning.sweep job.json

where `write_job` wrote `job.json`. Started again after a kill it goes on where it was.

What a sweep still waits for, and how it tells: a bar, and a file beside the records.

Many runs, each once: skip what the ledger holds, train the rest together, keep going.

Killed and started again it goes on where it was. A run that fails leaves a record and is tried
again by the next start; one that diverged is a result and stays.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..config import ModelRef
from ..models.causal_lm import LM, load_lm
from ..models.distributed import join, launched, leave
from .executor import do_group, for_all
from .finetune import stackable
from .ledger import Ledger, RunSpec, settled, tell, tidy
from .progress import ProgressFile, best_and_worst
from .run import Evals, Rows, check
from .trainer import adapters_together
from .workers import WORTH, Helpers, describe, guessed_seconds, helpers_wanted, one_thread, work

Record = dict[str, Any]


class Watch:
    """The runs still missing; runs done, time left, best and worst loss so far.

    tried : run_id -> attempts recorded when the sweep began; waiting : run_ids, in order
    """

    def __init__(self, specs: Mapping[str, RunSpec], ledger: Ledger, progress: bool) -> None:
        self.ledger, self.begun = ledger, time.monotonic()
        records = {run_id: ledger.read(run_id) for run_id in specs}
        self.tried = {run_id: r["attempt"] if r else 0 for run_id, r in records.items()}
        self.waiting = dict.fromkeys(run_id for run_id, r in records.items() if not settled(r))
        self.losses = [loss for r in records.values() if r for loss in _first_loss(r)]
        self.total, self.first, self.note = len(specs), len(self.waiting), ""
        self.file = ProgressFile(ledger.folder)
        self.bar = tqdm(total=self.total, initial=self.total - self.first, desc="runs",
                        unit="run", disable=not progress)
        self._show(now=True)

    def look(self) -> None:
        """Count the records written since the last look, by whichever process."""
        for run_id in list(self.waiting):
            record = self.ledger.read(run_id)
            if settled(record, self.tried[run_id]):
                del self.waiting[run_id]
                self.note = ""
                self._count(record)
        self._show()

    def wait_for_others(self, seconds: float) -> None:
        """Sleep, and meanwhile say who has the runs that are left."""
        owners = {run_id: self.ledger.holder(run_id) for run_id in self.waiting}
        owned = [holder for holder in owners.values() if holder]
        self.note = f"(waiting for {tell(owned[0])}, {len(owned)} left)" if owned else ""
        self._show()
        time.sleep(seconds)

    def warn(self, text: str) -> None:
        """Tell of something that went wrong beside the runs."""
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """The last state, and the end of the bar."""
        self._show(now=True)
        self.bar.close()

    def _count(self, record: Record) -> None:
        self.losses += _first_loss(record)
        self._show()
        if record["status"] != "done" and not self.bar.disable:
            why = f": {record['error']}" if record["error"] else ""
            self.bar.write(f"run {record['run_id']} {record['status']}{why}")
        self.bar.update()

    def _show(self, now: bool = False) -> None:
        best, worst = (min(self.losses), max(self.losses)) if self.losses else (None, None)
        if not self.bar.disable:
            self.bar.set_description(f"runs {self.note}".strip(), refresh=False)
            self.bar.set_postfix(best_and_worst(best, worst), refresh=now or bool(self.note))
        done = self.first - len(self.waiting)
        left = (time.monotonic() - self.begun) / done * len(self.waiting) if done else None
        self.file.write(now=now, done=self.total - len(self.waiting), total=self.total, left=left,
                        best=best, worst=worst, note=self.note)


def _first_loss(record: Record) -> list[float]:
    """The first evaluation set's loss, in a list; empty where there is none."""
    losses = [part["prompt_mean"] for part in record.get("losses", {}).values()]
    return [loss for loss in losses[:1] if loss is not None]


_LOOK = 0.2  # seconds between looks at the runs of other processes


def run_sweep(
    specs: Sequence[RunSpec],
    lm: LM,
    rows: Rows,
    evals: Evals,
    ledger: Ledger,
    *,
    together: int | None = None,
    helpers: int | None = None,
    by_epoch: bool | Collection[str] = False,
    keep: str | Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Do every run that the ledger does not hold.

    specs : the runs; one that is named twice is done once
    rows : row hash -> encoded training row; evals : name -> encoded evaluation rows
    together : adapters in one pass; None lets memory and the processor decide
    helpers : processes beside this one; None takes the machine's further cores when the sweep is
        long enough; no number of a run depends on it beyond float rounding
    by_epoch : also evaluate after each epoch, or do so for these run_ids
    keep : folder where `<run_id>/` gets each adapter as peft saves it; runs that the ledger holds
        already are not done again for that
    progress : a bar with runs done, time left, best and worst loss so far

    returns : one row a specification, in their order, with its own label (see `ledger.tidy`)

    Raises LedgerError where another sweep holds the ledger. An error in one run is its record's
    `error`; errors in the specifications themselves (rows not given) are raised before any run.
    """
    unique, ledger = {spec.run_id: spec for spec in specs}, for_all(ledger)
    with ledger.locked():
        watch = Watch(unique, ledger, progress and join().first)
        todo = [unique[run_id] for run_id in watch.waiting]
        for spec in todo:
            check(spec, lm, rows, evals)
        groups = groups_of(todo, lm, rows, together)
        count = helpers_wanted(lm, helpers) if len(groups) > 2 and not launched() else 0
        options = {"by_epoch": by_epoch, "keep": keep, "tried": watch.tried}
        crew = Helpers(count, describe(groups, lm, rows, evals, ledger, **options) if count else {},
                       ledger.folder)
        if helpers or (count and guessed_seconds(groups, lm, rows, evals) > WORTH):
            crew.start()
        do = partial(do_group, lm=lm, rows=rows, evals=evals, ledger=ledger, **options)
        try:
            with one_thread() if count else nullcontext():
                _work(groups, do, watch, crew)
        finally:
            crew.stop()
            watch.close()
    return frame_of(specs, ledger)


def frame_of(specs: Sequence[RunSpec], ledger: Ledger) -> pd.DataFrame:
    """The records of these specifications, in their order, each with its specification's label."""
    records = [ledger.read(spec.run_id) for spec in specs]
    found = [r | {"label": dict(s.label)} for r, s in zip(records, specs, strict=True) if r]
    return tidy(found)


def groups_of(
    todo: Sequence[RunSpec], lm: LM, rows: Rows, together: int | None
) -> list[list[RunSpec]]:
    """Runs that share a pass: one configuration, longest first so that the ends fall together."""
    kinds: dict[str, list[RunSpec]] = {}
    for spec in todo:
        key = repr(spec.finetune) if stackable(spec.finetune) else spec.run_id
        kinds.setdefault(key, []).append(spec)
    groups = []
    for kind in kinds.values():
        kind = sorted(kind, key=lambda spec: -spec.finetune.steps(len(spec.row_hashes)))
        size = together or adapters_together(lm, kind[0].finetune)
        size = size if stackable(kind[0].finetune) else 1
        groups += [kind[i : i + size] for i in range(0, len(kind), size)]
    return groups


def _work(groups, do: Callable[[list[RunSpec]], int], watch: Watch, crew: Helpers) -> None:
    """Do the groups in order; then what a helper left; then wait for what others are at."""
    begun, done = time.monotonic(), 0
    while watch.waiting:
        progress = 0
        for group in groups:
            group = [spec for spec in group if spec.run_id in watch.waiting]
            progress += do(group) if group else 0
            watch.look()
            done += bool(group)
            left = len(watch.waiting) * (time.monotonic() - begun) / max(1, done * len(groups[0]))
            if left > WORTH:
                crew.start()
            for text in crew.fallen():
                watch.warn(text)
        if not progress and watch.waiting:
            watch.wait_for_others(_LOOK)
            watch.look()


def write_job(
    path: str | Path, specs: Sequence[RunSpec], lm: LM, rows: Rows, evals: Evals, ledger: Ledger,
    *, together: int | None = None, keep: str | Path | None = None,
) -> None:
    """Write a sweep as one JSON file, for `main`.

    specs, rows, evals, ledger, together, keep : as for `run_sweep`; with `together` None, what the
        memory beside `lm` holds here decides
    lm : the base, on any device; its folder must be there for the launch as well
    """
    left = [spec for spec in {s.run_id: s for s in specs}.values() if not ledger.has(spec.run_id)]
    groups = groups_of(left, lm, rows, together)
    job = describe(groups, lm, rows, evals, ledger, keep=keep)
    Path(path).write_text(json.dumps(job), encoding="utf-8")


def main(path: str) -> None:
    """Do a job's runs: each process loads the base on its own device, all do every run together."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    model: Mapping[str, str] = job["model"]
    lm = load_lm(ModelRef(model["folder"], dtype=model["dtype"]))
    work(job, lm, os.getppid())
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
