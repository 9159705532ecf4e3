"""Train K adapters in one pass over the base: each step's loss exact, each adapter as if alone.

Seeds fix which rows are in which step and at which rate, not what computes it. A step's gradient is
a sum over its rows with weights that the whole step fixes, so how the rows are cut into
micro-batches changes nothing but the order in which that sum is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch

from ..config import FinetuneConfig
from ..data.tokenization import Encoded
from ..models.batching import free_bytes, free_gpu_cache, is_out_of_memory, trainable_tokens
from ..models.causal_lm import LM, unwrapped
from .lora import MultiLoRA, shapes, target_layers
from .packing import PackedModel

ON_GPU = 64  # at most
_BYTES = 22  # of one adapter's number: value, gradient, two moments, all float32, and work copies
_TRAINED = 0.35  # of the free memory, for the activations of a micro-batch
_SHARE = 0.25  # of the free memory, for adapters; a micro-batch's size does not hang on K


@dataclass(frozen=True)
class TrainingJob:
    """One adapter's rows and seeds."""

    rows: Sequence[Encoded]
    init_seed: int
    order_seed: int


@dataclass
class Schedule:
    """One training's steps, and how far it came.

    steps : row positions of each step; epoch : epoch of each step, from 0
    rates : learning rate of each step; tokens : target tokens of each step
    losses : of each step before its update, nats per target token
    ended : steps taken when it ended early (NaN, or `on_epoch` said so), else None
    """

    job: TrainingJob
    steps: list[np.ndarray]
    epoch: np.ndarray
    rates: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray = field(repr=False)
    ended: int | None = None
    diverged: bool = False

    def active(self, step: int) -> bool:
        """Whether this step is to be taken."""
        return step < len(self.steps) and self.ended is None

    def epoch_ends(self, step: int) -> bool:
        """Whether this step is the last of its epoch."""
        last = step + 1 == len(self.steps)
        return last or self.epoch[step + 1] != self.epoch[step]

    def curve(self) -> pd.DataFrame:
        """step (from 1), epoch (from 1), lr, loss (nats per target token), tokens (targets)."""
        n = len(self.steps) if self.ended is None else self.ended
        return pd.DataFrame({
            "step": np.arange(1, n + 1), "epoch": self.epoch[:n] + 1, "lr": self.rates[:n],
            "loss": self.losses[:n], "tokens": self.tokens[:n],
        })


def schedule(job: TrainingJob, config: FinetuneConfig) -> Schedule:
    """The steps of one training."""
    by_epoch = row_order(len(job.rows), config.epochs, config.batch_size, job.order_seed)
    steps = [step for epoch in by_epoch for step in epoch]
    counts = np.array([sum(row.targets[1:]) for row in job.rows])
    return Schedule(
        job, steps, np.repeat(np.arange(config.epochs), [len(e) for e in by_epoch]),
        learning_rates(config, len(steps)), np.array([counts[step].sum() for step in steps]),
        np.zeros(len(steps)),
    )


def row_order(rows: int, epochs: int, batch_size: int, order_seed: int) -> list[list[np.ndarray]]:
    """Row positions of each step of each epoch: epochs x steps arrays of at most `batch_size`.

    Every epoch is a new permutation; its last step holds what is left. The same seed gives the same
    order for every set of the same size.
    """
    plan = []
    for epoch in range(epochs):
        order = np.random.default_rng([order_seed, epoch]).permutation(rows)
        plan.append([order[i : i + batch_size] for i in range(0, rows, batch_size)])
    return plan


def learning_rates(config: FinetuneConfig, steps: int) -> np.ndarray:
    """Learning rate of each step, shape (steps,).

    Linear warm-up over `ceil(warmup_share * steps)` steps, the first of which already moves
    (transformers 5 starts at 0 and so spends a step on nothing: 1 of 24 in a small study), then
    transformers' cosine or line to zero, or a constant.
    """
    warm = math.ceil(config.warmup_share * steps)
    at = np.arange(steps)
    progress = np.clip((at - warm) / max(1, steps - warm), 0, 1)
    factor = {
        "cosine": 0.5 * (1 + np.cos(np.pi * progress)),
        "linear": 1 - progress,
        "constant": np.ones(steps),
    }[config.schedule]
    return config.learning_rate * np.where(at < warm, (at + 1) / max(1, warm), factor)


def micro_batches(lengths: Sequence[int], max_tokens: int, *, padded: bool) -> list[np.ndarray]:
    """Positions of rows, in their order, in runs of at most `max_tokens`; a longer row is alone.

    lengths : tokens of each row; padded : count every row as long as the longest of its run
    """
    batches, current, size = [], [], 0
    for position, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in current)]) if padded else 0
        after = longest * (len(current) + 1) if padded else size + length
        if current and after > max_tokens:
            batches.append(np.array(current))
            current, after = [], length
        current.append(position)
        size = after
    return batches + ([np.array(current)] if current else [])


class MicroBatcher:
    """How many tokens a micro-batch may have: as configured, fewer once memory has run out."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def step(
        self, lengths: Sequence[int], backward: Callable[[int], None], clear: Callable[[], None]
    ) -> None:
        """Do the backward passes of a step; when memory runs out, all of them again with half.

        lengths : tokens of each row; backward : adds the step's gradients, given a micro-batch's
        tokens; clear : takes back what an attempt that broke off has added
        """
        longest = max(lengths)
        while True:
            tried = min(self.tokens, sum(lengths))
            try:
                return backward(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or tried <= longest:
                    raise
            # outside the block above: the error's traceback holds the micro-batch's tensors
            self.tokens = max(longest, tried // 2)
            clear()
            free_gpu_cache()


def adapters_per_pass(lm: LM, config: FinetuneConfig) -> int:
    """How many runs of this configuration to train in one pass over the base.

    On a CPU one. On a GPU as many as fit into a quarter of the free memory, at most 64: as
    `config.micro_tokens` bounds a micro-batch, an adapter costs its own numbers alone.
    """
    if not str(lm.device).startswith("cuda"):
        return 1  # measured: 4 do 1.03 to 1.08 times its tokens a second, in thrice its memory
    layers = target_layers(unwrapped(lm.model), config).values()
    size = sum(config.rank * sum(shapes(layer)) for layer in layers)  # numbers in one adapter
    free, _ = torch.cuda.mem_get_info(torch.device(lm.device))
    return max(1, min(ON_GPU, int(free * _SHARE / (_BYTES * size))))


def _held(lm: LM, config: FinetuneConfig) -> int:
    """Tokens of a micro-batch that memory holds: a system that runs out of it kills the process,
    and gives no error to go by. A further process of the sweep may want as much. A power of two, so
    that a little more or less free memory cuts no step otherwise.
    """
    layers = config.layers or lm.config.num_hidden_layers
    free = _TRAINED * free_bytes(lm.device)
    return 1 << trainable_tokens(lm.config, lm.dtype.itemsize, layers, free).bit_length() - 1


def train(
    adapters: MultiLoRA, model: PackedModel, jobs: Sequence[TrainingJob], *,
    on_epoch: Callable[[int, int], bool | None] | None = None,
) -> list[Schedule]:  # fmt: skip
    """Train adapters that are attached to the model, each on its job; how each went.

    on_epoch : called with adapter and epoch (from 1) after each; a true answer ends the adapter

    Adapters with fewer steps, and those whose loss is no number, drop out; the others go on.
    """
    schedules = [schedule(job, adapters.config) for job in jobs]
    total = max(len(s.steps) for s in schedules)
    losses = torch.zeros(len(jobs), total, device=model.device)
    micro = MicroBatcher(min(adapters.config.micro_tokens, _held(model.lm, adapters.config)))
    # a look at the loss waits for the GPU, so there it is taken once an epoch
    each_step = model.device.type == "cpu"
    for step in range(total):
        active = [k for k, s in enumerate(schedules) if s.active(step)]
        if not active:
            break
        _gradients(adapters, model, schedules, active, step, losses[:, step], micro)
        adapters.step(np.array([s.rates[step] if s.active(step) else np.nan for s in schedules]))
        ending = [k for k in active if schedules[k].epoch_ends(step)]
        if each_step or ending:
            finite = torch.isfinite(losses[:, : step + 1]).all(dim=1).tolist()
            for k in active:
                if not finite[k]:
                    schedules[k].ended, schedules[k].diverged = step + 1, True
        for k in ending:
            epoch = int(schedules[k].epoch[step]) + 1
            if schedules[k].ended is None and on_epoch is not None and on_epoch(k, epoch):
                schedules[k].ended = step + 1
    for plan, own in zip(schedules, losses.double().cpu().numpy(), strict=True):
        plan.losses = own
    return schedules


def _gradients(adapters, model, schedules, active, step, losses, micro) -> None:
    """Add the step's gradients to the adapters', and its losses to `losses`, shape (K,)."""
    owners = [k for k in active for _ in schedules[k].steps[step]]
    rows = [schedules[k].job.rows[i] for k in active for i in schedules[k].steps[step]]
    if not model.packed:  # similar lengths together pad little; an adapter's rows stay together
        order = sorted(range(len(rows)), key=lambda i: (owners[i], len(rows[i])))
        owners, rows = [owners[i] for i in order], [rows[i] for i in order]
    tokens = [s.tokens[step] if s.active(step) else 0 for s in schedules]
    new = partial(torch.tensor, dtype=torch.float32, device=model.device)
    scales = new([loss_scale(n, model.lm.dtype) for n in tokens])
    share = new([1 / n if n else 0.0 for n in tokens])
    lengths = [len(row) for row in rows]

    def backward(size: int) -> None:
        for part in micro_batches(lengths, size, padded=not model.packed):
            batch = model.batch([rows[i] for i in part], [owners[i] for i in part])
            owner = torch.tensor([owners[i] for i in part], device=model.device)[batch.row_of]
            adapters.send([owners[i] for i in part], batch.slots)
            loss, each = model.loss(batch, (share * scales)[owner])
            loss.backward()
            losses.index_add_(0, owner, each * share[owner])

    def clear() -> None:
        adapters.gradients.zero_()
        losses.zero_()

    micro.step(lengths, backward, clear)
    if model.lm.dtype == torch.float16:
        adapters.gradients.div_(scales[:, None])


def loss_scale(tokens: int, dtype: torch.dtype) -> float:
    """What a step's loss is multiplied by before its gradients, which are divided by it after.

    tokens : target tokens of the step, whose weight is 1 / tokens. float16 ends at 6e-8, under
    which most gradients of a mean over thousands of tokens lie; a power of two that brings the
    weight into (0.5, 1] loses nothing.
    """
    return 2.0 ** math.floor(math.log2(tokens)) if dtype == torch.float16 and tokens else 1.0
