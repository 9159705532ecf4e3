"""More processes at one sweep on a CPU: one thread each, the ledger deals the runs.

The operations of a small model are too short to be worth two threads each, so two processes of one
thread do nearly twice the runs of one process of two. A helper is an ordinary executor: it claims
a run in the ledger, does it, writes its record. It ends when nothing is left or its parent is gone.

Another engine can drive the same executor, on any host that sees the model's and the ledger's
folders. It starts

    python -m instructmining_core.finetuning.workers JOB.json PID

JOB.json : what `describe` returns, as JSON. `groups` are lists of (`RunSpec.content()`, label);
    each group is one pass over the base: claim its runs, `run_one` or `run_together`, write their
    records (`sweep_executor.do_group`)
PID : the starting process; before each group the helper looks whether it still is its parent

Groups are taken from the last to the first. Exit code 0: none is left that it could claim. Any
number may work on one ledger, and one that is killed costs the runs it was at, which are free again
at once (on another host: after `ledger_claims.EXPIRES` seconds).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import ModelRef
from ..data.tokenization import Encoded
from ..models.causal_lm import LM, load_lm
from .executor import do_group
from .ledger import Ledger, RunSpec, spec_from
from .run import without_paths

WORTH = 30.0  # seconds of work left that make a helper's start (5 to 8 s of imports) worth it
RATE = 5e10  # FLOP/s of small models on one core of an EPYC, all between the products included


def helpers_wanted(lm: LM, wanted: int | None) -> int:
    """How many helpers beside this process: one for each further core, on a CPU.

    wanted : asked for by the caller; None decides. A model that lies in no folder gets none, as a
    helper could not load it.
    """
    if not str(lm.device).startswith("cpu") or lm.resolved.folder is None:
        return 0
    if wanted is not None:
        return max(0, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(cores or 1, 8) - 1)


def guessed_seconds(
    groups: Sequence[Sequence[RunSpec]], lm: LM, rows: Mapping[str, Encoded],
    evals: Mapping[str, Sequence[Encoded]],
) -> float:
    """What the runs may take in one process of one thread, before any of them is measured.

    Only good enough to tell a sweep of minutes, whose helpers should start at once, from a short
    one: the layers' products of a training step (4 x the weights a token; 2 to evaluate) at `RATE`.
    """
    runs = [spec for group in groups for spec in group]
    trained = sum(s.finetune.epochs * sum(len(rows[h]) for h in s.row_hashes) for s in runs)
    evaluated = len(runs) * sum(len(row) for part in evals.values() for row in part)
    weights = sum(p.numel() for p in lm.model.parameters())
    weights -= lm.model.get_input_embeddings().weight.numel()
    return weights * (4 * trained + 2 * evaluated) / RATE


class Helpers:
    """The helper processes of one sweep; their job and what they complain of lie in `folder`."""

    command: tuple[str, ...] = (sys.executable, "-m", "instructmining_core.finetuning.workers")

    def __init__(self, count: int, job: Mapping[str, Any], folder: Path) -> None:
        self.count, self.job, self.folder = count, job, folder
        self.processes: list[subprocess.Popen] = []
        self._told: set[int] = set()

    def start(self) -> None:
        """Start them once; later calls do nothing."""
        if self.processes or not self.count:
            return
        path = self.folder / ".helpers.job"
        path.write_text(json.dumps(self.job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [package, os.environ.get("PYTHONPATH")]))
        for number in range(self.count):
            with open(self._errors(number), "wb") as errors:
                self.processes.append(subprocess.Popen(
                    [*self.command, str(path.resolve()), str(os.getpid())],
                    env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=errors))

    def fallen(self) -> list[str]:
        """What to say of helpers that ended with an error since the last call."""
        found = []
        for number, process in enumerate(self.processes):
            if process.poll() and number not in self._told:  # neither at work nor ended well
                self._told.add(number)
                lines = self._errors(number).read_text("utf-8", "replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
                found.append(f"A helper of the sweep ended with code {process.returncode}, the "
                             f"others go on: {without_paths(last)}")
        return found

    def stop(self) -> None:
        """End them; a run they are at is lost, its claim is free again."""
        for process in self.processes:
            process.terminate()
        for number, process in enumerate(self.processes):
            process.wait()
            self._errors(number).unlink(missing_ok=True)
        (self.folder / ".helpers.job").unlink(missing_ok=True)

    def _errors(self, number: int) -> Path:
        return self.folder / f".helper{number}.log"


def describe(
    groups: Sequence[Sequence[RunSpec]],
    lm: LM,
    rows: Mapping[str, Encoded],
    evals: Mapping[str, Sequence[Encoded]],
    ledger: Ledger,
    *,
    by_epoch: bool | Collection[str] = False,
    keep: str | Path | None = None,
    tried: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A sweep as JSON values, for helpers; by_epoch, keep, tried: see `sweep_executor.do_group`."""
    used = {h for group in groups for spec in group for h in spec.row_hashes}
    return {
        "groups": [[(s.content(), dict(s.label)) for s in group] for group in groups],
        "model": {"folder": str(lm.resolved.folder), "dtype": str(lm.dtype).split(".")[-1]},
        "resolved": {"id": lm.resolved.id, "revision": lm.resolved.revision,
                     "stand_in": lm.resolved.stand_in, "sha256": lm.resolved.sha256},
        "rows": {h: _encoded(rows[h]) for h in used},
        "evals": {name: [_encoded(row) for row in part] for name, part in evals.items()},
        "ledger": str(ledger.folder.resolve()),
        "by_epoch": by_epoch if isinstance(by_epoch, bool) else sorted(by_epoch),
        "keep": None if keep is None else str(Path(keep).resolve()),
        "tried": None if tried is None else dict(tried),
    }


def _encoded(row: Encoded) -> list:
    return [list(row.ids), [int(t) for t in row.targets], row.dropped, row.truncated]


def _decoded(row: list) -> Encoded:
    return Encoded(tuple(row[0]), tuple(map(bool, row[1])), row[2], row[3])


@contextmanager
def one_thread():
    """torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(path: str, parent: int) -> None:
    """Load a described sweep's model and work on it."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    lm = load_lm(ModelRef(job["model"]["folder"], dtype=job["model"]["dtype"]), "cpu")
    work(job, lm, parent)


def work(job: Mapping[str, Any], lm: LM, parent: int) -> None:
    """Do a described sweep's groups, from the last to the first, while the parent lives."""
    lm.resolved = dataclasses.replace(lm.resolved, **job["resolved"])
    rows = {h: _decoded(row) for h, row in job["rows"].items()}
    evals = {name: [_decoded(row) for row in part] for name, part in job["evals"].items()}
    ledger = Ledger(job["ledger"])
    options = {name: job[name] for name in ("by_epoch", "keep", "tried")}
    for group in reversed(job["groups"]):
        if os.getppid() != parent:
            return
        specs = [spec_from(content, label) for content, label in group]
        do_group(specs, lm, rows, evals, ledger, **options)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
