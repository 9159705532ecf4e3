"""One run, one JSON file, done once: what was run, what came out, and who is at it now.

A run is named by the hash of its whole specification, so a finished run is never done twice and two
runs that differ in anything that can change a number are kept apart. Writing is atomic (temporary
file, fsync, rename) and claiming is exclusive, on one machine or on a shared folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from filelock import FileLock, Timeout

from .runspec import RunSpec, hash_encoded, hash_rows, plain, spec_from

__all__ = ["FINISHED", "Ledger", "LedgerError", "RunSpec", "hash_encoded", "hash_rows", "plain",
           "spec_from", "tidy"]

FINISHED = ("done", "diverged")  # never run again; "failed" is tried again by the next start


class LedgerError(RuntimeError):
    """A ledger that is busy, or a record that cannot be read."""


class Ledger:
    """A folder of `<run_id>.json`, with `<run_id>.claim` beside the runs now at work."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, run_id: str) -> dict[str, Any] | None:
        """The record of a run, or None. Raises LedgerError where the file is no JSON."""
        path = self.folder / f"{run_id}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise LedgerError(f"{path.name} is no record: {error}; remove the file.") from None

    def has(self, run_id: str) -> bool:
        """Whether the run is finished: done or diverged. A failed run is not."""
        record = self.read(run_id)
        return record is not None and record["status"] in FINISHED

    def claim(self, run_id: str) -> bool:
        """Take a run for this process; False where it is finished or a living process has it.

        A claim whose process is gone (killed, or the machine restarted) is taken over. On another
        host its process cannot be seen, so such a claim holds until its file is removed.
        """
        with FileLock(self.folder / ".claims.lock"):
            if self.has(run_id) or _alive(self.holder(run_id)):
                return False
            _write_atomically(self._claim_path(run_id), _self())
            return True

    def holder(self, run_id: str) -> dict[str, Any] | None:
        """Who claimed a run: pid, host, since (UTC), started (of the process); None if nobody."""
        try:
            return json.loads(self._claim_path(run_id).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def busy(self, run_id: str) -> bool:
        """Whether a living process is at work on the run."""
        return _alive(self.holder(run_id))

    def release(self, run_id: str) -> None:
        """Give a claim back, with or without a record."""
        self._claim_path(run_id).unlink(missing_ok=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record atomically, give the claim back. A finished run is never overwritten."""
        run_id = record["run_id"]
        if self.has(run_id):
            raise LedgerError(f"Run {run_id} is finished already; its record is not overwritten.")
        _write_atomically(self.folder / f"{run_id}.json", record)
        self.release(run_id)

    def records(self) -> list[dict[str, Any]]:
        """Every record, by run_id."""
        return [self.read(path.stem) for path in sorted(self.folder.glob("*.json"))]

    def load(self) -> pd.DataFrame:
        """One row a run, sorted by run_id; `tidy` tells the columns."""
        return tidy(self.records())

    @contextmanager
    def locked(self):
        """Hold the ledger for one sweep. Raises LedgerError that names the holder."""
        lock, who = FileLock(self.folder / ".sweep.lock"), self.folder / ".sweep.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(f"Another sweep holds this ledger: {_tell(who)}.") from None
        try:
            _write_atomically(who, _self())
            yield self
        finally:
            who.unlink(missing_ok=True)
            lock.release()

    def _claim_path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.claim"


def tidy(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a record.

    Columns: run_id, purpose, status, every label key under its own name (`shares` stays a dict),
    finetune_method, base, init_seed, order_seed, then for each evaluation set `loss_<e>` (mean over
    prompts, nats per token), `loss_<e>_token`, `loss_<e>_first64`, `loss_<e>_without_eos`,
    `effective_n_<e>`, then tokens_trained, rows, steps, final_train_loss, seconds,
    peak_memory_bytes, attempt, error.
    """
    if not records:
        return pd.DataFrame(columns=["run_id", "purpose", "status", *_PLAIN_COLUMNS])
    return pd.DataFrame([_row(record) for record in records])


_LOSS_COLUMNS = {
    "prompt_mean": "loss_{}", "token_mean": "loss_{}_token", "first64": "loss_{}_first64",
    "without_eos": "loss_{}_without_eos", "effective_n": "effective_n_{}",
}
_PLAIN_COLUMNS = ("tokens_trained", "rows", "steps", "final_train_loss", "seconds",
                  "peak_memory_bytes", "attempt", "error")


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    spec = record["spec"]
    row = {"run_id": record["run_id"], "purpose": spec["purpose"], "status": record["status"]}
    row |= record["label"]
    row |= {"finetune_method": spec["finetune"]["method"], "base": spec["base"]["id"]}
    row |= {"init_seed": spec["init_seed"], "order_seed": spec["order_seed"]}
    for name in spec["evals"]:
        losses = record.get("losses", {}).get(name, {})
        for key, column in _LOSS_COLUMNS.items():
            value = losses.get(key)
            row[column.format(name)] = np.nan if value is None else value
    return row | {name: record.get(name) for name in _PLAIN_COLUMNS}


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has neither."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(_finite(content), allow_nan=False, default=plain)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _self() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "started": psutil.Process().create_time(),
    }


def _alive(holder: Mapping[str, Any] | None) -> bool:
    """Whether the claiming process lives; its start time tells a reused pid."""
    if holder is None:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["started"]) < 2 and (
            process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


def _tell(who: Path) -> str:
    try:
        holder = json.loads(who.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "process unknown"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
