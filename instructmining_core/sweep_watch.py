"""What a sweep still waits for, and how it tells: a bar, and a file beside the records."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from .ledger import Ledger, RunSpec, settled
from .ledger_claims import tell
from .sweep_progress import ProgressFile, best_and_worst

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
