"""Many runs, each once: skip what the ledger holds, train the rest together, keep going.

Killed and started again it goes on where it was. A run that fails leaves a record and is tried
again by the next start; one that diverged is a result and stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pandas as pd

from .distributed import join, launched
from .finetune import stackable
from .ledger import Ledger, RunSpec, tidy
from .ledger_shared import for_all
from .lm import LM
from .run import Evals, Rows, check
from .sweep_executor import do_group
from .sweep_helpers import (
    WORTH,
    Helpers,
    describe,
    guessed_seconds,
    helpers_wanted,
    one_thread,
)
from .sweep_watch import Watch
from .width import adapters_together

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
