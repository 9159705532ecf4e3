"""One executor's work on a ledger: claim runs, do them, write their records.

One run is one function of one specification (`run.run_one`), safe to try again. Whatever drives the
runs (the sweep itself, its helpers, another engine) makes the same three calls:

    ledger.claim(spec)                    # False: finished, or somebody has it
    record = run_one(spec, lm, rows, evals)
    ledger.write(record)                  # atomic; gives the claim back

`do_group` is that, for runs that may share a pass, with failures recorded.

A ledger for processes that do every run together: the first reads and writes, all are told.

Each decision of a sweep (is it done, is it mine, what is left) then has one answer on all of them,
whatever a process would see in the folder a moment later, so they take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..models.batching import is_out_of_memory
from ..models.causal_lm import LM
from ..models.distributed import Group, join
from .ledger import Ledger, RunSpec, Taken
from .run import Evals, Rows, failure, run_one, run_together


class SharedLedger:
    """A ledger's methods, each called by all processes of a group, done by the first.

    What the method gives or raises there, it gives or raises on all.
    """

    def __init__(self, ledger: Ledger, group: Group) -> None:
        self.ledger, self.group = ledger, group

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.ledger, name)
        if not callable(found):
            return found
        return lambda *arguments, **options: self._by_first(lambda: found(*arguments, **options))

    @contextmanager
    def locked(self):
        """Hold the ledger for one sweep; see `Ledger.locked`."""
        with ExitStack() as stack:
            self._by_first(lambda: stack.enter_context(self.ledger.locked()) and None)
            yield self

    def _by_first(self, work: Callable[[], Any]) -> Any:
        outcome = None
        if self.group.first:
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, error
        value, error = self.group.tell(outcome)
        if error is not None:
            raise error
        return value


def for_all(ledger: Ledger | SharedLedger) -> Ledger | SharedLedger:
    """The ledger for every process of a launch (`distributed.join`); itself where there is one."""
    group = join()
    if group.size == 1 or isinstance(ledger, SharedLedger):
        return ledger
    return SharedLedger(ledger, group)


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
