"""One run is one function of one specification: train, evaluate, say what came out.

Nothing here touches the ledger, so that any executor may call it, and call it again.

What a run was made with: versions, commit, hardware. Nothing of the user: no names, no paths.

The specification of one run, and its hash: the run's name.

Two runs that differ in anything that can change a number have different names; where a model's
folder lies, or what a figure will call the run, changes no number and is not hashed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..config import FinetuneConfig, ModelRef
from ..data.tokenization import TEMPLATE_VERSION, Encoded
from ..models.causal_lm import LM
from ..models.distributed import join
from ..models.loss import evaluate
from .finetune import Meter, check_rows, finetune, stackable
from .multi_lora import MultiLoRA
from .packing import PackedModel
from .trainer import TrainingJob, train

if TYPE_CHECKING:
    from ..models.causal_lm import LM


PACKAGES = ("instructmining", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")

_PATH = re.compile(r"(?:[A-Za-z]:\\|(?<![\w.:/])/)(?:[^\s'\",:;()<>]+[/\\])+")


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
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if str(device).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def without_paths(text: str) -> str:
    """`text` with each absolute path cut to its last part: a record names no user's folders."""
    return _PATH.sub("", text)


@functools.cache
def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


RECORD = 1  # version of a record's layout


class SpecError(ValueError):
    """A specification that names no run."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change the numbers of one run, and a label that cannot.

    purpose : what the run is for ("fit", "verify", ...); part of the hash
    base : the resolved model: id, revision (commit or content hash), dtype it is computed in.
        A folder is named by its last part, so that the hash does not hang on where it lies.
    finetune : how the set becomes a model
    row_hashes : the training rows (`records.row_hash`), in the set's order
    init_seed, order_seed : of the adapter's first values; of the rows' order
    evals : name of an evaluation set -> hash of its rows (`hash_rows`)
    template : `templates.TEMPLATE_VERSION`
    label : set_id, arm, shares, tilt, source, anchor, ...: recorded as columns, not hashed
    """

    purpose: str
    base: ModelRef
    finetune: FinetuneConfig
    row_hashes: tuple[str, ...]
    init_seed: int
    order_seed: int
    evals: Mapping[str, str]
    template: str
    label: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.row_hashes:
            raise SpecError(f"A run for {self.purpose!r} has no training rows.")
        object.__setattr__(self, "row_hashes", tuple(self.row_hashes))
        object.__setattr__(self, "evals", dict(sorted(self.evals.items())))
        if Path(self.base.id).is_absolute():
            base = dataclasses.replace(self.base, id=Path(self.base.id).name)
            object.__setattr__(self, "base", base)

    @classmethod
    def of(
        cls,
        purpose: str,
        lm: LM,
        finetune: FinetuneConfig,
        row_hashes: Sequence[str],
        evals: Mapping[str, Sequence[Encoded]],
        *,
        init_seed: int = 0,
        order_seed: int = 0,
        label: Mapping[str, Any] | None = None,
    ) -> RunSpec:
        """The specification of a run of a loaded model on encoded evaluation sets."""
        dtype = str(lm.dtype).removeprefix("torch.")
        return cls(
            purpose, ModelRef(lm.resolved.id, lm.resolved.revision, dtype), finetune,
            tuple(row_hashes), init_seed, order_seed,
            {name: hash_encoded(rows) for name, rows in evals.items()}, TEMPLATE_VERSION,
            dict(label or {}),
        )

    def content(self) -> dict[str, Any]:
        """What is hashed, as plain JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["label"]
        fields["base"] = dataclasses.asdict(self.base)
        fields["finetune"] = dataclasses.asdict(self.finetune)
        return json.loads(json.dumps(fields, default=plain))

    @property
    def sha256(self) -> str:
        """Hash of the whole specification."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the specification's hash."""
        return self.sha256[:16]

    def head(self) -> dict[str, Any]:
        """What every record of the run begins with, however the run ended."""
        return {
            "record": RECORD, "run_id": self.run_id, "spec": self.content(),
            "spec_sha256": self.sha256, "data_sha256": hash_rows(self.row_hashes),
            "label": dict(self.label), "rows": len(self.row_hashes),
        }


def spec_from(content: Mapping[str, Any], label: Mapping[str, Any] | None = None) -> RunSpec:
    """The specification of a record's `spec`: the inverse of `RunSpec.content`."""
    finetune = dict(content["finetune"])
    for name in ("betas", "target_modules"):
        if isinstance(finetune[name], list):
            finetune[name] = tuple(finetune[name])
    fields = dict(content)
    fields["base"] = ModelRef(**content["base"])
    fields["finetune"] = FinetuneConfig(**finetune)
    return RunSpec(**fields, label=dict(label or {}))


def hash_rows(hashes: Sequence[str]) -> str:
    """One hash for an ordered list of row hashes, 64 hex digits."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def hash_encoded(rows: Sequence[Encoded]) -> str:
    """One hash for encoded rows in their order: ids and targets, 64 hex digits."""
    return hash_rows([f"{row.ids}{[int(t) for t in row.targets]}" for row in rows])


def plain(value: Any) -> Any:
    """What json cannot write, as what it can: NumPy values and sets as lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


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
    jobs = [TrainingJob([rows[h] for h in s.row_hashes], s.init_seed, s.order_seed) for s in specs]
    stack = MultiLoRA(lm.model, specs[0].finetune, [spec.init_seed for spec in specs])
    epochs = [_Epochs(spec, evals, by_epoch) for spec in specs]

    def after_epoch(adapter: int, epoch: int) -> None:
        stack.use(adapter)
        epochs[adapter].look(lm, epoch)

    stack.attach()
    try:
        trained = train(stack, PackedModel(lm), jobs, group=join(), on_epoch=after_epoch)
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
