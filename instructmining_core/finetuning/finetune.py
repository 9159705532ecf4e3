"""A training set becomes a model: LoRA and its kin by adapters, or all weights.

LoRA and rsLoRA without dropout go through `MultiLoRA`, also when there is one adapter, so a run has
one set of numbers whether it was trained alone or in company. Everything else (all weights, DoRA,
adapters with dropout) goes through transformers' `Trainer`, with the steps, rows, rates and loss of
`trainer.train`.

The loss of a step is the sum of the targets' negative log-likelihoods over all its rows divided by
their number of target tokens: not a mean of micro-batch means, and however many processes share it
(`accelerate launch` or torchrun). The base's own dropout is off.

A base that one GPU cannot hold: load it on the CPU and launch with accelerate's FSDP; only
`Finetuned.save` then gives whole weights. Documented for GPUs, not measured here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..config import FinetuneConfig, InstructMiningError
from ..data.tokenization import Encoded
from ..models.batching import is_out_of_memory, pad
from ..models.causal_lm import LM
from ..models.trunk import on_trunk
from .lora import MultiLoRA, peft_config, set_first_values
from .packing import PackedModel
from .trainer import Schedule, TrainingJob, schedule, train

OnEpoch = Callable[[LM, int], bool | None]
IGNORED = -100  # the label of what is no target
FILLING = Encoded((0, 0), (False, False))  # fills a step up to as many micro-batches everywhere


@dataclass
class Finetuned:
    """A finetuned model.

    lm : for `response_nll`, generation and the like, until `close`; curve : `Schedule.curve`
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

    lm : the base, given back untouched by `Finetuned.close`
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
    return Finetuned(tuned, trained.curve(), *meter.read(), trained.diverged, save,
                     lambda: release(tuned.model))  # fmt: skip


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
            trained = train(adapters, PackedModel(lm), [job], on_epoch=after_epoch)[0]
        adapters.use(0)
        return Finetuned(tuned, trained.curve(), *meter.read(), trained.diverged,
                         lambda folder: adapters.save(0, folder, lm.resolved.id),
                         stack.pop_all().close)


class Meter:
    """Seconds and peak memory from here on."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, str(device).startswith("cuda")
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError):  # not Linux: the peak since the process began is all there is
            Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()

    def read(self) -> tuple[float, int]:
        """Seconds since the start; peak bytes of the GPU, or of the process."""
        seconds = time.perf_counter() - self.start
        if self.gpu:
            return seconds, torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return seconds, peak if sys.platform == "darwin" else 1024 * peak


def train_by_trainer(
    lm: LM, job: TrainingJob, config: FinetuneConfig, *, on_epoch: OnEpoch | None = None
) -> tuple[LM, Schedule, Callable[[Path], None]]:
    """Train all weights or a peft adapter; on_epoch : as in `finetune`.

    returns : the trained model (`release` gives the base back), its losses, and what saves it

    Where memory runs out in the first epoch it begins anew with half as many rows at once.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    longest = max(len(row) for row in job.rows)
    at_once = min(math.ceil(config.batch_size / processes), max(1, config.micro_tokens // longest))
    while True:
        tuned = dataclasses.replace(lm, model=_trainable(lm, config, job.init_seed))
        steps = _Steps(tuned, schedule(job, config), on_epoch)
        try:
            save = _train(tuned, config, steps, at_once, processes)
            return tuned, steps.schedule, save
        except BaseException as error:
            release(tuned.model)
            anew = at_once > 1 and processes == 1 and not steps.epochs_told
            if not (anew and isinstance(error, Exception) and is_out_of_memory(error)):
                raise
        at_once //= 2


def release(model: nn.Module) -> None:
    """Take an adapter off its base, which is then as it was."""
    if isinstance(model, PeftModel):
        base = model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config


def _trainable(lm: LM, config: FinetuneConfig, init_seed: int) -> nn.Module:
    """A float32 copy of the base, or a PeftModel around the base."""
    base = lm.model
    # float16 has no range for the gradients of a mean over thousands of tokens
    if config.method == "full" or lm.dtype == torch.float16:
        base = copy.deepcopy(base).float()
    if config.method == "full":
        return base.requires_grad_(True)
    model = get_peft_model(base, peft_config(config, base))
    set_first_values(model, init_seed)
    return model


def _train(tuned: LM, config, steps: _Steps, at_once: int, processes: int) -> Callable:
    """Let the Trainer train; what saves the model afterwards."""
    micro = math.ceil(config.batch_size / (processes * at_once))
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        arguments = TrainingArguments(
            output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1, logging_nan_inf_filter=False, remove_unused_columns=False,
            use_cpu=tuned.device == "cpu" and "ACCELERATE_USE_FSDP" not in os.environ,
            dataloader_pin_memory=tuned.device != "cpu", train_sampling_strategy="sequential",
            num_train_epochs=1, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=micro, max_grad_norm=config.clip,
            seed=steps.schedule.job.init_seed % 2**32,
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # else one process would take all GPUs
        trainer = _SumTrainer(
            tuned.model, arguments, data_collator=_collate, compute_loss_func=_loss,
            train_dataset=in_order(steps.schedule, processes * at_once * micro),
            callbacks=[steps],
        )  # fmt: skip
        trainer.config, trainer.rates = config, steps.schedule.rates
        copied = tuned.dtype == torch.bfloat16 != next(tuned.model.parameters()).dtype
        trainer.mixed = torch.autocast(arguments.device.type, torch.bfloat16, enabled=copied)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    tuned.model.eval()
    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    sharded = trainer.is_fsdp_enabled
    accelerator.free_memory()  # else the optimiser's moments would live as long as the model

    def save(to: Path) -> None:
        whole = {"state_dict": accelerator.get_state_dict(wrapped)} if sharded else {}
        if accelerator.is_main_process:
            tuned.model.save_pretrained(str(to), **whole)

    return save


def in_order(plan: Schedule, slots: int) -> list[Encoded]:
    """The rows of all steps one after the other, each step filled up to so many.

    Similar lengths stand together, as they will be padded to the longest.
    """
    found: list[Encoded] = []
    for step in plan.steps:
        rows = [plan.job.rows[i] for i in step]
        found += sorted([*rows, *[FILLING] * (slots - len(rows))], key=len)
    return found


def _collate(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    ids, mask = pad([row.ids for row in rows], 0)
    targets, _ = pad([row.targets for row in rows], 0)
    labels = np.where(targets.astype(bool), ids, IGNORED)
    labels[:, 0] = IGNORED  # nothing stands before it
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels)}  # fmt: skip


def _loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The targets' summed negative log-likelihoods over the number of targets in the whole step."""
    after = labels[:, 1:]
    targets = after != IGNORED
    logits = outputs.logits[:, :-1][targets].float()
    total = F.cross_entropy(logits, after[targets], reduction="sum")
    return total / num_items_in_batch.clamp(min=1)


class _SumTrainer(Trainer):
    """The Trainer with the study's optimiser, rates and dropout."""

    config: FinetuneConfig
    rates: np.ndarray
    mixed: torch.autocast

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        parameters = [p for p in model.parameters() if p.requires_grad]
        config = self.config
        self.optimizer = torch.optim.AdamW(parameters, config.learning_rate, config.betas,
                                           weight_decay=config.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        factors = [*self.rates / self.config.learning_rate, 0.0]  # it looks one step ahead
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, factors.__getitem__)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, *arguments, **options):
        for name, module in model.named_modules():  # the base's own dropout stays off
            module.training = "lora_dropout" in name
        with self.mixed:
            return super().compute_loss(model, inputs | {"use_cache": False}, *arguments, **options)


class _Steps(TrainerCallback):
    """Each step's loss, read from the Trainer's log, and what ends a training early."""

    def __init__(self, tuned: LM, plan: Schedule, on_epoch: OnEpoch | None) -> None:
        self.tuned, self.schedule, self.on_epoch = tuned, plan, on_epoch
        self.epochs_told = 0

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in logs:  # the Trainer's summary
            return
        step, plan = state.global_step - 1, self.schedule
        plan.losses[step] = logs["loss"]
        if not np.isfinite(logs["loss"]):
            plan.ended, plan.diverged = step + 1, True
        elif plan.epoch_ends(step) and self.on_epoch is not None:
            self.epochs_told += 1
            if self.on_epoch(self.tuned, int(plan.epoch[step]) + 1):
                plan.ended = step + 1
        control.should_training_stop |= plan.ended is not None
