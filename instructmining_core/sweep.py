"""Many runs, each once: skip what the ledger holds, train the rest together, keep going.

Killed and started again it goes on where it was. A run that fails leaves a record and is tried
again by the next start; one that diverged is a result and stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from .batching import is_out_of_memory
from .finetune import stackable
from .helpers import WORTH, Helpers, describe, helpers_wanted, one_thread
from .ledger import Ledger, RunSpec, tidy
from .lm import LM
from .run import Evals, Rows, check, failure, run_one, run_together
from .width import adapters_together

_LOOK = 0.2  # seconds between looks at the runs of other processes

Record = dict[str, Any]


def run_sweep(
    specs: Sequence[RunSpec],
    lm: LM,
    rows: Rows,
    evals: Evals,
    ledger: Ledger,
    *,
    together: int | None = None,
    helpers: int | None = None,
    by_epoch: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Do every run that the ledger does not hold.

    specs : the runs; one that is named twice is done once
    rows : row hash -> encoded training row; evals : name -> encoded evaluation rows
    together : adapters in one pass; None lets memory and the processor decide
    helpers : processes beside this one; None takes the machine's further cores when the sweep is
        long enough; no number of a run depends on it beyond float rounding
    by_epoch : also evaluate after each epoch
    progress : a bar with runs done, time left, best and worst loss so far

    returns : one row a specification, in their order, with its own label (see `ledger.tidy`)

    Raises LedgerError where another sweep holds the ledger. An error in one run is its record's
    `error`; errors in the specifications themselves (rows not given) are raised before any run.
    """
    unique = {spec.run_id: spec for spec in specs}
    with ledger.locked():
        watch = _Watch(unique, ledger, progress)
        todo = [unique[run_id] for run_id in watch.waiting]
        for spec in todo:
            check(spec, lm, rows, evals)
        groups = groups_of(todo, lm, rows, together)
        count = helpers_wanted(lm, helpers) if len(groups) > 2 else 0
        crew = Helpers(count, describe(groups, lm, rows, evals, ledger, by_epoch) if count else {})
        if helpers:
            crew.start()
        try:
            with one_thread() if count else nullcontext():
                _work(groups, lambda group: do_group(group, lm, rows, evals, ledger,
                                                     by_epoch=by_epoch), watch, crew)
        finally:
            crew.stop()
            watch.bar.close()
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


def do_group(
    group: Sequence[RunSpec], lm: LM, rows: Rows, evals: Evals, ledger: Ledger, *,
    by_epoch: bool = False,
) -> int:
    """Claim the runs of a group, do them, write their records; how many were done or failed.

    Safe to call by any number of processes on the same ledger.
    """
    mine = [spec for spec in group if ledger.claim(spec.run_id)]
    written = 0
    try:
        for record in _attempt(mine, lm, rows, evals, by_epoch):
            before = ledger.read(record["run_id"])
            ledger.write(record | {"attempt": 1 + (before["attempt"] if before else 0)})
            written += 1
    finally:
        for spec in mine:
            ledger.release(spec.run_id)
    return written


def _attempt(mine, lm, rows, evals, by_epoch) -> Iterator[Record]:
    """Records of a group; out of memory halves it, after another error each runs alone."""
    if not mine:
        return
    try:
        if len(mine) == 1:
            records = [run_one(mine[0], lm, rows, evals, by_epoch=by_epoch)]
        else:
            records = run_together(mine, lm, rows, evals, by_epoch=by_epoch)
    except Exception as error:
        if len(mine) == 1:
            yield failure(mine[0], lm, error)
            return
        # only a number leaves this block: the error's traceback holds the group's tensors
        size = len(mine) // 2 if is_out_of_memory(error) else 1
    else:
        yield from records
        return
    for start in range(0, len(mine), size):
        yield from _attempt(mine[start : start + size], lm, rows, evals, by_epoch)


def _work(groups, do: Callable[[list[RunSpec]], int], watch: _Watch, crew: Helpers) -> None:
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
        if not progress:
            time.sleep(_LOOK)
            watch.look()


class _Watch:
    """What is still missing, and the bar: runs done, time left, best and worst loss so far."""

    def __init__(self, specs: Mapping[str, RunSpec], ledger: Ledger, progress: bool) -> None:
        self.ledger = ledger
        records = {run_id: ledger.read(run_id) for run_id in specs}
        self.waiting = {run_id: r["attempt"] if r else 0 for run_id, r in records.items()
                        if not ledger.has(run_id)}
        self.losses = [loss for r in records.values() if r for loss in _first_loss(r)]
        self.bar = tqdm(total=len(specs), initial=len(specs) - len(self.waiting), desc="runs",
                        unit="run", disable=not progress)

    def look(self) -> None:
        """Count the records written since the last look, by whichever process."""
        for run_id, attempt in list(self.waiting.items()):
            record = self.ledger.read(run_id)
            if record is not None and record["attempt"] > attempt:
                del self.waiting[run_id]
                self._tell(record)

    def _tell(self, record: Record) -> None:
        self.losses += _first_loss(record)
        if self.losses:
            self.bar.set_postfix(best=f"{min(self.losses):.4f}", worst=f"{max(self.losses):.4f}")
        if record["status"] != "done" and not self.bar.disable:
            why = f": {record['error']}" if record["error"] else ""
            self.bar.write(f"run {record['run_id']} {record['status']}{why}")
        self.bar.update()


def _first_loss(record: Record) -> list[float]:
    """The first evaluation set's loss, in a list; empty where there is none."""
    losses = [part["prompt_mean"] for part in record.get("losses", {}).values()]
    return [loss for loss in losses[:1] if loss is not None]
