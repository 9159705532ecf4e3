"""A sweep under `accelerate launch`: several processes at each run, the first one keeps the ledger.

    accelerate launch --num_processes 4 -m instructmining_core.sweep_launched job.json

where `write_job` wrote `job.json`. Started again after a kill it goes on where it was.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .distributed import leave
from .ledger import Ledger, RunSpec
from .lm import LM, load_lm
from .profiles import ModelRef
from .run import Evals, Rows
from .sweep import groups_of
from .sweep_helpers import describe, work


def write_job(
    path: str | Path, specs: Sequence[RunSpec], lm: LM, rows: Rows, evals: Evals, ledger: Ledger,
    *, together: int | None = None, keep: str | Path | None = None,
) -> None:
    """Write a sweep as one JSON file, for `main`.

    specs, rows, evals, ledger, together, keep : as for `run_sweep`; with `together` None, what the
        memory beside `lm` holds here decides
    lm : the base, on any device; its folder must be there for the launch as well
    """
    left = [spec for spec in {s.run_id: s for s in specs}.values() if not ledger.has(spec.run_id)]
    groups = groups_of(left, lm, rows, together)
    job = describe(groups, lm, rows, evals, ledger, keep=keep)
    Path(path).write_text(json.dumps(job), encoding="utf-8")


def main(path: str) -> None:
    """Do a job's runs: each process loads the base on its own device, all do every run together."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    model: Mapping[str, str] = job["model"]
    lm = load_lm(ModelRef(model["folder"], dtype=model["dtype"]))
    work(job, lm, os.getppid())
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
