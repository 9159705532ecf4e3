"""A training set becomes a model: LoRA and its kin by adapters, or all weights.

LoRA and rsLoRA go through the stack (`stacked.py`), also when there is one adapter, so a run has
one set of numbers whether it was trained alone or in company. DoRA, adapter dropout, and anything
asked for with `engine="peft"`, go through peft's own layers; "full" trains a copy of the model.

The loss of a step is the sum of the targets' negative log-likelihoods over all its rows divided by
their number of target tokens: not a mean of micro-batch means. The base's own dropout is off.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..config import FinetuneConfig
from ..data.tokenization import Encoded
from ..models.causal_lm import LM
from ..models.distributed import join, sharding
from . import peft_trainer
from .lora import peft_config, set_first_values
from .multi_lora import MultiLoRA
from .packing import PackedModel
from .peft_trainer import train_by_torch
from .trainer import TrainingJob, train

OnEpoch = Callable[[LM, int], bool | None]


class FinetuneError(ValueError):
    """A training set or a configuration that cannot be trained on."""


@dataclass
class Finetuned:
    """A finetuned model.

    lm : for `response_nll`, generation and the like, until `close`
    curve : step, epoch (both from 1), lr, loss (nats per target token), tokens (targets)
    seconds : of training, wall clock; peak_memory_bytes : of the process, or of the GPU
    diverged : a step's loss was not a number, and training ended there
    """

    lm: LM
    curve: pd.DataFrame
    seconds: float
    peak_memory_bytes: int
    diverged: bool
    _save: Callable[[Path], None] = dataclasses.field(repr=False)
    _close: Callable[[], None] = dataclasses.field(repr=False)

    def save(self, folder: str | Path) -> None:
        """Write the adapter as peft does; a fully trained model as transformers does.

        Of several processes the first writes; all must call it.
        """
        self._save(Path(folder))

    def close(self) -> None:
        """Give the base model back untouched; `lm` is then the base again, or useless."""
        self._close()


def finetune(
    lm: LM,
    rows: Sequence[Encoded],
    config: FinetuneConfig,
    *,
    init_seed: int,
    order_seed: int,
    on_epoch: OnEpoch | None = None,
    progress: bool = False,
    engine: str = "auto",
    packed: bool | None = None,
    shard: bool | None = None,
) -> Finetuned:
    """Finetune on rows.

    lm : the base; frozen, and given back untouched by `Finetuned.close`
    rows : encoded training examples; those without a target count nothing
    init_seed : of the adapter's first values; order_seed : of the order of rows
    on_epoch : called with the model and the epoch (from 1) after each; a true answer ends training
    engine : "auto" (see the module), "stacked" or "peft"
    packed : rows end to end (True) or right-padded (False); None asks the model
    shard : cut the weights of a copy of the base up among the processes (`sharded`), for one that
        a GPU cannot hold; None asks the environment (`distributed.sharding`). No number hangs on
        it but by rounding

    Under `accelerate launch` the rows of every step are shared among the processes.
    Raises FinetuneError for an empty set, or where the stack or a single process shall `shard`.
    """
    check_rows(rows)
    job, shard = TrainingJob(rows, init_seed, order_seed), sharding() if shard is None else shard
    if shard and (engine == "stacked" or join().size == 1):
        raise FinetuneError("A base is cut up among several processes, and not by the stack.")
    if engine == "auto":
        engine = "stacked" if stackable(config) and not shard else "peft"
    if engine == "stacked":
        return _by_stack(lm, job, config, on_epoch, progress, packed)
    return _by_torch(lm, job, config, on_epoch, progress, packed, shard)


def stackable(config: FinetuneConfig) -> bool:
    """Whether runs with this configuration can share one pass: LoRA or rsLoRA without dropout.

    Not over a base that is cut up among processes.
    """
    return config.method in ("lora", "rslora") and config.dropout == 0 and not sharding()


def check_rows(rows: Sequence[Encoded]) -> None:
    """Raise FinetuneError where there is nothing to learn from."""
    if not any(any(row.targets[1:]) for row in rows):
        raise FinetuneError(
            f"None of the {len(rows)} training rows has a target token. Are the responses empty, "
            "or is max_tokens smaller than the prompts?"
        )


def _by_stack(lm, job, config, on_epoch, progress, packed) -> Finetuned:
    group, stack = join(), MultiLoRA(lm.model, config, [job.init_seed])
    stack.attach()
    tuned = dataclasses.replace(lm)
    hook = on_epoch and (lambda _, epoch: _evaluating(stack, tuned, on_epoch, epoch))
    meter = Meter(lm.device)
    try:
        trained = train(stack, PackedModel(lm, packed=packed), [job], group=group, on_epoch=hook,
                        progress=progress)
    except BaseException:
        stack.detach()
        raise
    stack.use(0)
    return Finetuned(
        tuned, trained.curve(0), *meter.read(), trained.courses[0].diverged,
        lambda folder: group.first and stack.save(0, folder, lm.resolved.id), stack.detach,
    )


def _evaluating(stack, tuned, on_epoch, epoch):
    stack.use(0)
    return on_epoch(tuned, epoch)


def _by_torch(lm, job, config, on_epoch, progress, packed, shard) -> Finetuned:
    group = join()
    model = _trainable(lm, config, job.init_seed, shard)
    if shard:
        peft_trainer.cut(model, lm.device, group)
    tuned = dataclasses.replace(lm, model=model)
    meter = Meter(lm.device)
    try:
        trained = train_by_torch(tuned, job, config, group, on_epoch=on_epoch, progress=progress,
                                 packed=packed, cut=shard)
    except BaseException:
        _unwrap(model)
        raise

    def save(folder: Path) -> None:
        state = {"state_dict": peft_trainer.gathered(model)} if shard else {}
        if group.first:
            model.save_pretrained(str(folder), **state)

    return Finetuned(
        tuned, trained.curve(0), *meter.read(), trained.courses[0].diverged,
        save, lambda: _unwrap(model),
    )


def _trainable(lm: LM, config: FinetuneConfig, init_seed: int, shard: bool) -> nn.Module:
    """A PeftModel around the base (around a copy, to be cut up), or a float32 copy of the base."""
    if config.method == "full":
        return copy.deepcopy(lm.model).float().requires_grad_(True)
    model = get_peft_model(copy.deepcopy(lm.model) if shard else lm.model, peft_config(config))
    set_first_values(model, init_seed)
    return model


def _unwrap(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        base = model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config


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
