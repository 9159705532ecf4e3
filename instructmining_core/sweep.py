"""Many runs, each once: skip what the ledger holds, train the rest together, keep going.

Killed and started again it goes on where it was. A run that fails leaves a record and is tried
again by the next start; one that diverged is a result and stays.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import pandas as pd
from tqdm.auto import tqdm

from .batching import is_out_of_memory
from .finetune import stackable
from .ledger import Ledger, RunSpec, tidy
from .lm import LM
from .run import Evals, Rows, check, failure, run_one, run_together
from .width import adapters_together

_WAIT = 0.5  # seconds between looks at a run that another process is doing


def run_sweep(
    specs: Sequence[RunSpec],
    lm: LM,
    rows: Rows,
    evals: Evals,
    ledger: Ledger,
    *,
    together: int | None = None,
    by_epoch: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Do every run that the ledger does not hold.

    specs : the runs; one that is named twice is done once
    rows : row hash -> encoded training row; evals : name -> encoded evaluation rows
    together : adapters in one pass; None lets memory and the processor decide
    progress : a bar with runs done, time left, best and worst loss so far

    returns : one row a specification, in their order, with its own label (see `ledger.tidy`)

    Raises LedgerError where another sweep holds the ledger. An error in one run is its record's
    `error`; errors in the specifications themselves (rows not given) are raised before any run.
    """
    unique = {spec.run_id: spec for spec in specs}
    with ledger.locked():
        todo = [spec for spec in unique.values() if not ledger.has(spec.run_id)]
        for spec in todo:
            check(spec, lm, rows, evals)
        with _Bar(len(unique), unique, ledger, progress) as bar:
            for group in _groups(todo, lm, rows, together):
                _do(group, lm, rows, evals, ledger, bar, by_epoch)
    return frame_of(specs, ledger)


def frame_of(specs: Sequence[RunSpec], ledger: Ledger) -> pd.DataFrame:
    """The records of these specifications, in their order, each with its specification's label."""
    records = [ledger.read(spec.run_id) for spec in specs]
    found = [r | {"label": dict(s.label)} for r, s in zip(records, specs, strict=True) if r]
    return tidy(found)


def _groups(todo, lm, rows, together) -> list[list[RunSpec]]:
    """Runs that share a pass: one configuration, longest first so that the ends fall together."""
    kinds: dict[str, list[RunSpec]] = {}
    for spec in todo:
        key = repr(spec.finetune) if stackable(spec.finetune) else spec.run_id
        kinds.setdefault(key, []).append(spec)
    groups = []
    for kind in kinds.values():
        kind = sorted(kind, key=lambda spec: -spec.finetune.steps(len(spec.row_hashes)))
        size = together or adapters_together(lm, kind[0].finetune, [
            [len(rows[h]) for h in spec.row_hashes] for spec in kind])
        groups += [kind[i : i + size] for i in range(0, len(kind), size)]
    return groups


def _do(group, lm, rows, evals, ledger, bar, by_epoch) -> None:
    """Claim a group and do it; on an error do its runs one by one, and record those that fail."""
    mine = [spec for spec in group if ledger.claim(spec.run_id)]
    try:
        for record in _attempt(mine, lm, rows, evals, by_epoch):
            _write(ledger, record)
            bar.tell(record)
    finally:
        for spec in mine:
            ledger.release(spec.run_id)
    for spec in group:
        _wait_for(spec, ledger)


def _attempt(mine, lm, rows, evals, by_epoch):
    """Records of a group; out of memory halves it, another error leaves its runs alone."""
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
        half = len(mine) // 2 if is_out_of_memory(error) else 1
        reason = None  # the traceback would keep the failed group's tensors alive
        del error, reason
    else:
        yield from records
        return
    for start in range(0, len(mine), half):
        yield from _attempt(mine[start : start + half], lm, rows, evals, by_epoch)


def _write(ledger: Ledger, record: dict) -> None:
    before = ledger.read(record["run_id"])
    attempt = 1 + (before["attempt"] if before else 0)
    ledger.write(record | {"attempt": attempt})


def _wait_for(spec: RunSpec, ledger: Ledger) -> None:
    """Another executor may be at a run; its record is awaited, not made a second time."""
    while not ledger.has(spec.run_id) and ledger.busy(spec.run_id):
        time.sleep(_WAIT)


@dataclasses.dataclass
class _Bar:
    """Runs done, time left, best and worst loss so far (the first evaluation set's)."""

    total: int
    specs: dict
    ledger: Ledger
    progress: bool

    def __enter__(self):
        held = [r for r in map(self.ledger.read, self.specs) if r and r["status"] != "failed"]
        self.bar = tqdm(total=self.total, initial=len(held), desc="runs", unit="run",
                        disable=not self.progress)
        self.losses = [loss for loss in map(_first_loss, held) if loss is not None]
        return self

    def __exit__(self, *_):
        self.bar.close()

    def tell(self, record: dict) -> None:
        """Count a record."""
        loss = _first_loss(record)
        if loss is not None:
            self.losses.append(loss)
        if self.losses:
            self.bar.set_postfix(best=f"{min(self.losses):.4f}", worst=f"{max(self.losses):.4f}")
        if record["status"] != "done":
            self.bar.write(f"run {record['run_id']} {record['status']}: {record.get('error')}")
        self.bar.update()


def _first_loss(record: dict) -> float | None:
    return next((part["prompt_mean"] for part in record.get("losses", {}).values()), None)
