"""One run, one JSON file, done once: what was run, what came out, and who is at it now.

A run is named by the hash of its whole specification, so a finished run is never done twice and two
runs that differ in anything that can change a number are kept apart. Writing is atomic (temporary
file, fsync, rename) and claiming is exclusive, on one machine or on a shared folder.

Who is at work on a run: a claim file that its living owner keeps touching.

On one machine a dead owner is seen at once, by its process id and start time. A process of another
host (a container started again has a new host name too) cannot be looked at, so there the file's
age decides: an owner touches its claims every few seconds, and one not touched for minutes is free.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from filelock import FileLock, Timeout

from ..files import clear_leftovers, write_json
from .run import RunSpec, hash_encoded, hash_rows, plain, spec_from

BEAT = 15.0  # seconds between an owner's touches
EXPIRES = 180.0  # seconds without a touch after which another host's claim is free


class Holders:
    """The `<run_id>.claim` files of a folder, and the heart of those that this process owns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[str] = set()
        self._guard, self._heart = threading.Lock(), None

    @contextmanager
    def lock(self):
        """Be the only process that looks at claims and changes them."""
        with FileLock(self.folder / ".claims.lock").acquire(poll_interval=0.005):
            yield

    def read(self, run_id: str) -> dict[str, Any] | None:
        """pid, host, since (UTC) and started (of the process) of a claim; None if there is none."""
        return read_holder(self.path(run_id))

    def take(self, run_id: str) -> None:
        """Claim for this process, and keep the claim warm until `drop`. Call it under `lock`."""
        write_json(self.path(run_id), this_process())
        with self._guard:
            self._held.add(run_id)
            if self._heart is None or not self._heart.is_alive():
                self._heart = threading.Thread(target=self._beat, daemon=True)
                self._heart.start()

    def drop(self, run_id: str) -> None:
        """Remove a claim, whoever's it is. Call it under `lock`, having looked."""
        with self._guard:
            self._held.discard(run_id)
        self.path(run_id).unlink(missing_ok=True)

    def mine(self, run_id: str) -> bool:
        """Whether the claim is this process's: another may have taken it for dead."""
        holder = self.read(run_id)
        return holder is not None and (holder["pid"], holder["host"]) == (
            os.getpid(), socket.gethostname()) and _process_lives(holder)

    def alive(self, run_id: str) -> bool:
        """Whether a living process has claimed the run."""
        holder = self.read(run_id)
        if holder is None:
            return False
        if holder["host"] == socket.gethostname():
            return _process_lives(holder)
        try:
            return self._clock() - self.path(run_id).stat().st_mtime <= EXPIRES
        except FileNotFoundError:
            return False

    def path(self, run_id: str) -> Path:
        """Where a run's claim lies."""
        return self.folder / f"{run_id}.claim"

    def _clock(self) -> float:
        """Now, by the clock that stamps this folder's files: on a shared folder not this host's."""
        path = self.folder / ".clock"
        path.touch()
        return path.stat().st_mtime

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._guard:
                held = list(self._held)
                if not held:
                    self._heart = None
                    return
            for run_id in held:
                with suppress(FileNotFoundError):
                    if self.mine(run_id):
                        os.utime(self.path(run_id))


def this_process() -> dict[str, Any]:
    """What a claim says of its owner."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "started": psutil.Process().create_time(),
    }


def read_holder(path: Path) -> dict[str, Any] | None:
    """The owner that a file names, None where there is no such file or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def tell(holder: Mapping[str, Any] | None) -> str:
    """A holder in words."""
    if holder is None:
        return "a process unknown"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _process_lives(holder: Mapping[str, Any]) -> bool:
    """Its start time tells a process from a later one with the same id."""
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["started"]) < 2 and (
            process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


__all__ = ["FINISHED", "Ledger", "LedgerError", "RunSpec", "Taken", "hash_encoded", "hash_rows",
           "plain", "settled", "spec_from", "tidy"]

FINISHED = ("done", "diverged")  # never run again; "failed" is tried again by the next start


class LedgerError(RuntimeError):
    """A ledger that is busy, or a record that cannot be read."""


class Taken(LedgerError):
    """A record that may not be written: the run is finished, or another process's."""


class Ledger:
    """A folder of `<run_id>.json`, with `<run_id>.claim` beside the runs now at work."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._holders = Holders(self.folder)

    def read(self, run_id: str) -> dict[str, Any] | None:
        """The record of a run, or None. Raises LedgerError where the file is no JSON."""
        path = self._path(run_id)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise LedgerError(f"{path.name} is no record: {error}; remove the file.") from None

    def has(self, run_id: str) -> bool:
        """Whether the run is finished: done or diverged. A failed run is not."""
        return settled(self.read(run_id))

    def claim(self, run: str | RunSpec, *, tried: int | None = None) -> bool:
        """Take a run for this process; False where it is finished or a living process has it.

        run : its specification, or its run_id alone
        tried : attempts recorded when the sweep began; a run that failed since is not taken

        A claim whose process is gone is taken over: on this host at once, on another when nothing
        has touched the claim for `ledger_claims.EXPIRES` seconds. Where the specification is given,
        the attempt that died is recorded first, as failed.
        """
        run_id = run if isinstance(run, str) else run.run_id
        with self._holders.lock():
            record = self.read(run_id)
            if settled(record, tried) or self._holders.alive(run_id):
                return False
            dead = self._holders.read(run_id)
            if dead is not None and isinstance(run, RunSpec):
                self._put(_died(run, dead), record)
            self._holders.take(run_id)
            return True

    def holder(self, run_id: str) -> dict[str, Any] | None:
        """Who claimed a run: pid, host, since (UTC), started (of the process); None if nobody."""
        return self._holders.read(run_id)

    def busy(self, run_id: str) -> bool:
        """Whether a living process is at work on the run."""
        return self._holders.alive(run_id)

    def release(self, run_id: str) -> None:
        """Give a claim of this process back, with or without a record; another's stays."""
        with self._holders.lock():
            if self._holders.mine(run_id):
                self._holders.drop(run_id)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record atomically, give the claim back.

        A record without `attempt` gets the number after the last. Raises Taken where the run is
        finished, or a living process other than this one has claimed it.
        """
        run_id = record["run_id"]
        with self._holders.lock():
            before = self.read(run_id)
            if settled(before):
                raise Taken(f"Run {run_id} is finished already; its record is not overwritten.")
            if self._holders.alive(run_id) and not self._holders.mine(run_id):
                raise Taken(f"Run {run_id} is now {tell(self.holder(run_id))}'s.")
            self._put(record, before)
            self._holders.drop(run_id)

    def _put(self, record: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        attempt = 1 + (before["attempt"] if before else 0)
        write_json(self._path(record["run_id"]), {"attempt": attempt} | record, default=plain)

    def records(self) -> list[dict[str, Any]]:
        """Every record, by run_id."""
        return [self.read(path.stem) for path in sorted(self.folder.glob("*.json"))]

    def load(self) -> pd.DataFrame:
        """One row a run, sorted by run_id; `tidy` tells the columns."""
        return tidy(self.records())

    @contextmanager
    def locked(self):
        """Hold the ledger for one sweep. Raises LedgerError that names the holder.

        What killed processes left lying is cleared away at both ends.
        """
        lock, who = FileLock(self.folder / ".sweep.lock"), self.folder / ".sweep.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            text = f"Another sweep holds this ledger: {tell(read_holder(who))}."
            raise LedgerError(text) from None
        try:
            write_json(who, this_process())
            self._clear()
            yield self
        finally:
            self._clear()
            who.unlink(missing_ok=True)
            lock.release()

    def _clear(self) -> None:
        clear_leftovers(self.folder)
        for path in self.folder.glob("*.claim"):  # killed between the record and the claim's end
            with self._holders.lock():
                if self.has(path.stem) and not self.busy(path.stem):
                    self._holders.drop(path.stem)

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"


def settled(record: Mapping[str, Any] | None, tried: int | None = None) -> bool:
    """Whether nobody should do the run now: it is finished, or failed since the sweep began.

    tried : attempts recorded at that beginning; None: failures do not settle. An attempt that was
    killed settles nothing.
    """
    if record is None:
        return False
    failed = tried is not None and record["attempt"] > tried and not record.get("killed", False)
    return record["status"] in FINISHED or failed


def _died(run: RunSpec, holder: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an attempt whose process left none."""
    return run.head() | {
        "status": "failed", "killed": True, "started": holder["since"],
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "error": f"process {holder['pid']} died",
    }


def tidy(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a record.

    Columns: run_id, purpose, status, every label key under its own name (`shares` stays a dict),
    finetune_method, base, init_seed, order_seed, then for each evaluation set `loss_<e>` (mean over
    prompts, nats per token), `loss_<e>_token`, `loss_<e>_first64`, `loss_<e>_without_eos`,
    `effective_n_<e>`, and where a run was evaluated by epoch `loss_<e>_epoch1` and so on (mean over
    prompts); then tokens_trained, rows, steps, final_train_loss, seconds, peak_memory_bytes,
    attempt, error.
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
        for epoch, part in enumerate(record.get("epochs") or [], start=1):
            value = part[name]["prompt_mean"]
            row[f"loss_{name}_epoch{epoch}"] = np.nan if value is None else value
    return row | {name: record.get(name) for name in _PLAIN_COLUMNS}
