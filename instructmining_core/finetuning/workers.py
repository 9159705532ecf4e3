"""Who does the runs: take them in the ledger, train, write records; further processes do the same.

Any number of processes may do so on one ledger, and one that is killed costs the runs it was at.
The operations of a small model are too short to be worth two threads each, so on a CPU two
processes of one thread do nearly twice the runs of one process of two. On GPUs each has its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import ModelRef
from ..data.choices import EncodedChoices
from ..data.tokenization import Encoded
from ..models.batching import is_out_of_memory
from ..models.causal_lm import LM, load_lm
from .ledger import Ledger, Taken
from .run import Rows, cores, failure, run_one, run_together, without_paths
from .run_spec import EvalSets, Record, RunSpec

WORTH = 30.0  # seconds of work left that make a worker's start (5 to 8 s of imports) worth it
MOST = 8  # processes of a sweep on one CPU
COMMAND = (sys.executable, "-m", "instructmining_core.finetuning.workers")


def do_group(
    group: Sequence[RunSpec], lm: LM, rows: Rows, evals: EvalSets, ledger: Ledger, *,
    by_epoch: Collection[str] = (), tried: Mapping[str, int] | None = None,
) -> int:  # fmt: skip
    """Take the runs of a group, do them, write their records; how many were done or failed.

    by_epoch : see `run_one`; tried : attempts of each run_id when the sweep began: what failed
    since is left alone
    """
    mine = take(group, ledger, tried)
    return put(mine, attempt(mine, lm, rows, evals, by_epoch), ledger)


def take(
    group: Sequence[RunSpec], ledger: Ledger, tried: Mapping[str, int] | None
) -> list[RunSpec]:
    """Those runs of a group that this process may do, their leases taken; `tried` as above."""
    return [spec for spec in group
            if ledger.lock_run(spec, tried=None if tried is None else tried.get(spec.run_id, 0))]


def put(mine: Sequence[RunSpec], records: Iterable[Record], ledger: Ledger) -> int:
    """Write the records of taken runs as they come, give all leases back; how many were written."""
    written = 0
    try:
        for record in records:
            try:
                ledger.write(record)
            except Taken:  # this process was taken for dead; the record of who took over stands
                continue
            written += 1
    finally:
        for spec in mine:
            ledger.release(spec.run_id)
    return written


def attempt(mine, lm, rows, evals, by_epoch) -> Iterator[Record]:
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
        yield from attempt(mine[start : start + size], lm, rows, evals, by_epoch)


def worker_devices(lm: LM, wanted: int | None) -> list[str]:
    """Where processes beside this one may work: a further core each, or a further GPU each.

    wanted : None: all there are. A model that lies in no folder gets none: who could load it?
    """
    device = torch.device(lm.device)
    if lm.resolved.folder is None or device.type not in ("cpu", "cuda"):
        return []
    if device.type == "cuda":
        mine = torch.cuda.current_device() if device.index is None else device.index
        return [f"cuda:{k}" for k in range(torch.cuda.device_count()) if k != mine][:wanted]
    return ["cpu"] * (min(cores(), MOST) - 1 if wanted is None else wanted)


class Workers:
    """The further processes of one sweep: one for each of `devices`, all on the same job."""

    def __init__(self, devices: Sequence[str], job: Mapping[str, Any]) -> None:
        self.devices, self.job = list(devices), job
        self.processes: dict[subprocess.Popen, Any] = {}  # and what each complains of
        self._told: set[int] = set()

    def start(self) -> None:
        """Start them once; later calls do nothing."""
        if self.processes or not self.devices:
            return
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as job:
            json.dump(self.job, job)
            job.flush()
            for device in self.devices:
                threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
                errors = tempfile.TemporaryFile()
                with open(job.name, "rb") as own:  # read from the start by each
                    process = subprocess.Popen(
                        [*COMMAND, device, str(os.getpid())], env=environment | threads,
                        stdin=own, stdout=subprocess.DEVNULL, stderr=errors)
                self.processes[process] = errors

    def fallen(self) -> list[str]:
        """What to say of workers that ended with an error since the last call."""
        found = []
        for process, errors in self.processes.items():
            if process.poll() and process.pid not in self._told:  # neither at work nor ended well
                self._told.add(process.pid)
                errors.seek(0)
                lines = errors.read().decode("utf-8", "replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
                found.append(f"A worker of the sweep ended with code {process.returncode}, the "
                             f"others go on: {without_paths(last)}")
        return found

    def stop(self) -> None:
        """End them; a run they are at is lost, its lease is free again."""
        for process in self.processes:
            process.terminate()
        for process, errors in self.processes.items():
            process.wait()
            errors.close()


def sweep_job(
    groups: Sequence[Sequence[RunSpec]], lm: LM, rows: Rows, evals: EvalSets, ledger: Ledger, *,
    by_epoch: Collection[str], tried: Mapping[str, int],
) -> Record:  # fmt: skip
    """A sweep as JSON values: all that a process needs which sees the model's and ledger's folders.

    `groups` are lists of (`RunSpec.content()`, label), each one pass; options as in `do_group`.
    """
    used = {h for group in groups for spec in group for h in spec.row_hashes}
    return {
        "groups": [[(s.content(), s.label) for s in group] for group in groups],
        "model": {"id": str(lm.resolved.folder), "dtype": str(lm.dtype).split(".")[-1]},
        "resolved": {name: value for name, value in dataclasses.asdict(lm.resolved).items()
                     if name != "folder"},
        "rows": {h: _plain(rows[h]) for h in used},
        "evals": {name: [_plain(row) for row in part] for name, part in evals.items()},
        "choices": {name: vars(part) | {"rows": [_plain(row) for row in part.rows]}
                    for name, part in evals.choices.items()},
        "ledger": str(ledger.folder.resolve()),
        "options": {"by_epoch": list(by_epoch), "tried": dict(tried)},
    }  # fmt: skip


def _plain(row: Encoded) -> list:
    return [list(row.ids), [int(t) for t in row.targets], row.dropped, row.truncated]


def _encoded(row: list) -> Encoded:
    return Encoded(tuple(row[0]), tuple(map(bool, row[1])), row[2], row[3])


def read_job(job: Mapping[str, Any], lm: LM) -> tuple[Rows, EvalSets]:
    """Training rows and evaluation sets of a job; its model takes the name it has there."""
    lm.resolved = dataclasses.replace(lm.resolved, **job["resolved"])
    rows = {h: _encoded(row) for h, row in job["rows"].items()}
    evals = EvalSets(
        {name: [_encoded(row) for row in part] for name, part in job["evals"].items()},
        choices={name: EncodedChoices(**part | {"rows": [_encoded(row) for row in part["rows"]]})
                 for name, part in job["choices"].items()},
    )  # fmt: skip
    return rows, evals


def work_on(job: Mapping[str, Any], lm: LM, parent: int) -> None:
    """Do a sweep's groups, from the last to the first, while the process that began it lives."""
    rows, evals = read_job(job, lm)
    ledger = Ledger(job["ledger"])
    for group in reversed(job["groups"]):
        if os.getppid() != parent:
            return
        specs = [RunSpec.from_content(content, label) for content, label in group]
        do_group(specs, lm, rows, evals, ledger, **job["options"])


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(device: str, parent: int) -> None:
    """A worker's process: the job comes on standard input."""
    job = json.load(sys.stdin)
    work_on(job, load_lm(ModelRef(**job["model"]), device), parent)


if __name__ == "__main__":
    _begin(sys.argv[1], int(sys.argv[2]))
