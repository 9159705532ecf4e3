"""One executor's work on a ledger: claim runs, do them, write their records.

One run is one function of one specification (`run.run_one`), safe to try again. Whatever drives the
runs (the sweep itself, its helpers, another engine) makes the same three calls:

    ledger.claim(spec)                    # False: finished, or somebody has it
    record = run_one(spec, lm, rows, evals)
    ledger.write(record)                  # atomic; gives the claim back

`do_group` is that, for runs that may share a pass, with failures recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .batching import is_out_of_memory
from .distributed import join
from .ledger import Ledger, RunSpec, Taken
from .ledger_shared import for_all
from .lm import LM
from .run import Evals, Rows, failure, run_one, run_together


def do_group(
    group: Sequence[RunSpec], lm: LM, rows: Rows, evals: Evals, ledger: Ledger, *,
    by_epoch: bool | Collection[str] = False, keep: str | Path | None = None,
    tried: Mapping[str, int] | None = None,
) -> int:
    """Claim the runs of a group, do them, write their records; how many were done or failed.

    by_epoch, keep : see `run_one`
    tried : attempts of each run_id when the sweep began, so that a run that has failed since is
        left alone; None tries failed runs again

    Safe to call by any number of processes on the same ledger. Processes of one launch
    (`distributed.join`) call it together; the first claims and writes.
    """
    ledger = for_all(ledger)
    mine = [spec for spec in group
            if ledger.claim(spec, tried=None if tried is None else tried.get(spec.run_id, 0))]
    written = 0
    try:
        for record in _attempt(mine, lm, rows, evals, {"by_epoch": by_epoch, "keep": keep}):
            try:
                ledger.write(record)
            except Taken:  # this process was taken for dead; the record of who took over stands
                continue
            written += 1
    finally:
        for spec in mine:
            ledger.release(spec.run_id)
    return written


def _attempt(mine, lm, rows, evals, options) -> Iterator[dict[str, Any]]:
    """Records of a group; out of memory halves it, after another error each runs alone."""
    if not mine:
        return
    try:
        if len(mine) == 1:
            records = join().all_or_none(lambda: [run_one(mine[0], lm, rows, evals, **options)])
        else:
            records = join().all_or_none(lambda: run_together(mine, lm, rows, evals, **options))
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
        yield from _attempt(mine[start : start + size], lm, rows, evals, options)
