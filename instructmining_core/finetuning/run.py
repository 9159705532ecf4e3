"""One run is one function of one specification: train, evaluate, say what came out.

Nothing here touches the ledger, so that any engine may call it, and call it again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InstructMiningError
from ..data.choices import EncodedChoices, accuracy
from ..data.tokenization import Encoded
from ..models.causal_lm import COLUMNS, LM, evaluate, response_nll
from ..models.trunk import on_trunk
from .finetune import Meter, can_share_a_pass, check_rows, finetune
from .lora import MultiLoRA
from .packing import packing
from .run_spec import EvalSets, Record, RunSpec, now
from .trainer import TrainingJob, train

Rows = Mapping[str, Encoded]

EVAL_TOKENS = {"cpu": 4096, "cuda": 16384}  # padded tokens of an evaluation batch: for the caches
PACKAGES = ("instructmining", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")

_PATH = re.compile(r"(?:[A-Za-z]:\\|(?<![\w.:/])/)(?:[^\s'\",:;()<>]+[/\\])+")


def check_run(spec: RunSpec, lm: LM, rows: Rows, evals: EvalSets) -> None:
    """Raise where the specification names other rows, evaluation sets or another base."""
    missing = [h for h in spec.row_hashes if h not in rows]
    if missing:
        raise InstructMiningError(f"Run {spec.run_id} names {len(missing)} rows that were not "
                                  f"given, the first {missing[0]}.")
    for what, own, given in (("evaluation sets", spec.evals, evals.hashes),
                             ("base revision", spec.base.revision, lm.resolved.revision)):
        if own != given:
            raise InstructMiningError(f"Run {spec.run_id} is for {what} {own}, given: {given}.")
    check_rows([rows[h] for h in spec.row_hashes])


def run_one(
    spec: RunSpec, lm: LM, rows: Rows, evals: EvalSets, *, by_epoch: Collection[str] = ()
) -> Record:
    """Finetune and evaluate one specification; its record, with `status` "done" or "diverged".

    rows : row hash -> encoded training row; evals : encoded evaluation rows
    by_epoch : run_ids that are also evaluated after each epoch; changes no other number
    Raises as `check_run`.
    """
    if can_share_a_pass(spec.finetune):
        return run_together([spec], lm, rows, evals, by_epoch=by_epoch)[0]
    check_run(spec, lm, rows, evals)
    started, epochs = now(), _Epochs(spec, evals, by_epoch)
    data, base = [rows[h] for h in spec.row_hashes], _of_base(lm, evals)
    tuned = finetune(lm, data, spec.finetune, init_seed=spec.init_seed,
                     order_seed=spec.order_seed, on_epoch=epochs.look)
    try:
        begun = time.perf_counter()
        found = _evaluated(tuned.lm, EvalSets() if tuned.diverged else evals)
        evaluated = time.perf_counter() - begun
    finally:
        tuned.close()
    seconds = {"train": tuned.seconds - epochs.seconds, "evaluate": evaluated + epochs.seconds}
    return _record(spec, lm, tuned.curve, found, epochs, started, seconds,
                   tuned.peak_memory_bytes, tuned.diverged, 1, base)


def run_together(
    specs: Sequence[RunSpec], lm: LM, rows: Rows, evals: EvalSets, *,
    by_epoch: Collection[str] = (),
) -> list[Record]:  # fmt: skip
    """The same for several specifications in one pass over the base; records in their order.

    All must have one finetune configuration, LoRA or rsLoRA without dropout. Seconds are each
    run's part of the whole by training tokens; the peak is that of the whole.
    """
    for spec in specs:
        check_run(spec, lm, rows, evals)
    started = now()
    jobs = [TrainingJob([rows[h] for h in s.row_hashes], s.init_seed, s.order_seed) for s in specs]
    adapters = MultiLoRA(lm.model, specs[0].finetune, [spec.init_seed for spec in specs])
    epochs = [_Epochs(spec, evals, by_epoch) for spec in specs]

    def after_epoch(adapter: int, epoch: int) -> None:
        with adapters.alone(adapter):
            epochs[adapter].look(lm, epoch)

    needed = chain(*(job.rows for job in jobs), evals.rows())
    with on_trunk(lm, specs[0].finetune.layers, needed), packing(lm) as model:
        base, meter = _of_base(lm, evals), Meter(lm.device)
        with adapters.attached():
            trained = train(adapters, model, jobs, on_epoch=after_epoch)
            seconds = meter.read()[0] - sum(one.seconds for one in epochs)
            begun = time.perf_counter()
            found = []
            for adapter, plan in enumerate(trained):
                with adapters.alone(adapter):
                    found.append(_evaluated(lm, EvalSets() if plan.diverged else evals))
        evaluated = (time.perf_counter() - begun) / len(specs)
        _, peak = meter.read()
    tokens = [sum(len(row) for row in job.rows) for job in jobs]
    return [
        _record(spec, lm, trained[k].curve(), found[k], epochs[k], started,
                {"train": seconds * tokens[k] / sum(tokens),
                 "evaluate": evaluated + epochs[k].seconds},
                peak, trained[k].diverged, len(specs), base)
        for k, spec in enumerate(specs)
    ]  # fmt: skip


def failure(spec: RunSpec, lm: LM, error: BaseException) -> Record:
    """The record of a run that raised `error`."""
    return _head(spec, lm, now()) | {
        "status": "failed", "error": without_paths(f"{type(error).__name__}: {error}")[:2000]
    }  # fmt: skip


class _Epochs:
    """The losses after each epoch of a run, where they are wanted, and the seconds they took."""

    def __init__(self, spec: RunSpec, evals: EvalSets, by_epoch: Collection[str]) -> None:
        self.wanted, self.last, self.evals = spec.run_id in by_epoch, spec.finetune.epochs, evals
        self.losses: list[dict[str, dict]] = []
        self.seconds = 0.0

    def look(self, lm: LM, epoch: int) -> None:
        """Evaluate after an epoch; the last one's losses are the run's own."""
        if self.wanted and epoch < self.last:
            begun = time.perf_counter()
            self.losses.append(_evaluated(lm, EvalSets(self.evals))["losses"])
            self.seconds += time.perf_counter() - begun

    def with_last(self, losses: dict[str, dict]) -> list[dict[str, dict]]:
        """One entry an epoch that was finished; a run that diverged has no last one."""
        return [*self.losses, losses] if self.wanted and losses else self.losses


def _evaluated(lm: LM, evals: EvalSets) -> dict[str, dict]:
    """Losses and example lists by evaluation set, accuracies by multiple-choice task."""
    losses, examples, choices = {}, {}, {}
    tokens = EVAL_TOKENS["cuda" if str(lm.device).startswith("cuda") else "cpu"]
    for name, part in evals.items():
        losses[name], frame = evaluate(lm, part, batch_tokens=tokens)
        examples[name] = {one: np.round(frame[one].to_numpy(), 6).tolist() for one in COLUMNS[:-1]}
    for name, task in evals.choices.items():
        choices[name] = accuracy(task, _nll_of_choices(lm, task, tokens))
    return {"losses": losses, "examples": examples} | ({"choices": choices} if choices else {})


def _nll_of_choices(lm: LM, task: EncodedChoices, tokens: int) -> np.ndarray:
    """Summed nll of each row, in nats; where rows lie packed, a question's prompt is computed once.

    tokens : of a batch
    """
    lengths, numbers = np.array([len(row) for row in task.rows]), np.array(task.question)
    if lm.packed is None or lengths.max(initial=0) > lm.max_positions():
        return response_nll(lm, task.rows, batch_tokens=tokens)["nll"].to_numpy()
    lm.model.eval()
    last = lengths.cumsum()[np.searchsorted(numbers, numbers, side="right") - 1]  # of the question
    sums: list[float] = []
    for number in np.unique(last // tokens):
        chosen = np.flatnonzero(last // tokens == number)
        rows = [task.rows[i] for i in chosen]
        nll = lm.packed.nll(rows, numbers[chosen]).double().cpu().numpy()
        parts = np.split(nll, np.cumsum([sum(row.targets[1:]) for row in rows])[:-1])
        sums += [part.sum() for part in parts]
    return np.array(sums)


def _of_base(lm: LM, evals: EvalSets) -> dict[str, dict]:
    """The base before any finetuning, as its records name it; computed once a process."""
    key = (lm.resolved.revision, str(lm.dtype))
    if key not in evals.of_base:
        found = _evaluated(lm, evals)
        evals.of_base[key] = {f"base_{part}": found[part] for part in found if part != "examples"}
    return evals.of_base[key]


def _head(spec: RunSpec, lm: LM, started: str) -> Record:
    return spec.head() | {
        "stand_in": lm.resolved.stand_in, "started": started, "ended": now(),
        "versions": versions(), "commit": commit(), "hardware": hardware(lm.device),
    }  # fmt: skip


def _record(spec, lm, curve, found, epochs, started, seconds, peak, diverged, together,
            base) -> Record:  # fmt: skip
    finite = all(np.isfinite(part["prompt_mean"]) for part in found["losses"].values())
    return _head(spec, lm, started) | {
        "status": "diverged" if diverged or not finite else "done",
        **found, **base, "epochs": epochs.with_last(found["losses"]),
        "curve": curve.to_dict("list"), "steps": len(curve),
        "tokens_trained": int(curve["tokens"].sum()),
        "final_train_loss": float(curve["loss"].iloc[-1]),
        "seconds": sum(seconds.values()), "seconds_by_part": seconds,
        "peak_memory_bytes": peak, "together": together, "error": None,
    }  # fmt: skip


# What a run was made with. Nothing of the user: no names, no paths.


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that compute, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """This checkout's commit, with "+changed" where files of the package differ; None elsewhere."""
    here = Path(__file__).resolve().parent.parent
    head = _git(here, "rev-parse", "HEAD")
    if head is None or _git(here, "ls-files", "--error-unmatch", "finetuning/run.py") is None:
        return None
    return head + ("+changed" if _git(here, "status", "--porcelain", "--", ".") else "")


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores in use, memory in bytes, and the GPU's name where one computes."""
    import psutil
    import torch

    found = {
        "processor": _processor(), "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if str(device).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        if torch.backends.cuda.matmul.allow_tf32:
            found["float32_products"] = "tf32"
    return found


def without_paths(text: str) -> str:
    """`text` with each absolute path cut to its last part: a record names no user's folders."""
    return _PATH.sub("", text)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"^model name\s*: *(.*)", info, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
