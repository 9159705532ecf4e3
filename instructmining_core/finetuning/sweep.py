"""Many runs, each once: skip what the ledger holds, train the rest together, keep going.

Killed and started again it goes on where it was. A run that fails leaves a record and is tried
again by the next start; one that diverged is a result and stays. Two sweeps on one ledger, on one
machine or on several that see its folder, share the runs.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..models.causal_lm import LM
from .finetune import can_share_a_pass
from .ledger import Ledger, over_prompts, settled, tidy
from .run import Rows, check_run
from .run_spec import EvalSets, Record, RunSpec
from .trainer import adapters_per_pass
from .workers import WORTH, Workers, do_group, one_thread, sweep_job, worker_devices

LOOK = 0.2  # seconds between looks at the runs of other processes
CORE_FLOP = 5e11  # a second, of one core: bfloat16 products on an AMD EPYC with AVX512-BF16


def run_sweep(
    specs: Sequence[RunSpec], lm: LM, rows: Rows, evals: EvalSets, ledger: Ledger, *,
    together: int | None = None, workers: int | None = None, by_epoch: Collection[str] = (),
    cluster: Any = None, progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Do every run that the ledger does not hold.

    specs : the runs; one that is named twice is done once
    rows : row hash -> encoded training row; evals : encoded evaluation rows
    together : adapters in one pass; None lets memory and the processor decide
    workers : processes beside this one; None takes the machine's further cores or GPUs when the
        sweep is long enough; no number of a run depends on it beyond float rounding
    by_epoch : run_ids that are also evaluated after each epoch
    cluster : does the groups in place of this machine's processes (`ray_engine.RaySweep`)
    progress : a bar with runs done, time left, best and worst loss so far

    returns : one row a specification, in their order, with its own label (see `ledger.tidy`)

    An error in one run is its record's `error`; errors in the specifications themselves (rows not
    given) are raised before any run.
    """
    unique = {spec.run_id: spec for spec in specs}
    ledger.clear()
    watch = Watch(unique, ledger, progress)
    todo = [unique[run_id] for run_id in watch.waiting]
    for spec in todo:
        check_run(spec, lm, rows, evals)
    cluster = cluster if todo else None  # which would be connected to for nothing
    devices = worker_devices(lm, workers) if len(todo) > 2 and cluster is None else []
    groups = groups_of(todo, lm, together, cluster.slots() if cluster else 1 + len(devices))
    options = {"by_epoch": by_epoch, "tried": watch.tried}
    job = sweep_job(groups, lm, rows, evals, ledger, **options) if devices or cluster else {}
    crew = cluster or Workers(devices, job)
    # a GPU's share is a group of its own, not one run of many
    if workers or "cpu" not in devices or least_seconds(todo, lm, rows) > WORTH:
        crew.start()
    do = partial(do_group, lm=lm, rows=rows, evals=evals, ledger=ledger, **options)
    if cluster:
        cluster.begin(job, lm, ledger)
        do = cluster.do
    try:
        with one_thread() if "cpu" in devices else nullcontext():
            _work(groups, do, watch, crew)
    finally:
        crew.stop()
        watch.bar.close()
        ledger.clear()
    records = [ledger.read(spec.run_id) for spec in specs]
    return tidy([r | {"label": s.label} for r, s in zip(records, specs, strict=True)])


def least_seconds(todo: Sequence[RunSpec], lm: LM, rows: Rows) -> float:
    """What the training alone of these runs takes one core of a fast processor."""
    flop, depth, size = 0.0, lm.config.num_hidden_layers, lm.model.num_parameters()
    for spec in todo:
        part = (spec.finetune.layers or depth) / depth  # of the base, passed through there and back
        tokens = spec.finetune.epochs * sum(len(rows[h]) for h in spec.row_hashes)
        flop += 4 * part * size * tokens
    return flop / CORE_FLOP


def groups_of(
    todo: Sequence[RunSpec], lm: LM, together: int | None, processes: int = 1
) -> list[list[RunSpec]]:
    """Runs that share a pass: one configuration, longest first so that the ends fall together.

    together : as for `run_sweep`; None also leaves a group to each of `processes`
    """
    kinds: dict[str, list[RunSpec]] = {}
    for spec in todo:
        key = repr(spec.finetune) if can_share_a_pass(spec.finetune) else spec.run_id
        kinds.setdefault(key, []).append(spec)
    groups = []
    for kind in kinds.values():
        kind = sorted(kind, key=lambda spec: -spec.finetune.steps(len(spec.row_hashes)))
        size = together or min(adapters_per_pass(lm, kind[0].finetune), -(-len(kind) // processes))
        size = size if can_share_a_pass(kind[0].finetune) else 1
        groups += [kind[i : i + size] for i in range(0, len(kind), size)]
    return groups


def _work(groups, do: Callable[[list[RunSpec]], int], watch: Watch, crew: Workers) -> None:
    """Do the groups in order; then what a worker left; then wait for what others are at."""
    begun, done = time.monotonic(), 0
    while watch.waiting:
        progress = 0
        for group in groups:
            group = [spec for spec in group if spec.run_id in watch.waiting]
            progress += do(group) if group else 0
            watch.look()
            done += bool(group)
            left = len(watch.waiting) * (time.monotonic() - begun) / max(1, done * len(groups[0]))
            if left > WORTH:
                crew.start()
            for text in crew.fallen():
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        if not progress and watch.waiting:
            watch.wait_for_others()
            watch.look()


class Watch:
    """The runs still missing, and a bar: runs done, time left, best and worst loss so far.

    tried : run_id -> attempts recorded when the sweep began; waiting : run_ids, in order
    """

    def __init__(self, specs: Mapping[str, RunSpec], ledger: Ledger, progress: bool) -> None:
        self.ledger = ledger
        records = {run_id: ledger.read(run_id) for run_id in specs}
        self.tried = {run_id: r["attempt"] if r else 0 for run_id, r in records.items()}
        self.waiting = dict.fromkeys(run_id for run_id, r in records.items() if not settled(r))
        self.losses = [loss for r in records.values() if r for loss in _first_loss(r)]
        # not tqdm.auto: a notebook's widget would not reach the terminal that papermill writes to
        self.bar = tqdm(total=len(specs), initial=len(specs) - len(self.waiting), desc="runs",
                        unit="run", smoothing=0, disable=not progress)
        self._show_losses()

    def look(self) -> None:
        """Count the records written since the last look, by whichever process."""
        for run_id in list(self.waiting):
            record = self.ledger.read(run_id)
            if settled(record, self.tried[run_id]):
                del self.waiting[run_id]
                self.losses += _first_loss(record)
                if record["status"] != "done" and not self.bar.disable:
                    why = f": {record['error']}" if record["error"] else ""
                    self.bar.write(f"run {run_id} {record['status']}{why}", file=sys.stderr)
                self.bar.set_description("runs", refresh=False)
                self._show_losses()
                self.bar.update()

    def wait_for_others(self) -> None:
        """Sleep a moment, and meanwhile say who has the runs that are left."""
        owners = [owner for run_id in self.waiting if (owner := self.ledger.owner(run_id))]
        if owners:
            self.bar.set_description(f"runs (waiting for {owners[0]}, {len(owners)} left)")
        time.sleep(LOOK)

    def _show_losses(self) -> None:
        if self.losses:
            self.bar.set_postfix(best=f"{min(self.losses):.4f}", worst=f"{max(self.losses):.4f}",
                                 refresh=not self.waiting)


def _first_loss(record: Record) -> list[float]:
    """The first evaluation set's loss, in a list; empty where there is none."""
    losses = [over_prompts(part) for part in record.get("losses", {}).values()]
    return [loss for loss in losses[:1] if np.isfinite(loss)]
