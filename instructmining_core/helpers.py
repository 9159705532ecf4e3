"""More processes at one sweep on a CPU: one thread each, the ledger deals the runs.

The operations of a small model are too short to be worth two threads each, so two processes of one
thread do nearly twice the runs of one process of two. A helper is an ordinary executor: it claims
a run in the ledger, does it, writes its record. It ends when nothing is left or its parent is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .ledger import Ledger, RunSpec, spec_from
from .lm import LM
from .templates import Encoded

WORTH = 30.0  # seconds of work left that make a helper's start (5 to 8 s of imports) worth it


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


class Helpers:
    """The helper processes of one sweep."""

    def __init__(self, count: int, job: Mapping[str, Any]) -> None:
        self.count, self.job = count, job
        self.processes: list[subprocess.Popen] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def start(self) -> None:
        """Start them once; later calls do nothing."""
        if self.processes or not self.count:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="instructmining-")
        path = Path(self._folder.name) / "job.json"
        path.write_text(json.dumps(self.job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        package = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [package, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", f"{__package__}.helpers", str(path), str(os.getpid())]
        self.processes = [
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(self.count)
        ]

    def stop(self) -> None:
        """End them; a run they are at is lost, its claim is free again."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()
        if self._folder is not None:
            self._folder.cleanup()


def describe(
    groups: Sequence[Sequence[RunSpec]],
    lm: LM,
    rows: Mapping[str, Encoded],
    evals: Mapping[str, Sequence[Encoded]],
    ledger: Ledger,
    by_epoch: bool,
) -> dict[str, Any]:
    """A sweep as JSON values, for helpers."""
    used = {h for group in groups for spec in group for h in spec.row_hashes}
    return {
        "groups": [[(s.content(), dict(s.label)) for s in group] for group in groups],
        "model": {"folder": str(lm.resolved.folder), "dtype": str(lm.dtype).split(".")[-1]},
        "resolved": {"id": lm.resolved.id, "revision": lm.resolved.revision,
                     "stand_in": lm.resolved.stand_in, "sha256": lm.resolved.sha256},
        "rows": {h: _encoded(rows[h]) for h in used},
        "evals": {name: [_encoded(row) for row in part] for name, part in evals.items()},
        "ledger": str(ledger.folder.resolve()), "by_epoch": by_epoch,
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
    """Work on a described sweep, from its end towards its beginning, while the parent lives."""
    from .lm import load_lm
    from .profiles import ModelRef
    from .sweep import do_group

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    lm = load_lm(ModelRef(job["model"]["folder"], dtype=job["model"]["dtype"]), "cpu")
    lm.resolved = dataclasses.replace(lm.resolved, **job["resolved"])
    rows = {h: _decoded(row) for h, row in job["rows"].items()}
    evals = {name: [_decoded(row) for row in part] for name, part in job["evals"].items()}
    ledger = Ledger(job["ledger"])
    for group in reversed(job["groups"]):
        if os.getppid() != parent:
            return
        specs = [spec_from(content, label) for content, label in group]
        do_group(specs, lm, rows, evals, ledger, by_epoch=job["by_epoch"])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
