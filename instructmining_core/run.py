"""One run is one function of one specification: train, evaluate, say what came out.

Nothing here touches the ledger, so that any executor may call it, and call it again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .distributed import join
from .evaluate import evaluate
from .finetune import Meter, check_rows, finetune, stackable
from .lm import LM
from .packed import Body
from .provenance import commit, hardware, versions, without_paths
from .runspec import RunSpec, hash_encoded
from .stacked import AdapterStack
from .templates import Encoded
from .training import Job, train

Rows = Mapping[str, Encoded]
Evals = Mapping[str, Sequence[Encoded]]
EVAL_TOKENS = 4096  # padded tokens of an evaluation batch on a CPU: small enough for its cache


class RunError(ValueError):
    """A specification that does not fit the data or the model it is given."""


def run_one(
    spec: RunSpec, lm: LM, rows: Rows, evals: Evals, *,
    by_epoch: bool | Collection[str] = False, keep: str | Path | None = None,
) -> dict[str, Any]:
    """Finetune and evaluate one specification.

    rows : row hash -> encoded training row; must hold every row of the specification
    evals : name -> encoded evaluation rows; names and hashes must be the specification's
    by_epoch : also evaluate after each epoch, or do so for these run_ids; changes no other number
    keep : folder where `<run_id>/` gets the adapter as peft saves it (a fully trained model as
        transformers does); None keeps none

    returns : the run's record, with `status` "done" or "diverged"; see `Ledger`
    """
    check(spec, lm, rows, evals)
    if stackable(spec.finetune):
        return run_together([spec], lm, rows, evals, by_epoch=by_epoch, keep=keep)[0]
    started, epochs = _now(), _Epochs(spec, evals, by_epoch)
    data = [rows[h] for h in spec.row_hashes]
    tuned = finetune(lm, data, spec.finetune, init_seed=spec.init_seed,
                     order_seed=spec.order_seed, on_epoch=epochs.look)
    try:
        begun = time.perf_counter()
        losses, examples = _losses(tuned.lm, {} if tuned.diverged else evals)
        evaluated = time.perf_counter() - begun
        if keep is not None and not tuned.diverged:
            _keep(Path(keep) / spec.run_id, tuned.save)
    finally:
        tuned.close()
    seconds = {"train": tuned.seconds - epochs.seconds, "evaluate": evaluated + epochs.seconds}
    return _record(spec, lm, tuned.curve, losses, examples, epochs.with_last(losses), started,
                   seconds, tuned.peak_memory_bytes, tuned.diverged, 1)


def run_together(
    specs: Sequence[RunSpec], lm: LM, rows: Rows, evals: Evals, *,
    by_epoch: bool | Collection[str] = False, keep: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The same for several specifications in one pass over the base; records in their order.

    All must have one finetune configuration, LoRA or rsLoRA without dropout. Seconds are each
    run's part of the whole by training tokens; the peak is that of the whole.
    """
    for spec in specs:
        check(spec, lm, rows, evals)
    started, meter = _now(), Meter(lm.device)
    jobs = [Job([rows[h] for h in s.row_hashes], s.init_seed, s.order_seed) for s in specs]
    stack = AdapterStack(lm.model, specs[0].finetune, [spec.init_seed for spec in specs])
    epochs = [_Epochs(spec, evals, by_epoch) for spec in specs]

    def after_epoch(adapter: int, epoch: int) -> None:
        stack.use(adapter)
        epochs[adapter].look(lm, epoch)

    stack.attach()
    try:
        trained = train(stack, Body(lm), jobs, group=join(), on_epoch=after_epoch)
        seconds = meter.read()[0] - sum(one.seconds for one in epochs)
        begun = time.perf_counter()
        found = []
        for adapter, course in enumerate(trained.courses):
            stack.use(adapter)
            found.append(_losses(lm, {} if course.diverged else evals))
        evaluated = (time.perf_counter() - begun) / len(specs)
        _, peak = meter.read()
    finally:
        stack.detach()
    for k, spec in enumerate(specs):
        if keep is not None and not trained.courses[k].diverged:
            _keep(Path(keep) / spec.run_id,
                  lambda to, k=k: join().first and stack.save(k, to, lm.resolved.id))
    tokens = [sum(len(row) for row in job.rows) for job in jobs]
    return [
        _record(spec, lm, trained.curve(k), *found[k], epochs[k].with_last(found[k][0]), started,
                {"train": seconds * tokens[k] / sum(tokens),
                 "evaluate": evaluated + epochs[k].seconds},
                peak, trained.courses[k].diverged, len(specs))
        for k, spec in enumerate(specs)
    ]


class _Epochs:
    """The losses after each epoch of a run, where they are wanted, and the seconds they took."""

    def __init__(self, spec: RunSpec, evals: Evals, by_epoch: bool | Collection[str]) -> None:
        self.wanted = by_epoch if isinstance(by_epoch, bool) else spec.run_id in by_epoch
        self.last, self.evals = spec.finetune.epochs, evals
        self.losses: list[dict[str, dict]] = []
        self.seconds = 0.0

    def look(self, lm: LM, epoch: int) -> None:
        """Evaluate after an epoch; the last one's losses are the run's own."""
        if self.wanted and epoch < self.last:
            begun = time.perf_counter()
            self.losses.append(_losses(lm, self.evals)[0])
            self.seconds += time.perf_counter() - begun

    def with_last(self, losses: dict[str, dict]) -> list[dict[str, dict]]:
        """One entry an epoch that was finished; a run that diverged has no last one."""
        return [*self.losses, losses] if self.wanted and losses else self.losses


def _keep(folder: Path, save: Callable[[Path], None]) -> None:
    """Save into a folder that is there whole or not at all; of several processes the first."""
    part, first = folder.with_name(f".{folder.name}.part"), join().first
    if first:  # one claim a run, so one writer
        shutil.rmtree(part, ignore_errors=True)
    save(part)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)


def failure(spec: RunSpec, lm: LM, error: BaseException) -> dict[str, Any]:
    """The record of a run that raised `error`."""
    return _head(spec, lm, _now()) | {
        "status": "failed", "error": without_paths(f"{type(error).__name__}: {error}")[:2000]
    }


def check(spec: RunSpec, lm: LM, rows: Rows, evals: Evals) -> None:
    """Raise RunError where the specification names other rows, evaluations or another base."""
    missing = [h for h in spec.row_hashes if h not in rows]
    if missing:
        raise RunError(f"Run {spec.run_id} names {len(missing)} rows that were not given, "
                       f"the first {missing[0]}.")
    found = {name: hash_encoded(part) for name, part in evals.items()}
    if found != dict(spec.evals):
        raise RunError(f"Run {spec.run_id} is for evaluation sets {dict(spec.evals)}, "
                       f"given were {found}.")
    if spec.base.revision != lm.resolved.revision:
        raise RunError(f"Run {spec.run_id} is for base revision {spec.base.revision}, "
                       f"given was {lm.resolved.revision}.")
    check_rows([rows[h] for h in spec.row_hashes])


def _losses(lm: LM, evals: Evals) -> tuple[dict[str, dict], dict[str, dict]]:
    """Losses and example lists by evaluation set."""
    losses, examples = {}, {}
    tokens = 16384 if str(lm.device).startswith("cuda") else EVAL_TOKENS
    for name, part in evals.items():
        losses[name], frame = evaluate(lm, part, batch_tokens=tokens)
        examples[name] = _lists(frame)
    return losses, examples


def _lists(frame: pd.DataFrame) -> dict[str, list]:
    columns = ("nll", "tokens", "nll_first64", "tokens_first64", "nll_eos")
    return {name: np.round(frame[name].to_numpy(), 6).tolist() for name in columns}


def _head(spec: RunSpec, lm: LM, started: str) -> dict[str, Any]:
    return spec.head() | {
        "stand_in": lm.resolved.stand_in, "started": started, "ended": _now(),
        "versions": versions(), "commit": commit(), "hardware": hardware(lm.device),
    }


def _record(spec, lm, curve, losses, examples, epochs, started, seconds, peak, diverged,
            together) -> dict[str, Any]:
    finite = all(np.isfinite(part["prompt_mean"]) for part in losses.values())
    return _head(spec, lm, started) | {
        "status": "diverged" if diverged or not finite else "done",
        "losses": losses, "examples": examples, "epochs": epochs,
        "curve": curve.to_dict("list"), "steps": len(curve),
        "tokens_trained": int(curve["tokens"].sum()),
        "final_train_loss": float(curve["loss"].iloc[-1]),
        "seconds": sum(seconds.values()), "seconds_by_part": seconds,
        "peak_memory_bytes": peak, "together": together, "error": None,
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


