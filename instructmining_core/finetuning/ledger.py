"""One run, one JSON file, done once: what was run, what came out, and who is at it now.

A run is named by the hash of its whole specification. Records are written whole or not at all. Who
is at work on a run holds its lease, a file beside the record (filelock's `SoftFileLease`): of a
dead process of this machine it is free at once, of another machine, or of a container started
again, once it was seen without a sign of life for `EXPIRES` seconds. So any number of processes on
any machines that see the folder may work on one ledger.

An archive holds finished runs in a few Parquet files, to be committed: small, only added to, exact.
Each sitting adds one part, named by its last day and by what it holds, so that parts of two
machines lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, SoftFileLease, Timeout

from ..config import InstructMiningError
from ..files import being_written, clear_leftovers, write_json
from .run_spec import CHOICES, Record, RunSpec, now

BEAT = 15.0  # seconds between an owner's signs of life
EXPIRES = 120.0  # seconds without one after which a lease is free; one number for all who share it
FINISHED = ("done", "diverged")  # never run again; "failed" is tried again by the next start
UNIT = 1e6  # losses have six decimals (`run`): as whole millionths they are exact and half the size
WHOLE, MILLIONTHS = pa.list_(pa.int32()), pa.list_(pa.int64())
PAGE = 1 << 26  # bytes: rows of one page share their hashes and settings, which zstd then sees


class Taken(InstructMiningError):
    """A record that may not be written: the run is finished, or another process's."""


class Ledger:
    """A folder of `<run_id>.json`, with `<run_id>.lease` beside the runs now at work."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._leases: dict[str, SoftFileLease] = {}  # kept: a lease times the others it has seen
        self._seen: dict[str, tuple[Any, float]] = {}

    def read(self, run_id: str) -> Record | None:
        """The record of a run, or None. Raises InstructMiningError where the file is no JSON."""
        path = self._path(run_id)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            text = f"{path.name} is no record: {error}; remove the file."
            raise InstructMiningError(text) from None

    def has(self, run_id: str) -> bool:
        """Whether the run is finished: done or diverged. A failed run is not."""
        return settled(self.read(run_id))

    def lock_run(self, run: RunSpec, *, tried: int | None = None) -> bool:
        """Take a run for this process; False where it is `settled` or a living process has it.

        Where the lease of a dead process is taken over, its attempt is recorded first, as failed.
        """
        lease = self._lease(run.run_id)
        with self._alone():
            record, dead = self.read(run.run_id), lease.owner
            if settled(record, tried) or lease.is_locked or not self._take(lease):
                return False
            if dead is not None:
                self._put(run.head() | {
                    "status": "failed", "killed": True, "started": None, "ended": now(),
                    "error": f"process {dead.pid} died",
                }, record)  # fmt: skip
            return True

    def owner(self, run_id: str) -> str | None:
        """Whose lease lies beside a run, in words; None where there is none."""
        owner = self._lease(run_id).owner
        return owner and f"process {owner.pid} on {owner.hostname}"

    def release(self, run_id: str) -> None:
        """Give a lease of this process back, with or without a record; another's stays."""
        with self._alone():
            self._lease(run_id).release()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record, give the lease back.

        A record without `attempt` gets the number after the last. Raises Taken where the run is
        finished, or a living process other than this one has its lease.
        """
        run_id = record["run_id"]
        lease = self._lease(run_id)
        with self._alone():
            before = self.read(run_id)
            if settled(before):
                raise Taken(f"Run {run_id} is finished already; its record is not overwritten.")
            if not (_still_held(lease) if lease.is_locked else self._take(lease)):
                raise Taken(f"Run {run_id} is now {self.owner(run_id)}'s.")
            self._put(record, before)
            lease.release()

    def records(self) -> dict[str, Record]:
        """Every record by run_id."""
        return {path.stem: self.read(path.stem) for path in self.folder.glob("*.json")}

    def load(self) -> pd.DataFrame:
        """One row a run, sorted by run_id; `tidy` tells the columns."""
        return tidy([record for _, record in sorted(self.records().items())])

    def clear(self) -> None:
        """Remove what killed processes left: half-written files, leases of finished runs."""
        clear_leftovers(self.folder)
        for path in self.folder.glob("*.lease"):
            if self.has(path.stem):
                lease = self._lease(path.stem)
                with self._alone():
                    if not lease.is_locked and self._take(lease):
                        lease.release()

    def _put(self, record: Mapping[str, Any], before: Record | None) -> None:
        attempt = 1 + (before["attempt"] if before else 0)
        write_json(self._path(record["run_id"]), {"attempt": attempt} | record)

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"

    def _lease(self, run_id: str) -> SoftFileLease:
        if run_id not in self._leases:
            self._leases[run_id] = SoftFileLease(
                self.folder / f"{run_id}.lease", lease_duration=EXPIRES, heartbeat_interval=BEAT,
                blocking=False, thread_local=False)
        return self._leases[run_id]

    def _alone(self):
        """Be the only process that takes leases and writes records; the system ends it at death."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".ledger.lock").acquire(poll_interval=0.005)

    def _take(self, lease: SoftFileLease) -> bool:
        """Try to get a lease, once. Call it in `_alone`, where no lease file is half written."""
        try:
            lease.acquire()
        except Timeout:
            if not self._left_for_good(lease):
                return False
            lease.force_break()
            lease.acquire()
        return True

    def _left_for_good(self, lease: SoftFileLease) -> bool:
        """Whether a lease is dead though filelock leaves it alone.

        It never frees one whose owner was killed before it wrote its name, nor any on a file
        system that cannot swap two names (NFS): there the wait is half as long again. A killed
        process whose parent has not looked at it yet it takes for alive.
        """
        try:
            state = lease.owner, Path(lease.lock_file).stat().st_mtime_ns
        except FileNotFoundError:  # its owner has just ended well
            return True
        if _is_zombie(lease.owner):
            return True
        before, since = self._seen.setdefault(lease.lock_file, (state, time.monotonic()))
        if state != before:
            self._seen[lease.lock_file] = state, time.monotonic()
            return False
        return lease.owner is None or time.monotonic() - since > 1.5 * EXPIRES


def _still_held(lease: SoftFileLease) -> bool:
    """Whether a lease that this process took was not taken for dead and passed on since."""
    owner = lease.owner
    return owner is not None and owner.token == lease.token


def _is_zombie(owner) -> bool:
    """Whether an owner on this machine has ended and only its entry is left."""
    try:
        here = owner is not None and owner.hostname.partition("?")[0] == socket.gethostname()
        return here and psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def settled(record: Record | None, tried: int | None = None) -> bool:
    """Whether nobody should do the run now: it is finished, or failed since the sweep began.

    tried : attempts recorded at that beginning; None: failures do not settle. An attempt that was
    killed settles nothing.
    """
    if record is None:
        return False
    failed = tried is not None and record["attempt"] > tried and not record.get("killed", False)
    return record["status"] in FINISHED or failed


def tidy(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record.

    Columns: run_id, purpose, status, every label key under its own name (`shares` stays a dict),
    finetune_method, base, dtype, init_seed, order_seed, machine (GPU, or processor and cores),
    threads, commit, then for each evaluation set, in nats per token, `loss_<e>` (mean over
    prompts) and `loss_<e>_token` (over tokens), both over the answers' body,
    `loss_<e>_whole`, `loss_<e>_first64`, `loss_<e>_without_eos`, `first_token_<e>`,
    `end_of_text_<e>`, `effective_n_<e>`; `base_<e>` and
    `base_<e>_token` are the base's own, and where a run was evaluated by epoch `loss_<e>_epoch1`
    and so on (mean over prompts). `relevance` (and `base_relevance`) is what eval_1's answers cost
    more under another prompt than under their own. `accuracy_<t>` and `accuracy_<t>_norm` are
    lm-eval's acc and acc_norm of a multiple-choice task, `base_accuracy_<t>` and
    `base_accuracy_<t>_norm` the base's own. Then tokens_trained, rows, steps,
    final_train_loss, seconds, peak_memory_bytes, attempt, error.
    """
    if not records:
        return pd.DataFrame(columns=["run_id", "purpose", "status", *_PLAIN_COLUMNS])
    return pd.DataFrame([_row(record) for record in records])


_LOSS_COLUMNS = {
    "prompt_mean": "loss_{}_whole", "first64": "loss_{}_first64",
    "without_eos": "loss_{}_without_eos", "first_token": "first_token_{}",
    "end_of_text": "end_of_text_{}", "effective_n": "effective_n_{}",
}
RELEVANCE = "relevance"  # name of the set with eval_1's answers under other prompts
_PLAIN_COLUMNS = ("tokens_trained", "rows", "steps", "final_train_loss", "seconds",
                  "peak_memory_bytes", "attempt", "error")


def _row(record: Record) -> Record:
    spec, machine = record["spec"], record.get("hardware") or {}
    row = {"run_id": record["run_id"], "purpose": spec["purpose"], "status": record["status"]}
    row |= record["label"]
    row |= {"finetune_method": spec["finetune"]["method"], "base": spec["base"]["id"]}
    row |= {"init_seed": spec["init_seed"], "order_seed": spec["order_seed"]}
    row |= {"dtype": spec["base"]["dtype"], "commit": record.get("commit")}
    processor = machine and f"{machine['processor']}, {machine['cores']} cores"
    row |= {"machine": machine.get("gpu") or processor or None, "threads": machine.get("threads")}
    for name in spec["evals"]:
        if name.startswith(CHOICES):
            row |= _accuracies(record, name.removeprefix(CHOICES))
            continue
        losses = record.get("losses", {}).get(name, {})
        before = record.get("base_losses", {}).get(name, {})
        row |= {f"loss_{name}": over_prompts(losses),
                f"loss_{name}_token": _number(losses.get("body_token_mean")),
                f"base_{name}": over_prompts(before),
                f"base_{name}_token": _number(before.get("body_token_mean"))}
        row |= {column.format(name): _number(losses.get(key))
                for key, column in _LOSS_COLUMNS.items()}
        for epoch, part in enumerate(record.get("epochs") or [], start=1):
            row[f"loss_{name}_epoch{epoch}"] = over_prompts(part[name])
    if RELEVANCE in spec["evals"]:
        row["relevance"] = row[f"loss_{RELEVANCE}"] - row["loss_eval_1"]
        row["base_relevance"] = row[f"base_{RELEVANCE}"] - row["base_eval_1"]
    return row | {name: record.get(name) for name in _PLAIN_COLUMNS}


def _accuracies(record: Record, task: str) -> dict[str, float]:
    parts = {f"{own}accuracy_{task}": record.get(f"{own}choices", {}).get(task, {})
             for own in ("", "base_")}
    return {name + end: _number(part.get(key)) for name, part in parts.items()
            for end, key in (("", "acc"), ("_norm", "acc_norm"))}


def over_prompts(losses: Mapping[str, float | None]) -> float:
    """The study's first loss of a record: mean over prompts, over the answers' body."""
    return _number(losses.get("body_prompt_mean"))


def _number(value: float | None) -> float:
    return np.nan if value is None else value


class RunArchive:
    """A folder of Parquet parts, one row a finished run; read as a `Ledger` is.

    Columns: run_id, purpose, status; `record`, the record as JSON without its losses by prompt; and
    these, `<evaluation set>.<column>`, a list with one value a prompt: int32 as it is (tokens),
    int64 in millionths of a nat. A run that two parts hold is that of the first by name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def has(self, run_id: str) -> bool:
        """Whether the run is here, and so finished."""
        return run_id in self._rows

    def read(self, run_id: str) -> Record | None:
        """The whole record of a run, or None."""
        if not self.has(run_id):
            return None
        part, row, text = self._rows[run_id]
        record = json.loads(text)
        for name in part.column_names:
            values = part[name][row].as_py() if "." in name else None
            if values is not None:
                evaluation, _, column = name.rpartition(".")
                if part.schema.field(name).type.value_type == pa.int64():
                    values = [None if one is None else one / UNIT for one in values]
                record["examples"][evaluation][column] = values
        return record

    def records(self) -> dict[str, Record]:
        """Every record by run_id, without its losses by prompt."""
        return {run_id: json.loads(text) for run_id, (_, _, text) in self._rows.items()}

    def load(self) -> pd.DataFrame:
        """One row a run, sorted by run_id; see `ledger.tidy`."""
        return tidy([record for _, record in sorted(self.records().items())])

    def append(self, records: Iterable[Record]) -> Path | None:
        """Add the finished runs that no part holds as one part; None without any."""
        clear_leftovers(self.folder)
        new = {one["run_id"]: one for one in records
               if settled(one) and not self.has(one["run_id"])}  # fmt: skip
        if not new:
            return None
        digest = hashlib.sha256("\n".join(sorted(new)).encode()).hexdigest()[:8]
        last = max(record["ended"] for record in new.values())
        path = self.folder / f"{last[:10]}-{digest}.parquet"
        table = _table([new[run_id] for run_id in sorted(new)])
        with being_written(path) as temporary:
            losses = [f"{name}.list.element" for name in table.column_names if "." in name]
            pq.write_table(table, temporary, compression="zstd", compression_level=19,
                           use_dictionary=False, data_page_size=PAGE, row_group_size=len(table),
                           use_byte_stream_split=losses)  # fmt: skip
        del self._rows
        return path

    @cached_property
    def _rows(self) -> dict[str, tuple[pa.Table, int, str]]:
        """run_id -> its part, its row there, its record's JSON."""
        found: dict[str, tuple[pa.Table, int, str]] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            part = pq.read_table(path, partitioning=None)
            texts = zip(part["run_id"].to_pylist(), part["record"].to_pylist(), strict=True)
            for row, (run_id, text) in enumerate(texts):
                found.setdefault(run_id, (part, row, text))
        return found


class ContinuedLedger(Ledger):
    """A ledger that goes on from an archive: what is finished there is not run again."""

    def __init__(self, folder: str | Path, archive: RunArchive) -> None:
        super().__init__(folder)
        self.archive = archive

    def read(self, run_id: str) -> Record | None:
        """The record in the ledger; where that is not finished, the archive's, if it has one."""
        record = super().read(run_id)
        return record if settled(record) else self.archive.read(run_id) or record

    def kept(self, run_ids: Iterable[str]) -> int:
        """How many of these runs are finished in the archive alone."""
        return sum(self.archive.has(one) and not settled(super(ContinuedLedger, self).read(one))
                   for one in set(run_ids))  # fmt: skip

    def records(self) -> dict[str, Record]:
        """Every record by run_id; those of the archive without their losses by prompt."""
        own, kept = super().records(), self.archive.records()
        return kept | {name: one for name, one in own.items() if settled(one) or name not in kept}


def _table(records: Sequence[Record]) -> pa.Table:
    """One row a record, as `RunArchive` tells; what is no list of numbers stays in the JSON."""
    lists: dict[str, list] = {}
    for row, record in enumerate(records):
        for evaluation, columns in record["examples"].items():
            for column, values in columns.items():
                name = f"{evaluation}.{column}"
                lists.setdefault(name, [None] * len(records))[row] = values
    packed = {name: one for name in sorted(lists) if (one := _packed(lists[name])) is not None}
    texts = []
    for record in records:
        rest = {evaluation: {column: values for column, values in columns.items()
                             if f"{evaluation}.{column}" not in packed}
                for evaluation, columns in record["examples"].items()}  # fmt: skip
        texts.append(json.dumps(record | {"examples": rest}))
    plain = {"run_id": [one["run_id"] for one in records],
             "purpose": [one["spec"]["purpose"] for one in records],
             "status": [one["status"] for one in records], "record": texts}  # fmt: skip
    return pa.table(plain | packed)


def _packed(lists: Sequence[list | None]) -> pa.Array | None:
    """One column over the runs as `WHOLE` or `MILLIONTHS`; None where neither gives it back."""
    numbers = [one for values in lists if values for one in values if one is not None]
    if all(type(one) is int and abs(one) < 2**31 for one in numbers):
        return pa.array(lists, WHOLE)
    if not all(type(one) is float and round(one * UNIT) / UNIT == one for one in numbers):
        return None
    return pa.array([values and [None if one is None else round(one * UNIT) for one in values]
                     for values in lists], MILLIONTHS)  # fmt: skip
