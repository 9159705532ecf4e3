"""A training set becomes a model: LoRA and its kin by adapters, or all weights.

LoRA and rsLoRA without dropout go through `MultiLoRA`, also when there is one adapter, so a run has
one set of numbers whether it was trained alone or in company. Everything else goes through
transformers' `Trainer` (`full.py`).

The loss of a step is the sum of the targets' negative log-likelihoods over all its rows divided by
their number of target tokens: not a mean of micro-batch means. The base's own dropout is off.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..config import FinetuneConfig, InstructMiningError
from ..data.tokenization import Encoded
from ..models.causal_lm import LM
from ..models.trunk import on_trunk
from .full import OnEpoch, release, train_by_trainer
from .multi_lora import MultiLoRA
from .packing import PackedModel
from .trainer import TrainingJob, train


@dataclass
class Finetuned:
    """A finetuned model.

    lm : for `response_nll`, generation and the like, until `close`
    curve : step, epoch (both from 1), lr, loss (nats per target token), tokens (targets)
    seconds : of training, wall clock; peak_memory_bytes : of the process, or of the GPU
    diverged : a step's loss was not a number, and training ended there
    save : writes the adapter into a folder as peft does, a fully trained model as transformers
        does; of several processes the first writes, and all must call it
    close : gives the base model back untouched; `lm` is then the base again, or useless
    """

    lm: LM
    curve: pd.DataFrame
    seconds: float
    peak_memory_bytes: int
    diverged: bool
    save: Callable[[Path], None] = dataclasses.field(repr=False)
    close: Callable[[], None] = dataclasses.field(repr=False)


def finetune(
    lm: LM, rows: Sequence[Encoded], config: FinetuneConfig, *,
    init_seed: int, order_seed: int, on_epoch: OnEpoch | None = None,
) -> Finetuned:  # fmt: skip
    """Finetune on rows.

    lm : the base; frozen, and given back untouched by `Finetuned.close`
    rows : encoded training examples; those without a target count nothing
    init_seed : of the adapter's first values; order_seed : of the order of rows
    on_epoch : called with the model and the epoch (from 1) after each; a true answer ends training

    Raises InstructMiningError for a set without targets.
    """
    check_rows(rows)
    job = TrainingJob(rows, init_seed, order_seed)
    if can_share_a_pass(config):
        return _by_multi_lora(lm, job, config, on_epoch)
    meter = Meter(lm.device)
    tuned, trained, save = train_by_trainer(lm, job, config, on_epoch=on_epoch)
    return Finetuned(tuned, trained.curve(0), *meter.read(), trained.schedules[0].diverged,
                     save, lambda: release(tuned.model))


def can_share_a_pass(config: FinetuneConfig) -> bool:
    """Whether `MultiLoRA` trains runs with this configuration: LoRA or rsLoRA without dropout."""
    return config.method in ("lora", "rslora") and config.dropout == 0


def check_rows(rows: Sequence[Encoded]) -> None:
    """Raise InstructMiningError where there is nothing to learn from."""
    if not any(any(row.targets[1:]) for row in rows):
        raise InstructMiningError(
            f"None of the {len(rows)} training rows has a target token. Are the responses empty, "
            "or is max_tokens smaller than the prompts?"
        )


def _by_multi_lora(lm, job, config, on_epoch) -> Finetuned:
    adapters, tuned = MultiLoRA(lm.model, config, [job.init_seed]), dataclasses.replace(lm)

    def after_epoch(_: int, epoch: int) -> bool | None:
        adapters.use(0)
        return on_epoch and on_epoch(tuned, epoch)

    meter = Meter(lm.device)
    with ExitStack() as stack:
        stack.enter_context(adapters.attached())
        with on_trunk(lm, config.layers, job.rows):
            trained = train(adapters, PackedModel(lm), [job], on_epoch=after_epoch)
        adapters.use(0)
        return Finetuned(tuned, trained.curve(0), *meter.read(), trained.schedules[0].diverged,
                         lambda folder: adapters.save(0, folder, lm.resolved.id),
                         stack.pop_all().close)


class Meter:
    """Seconds and peak memory from here on."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, str(device).startswith("cuda")
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak()
        self.start = time.perf_counter()

    def read(self) -> tuple[float, int]:
        """Seconds since the start; peak bytes of the GPU, or of the process."""
        seconds = time.perf_counter() - self.start
        return seconds, torch.cuda.max_memory_allocated(self.device) if self.gpu else _peak()


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak since the process began is all there is


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
