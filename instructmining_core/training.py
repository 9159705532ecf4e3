"""Train K adapters together: the loss of each step exact, each adapter as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .distributed import Group
from .micro_tokens import MicroTokens
from .packed import Body
from .profiles import FinetuneConfig
from .stacked import AdapterStack
from .templates import Encoded
from .training_plan import learning_rates, micro_batches, row_order


@dataclass(frozen=True)
class Job:
    """One adapter's rows and seeds."""

    rows: Sequence[Encoded]
    init_seed: int
    order_seed: int


@dataclass
class Course:
    """One adapter's way through training.

    steps : row positions of each step; epoch : epoch of each step, from 0
    rates : learning rate of each step; tokens : target tokens of each step
    ended : steps taken when it ended early (NaN, or `on_epoch` said so), else None
    """

    job: Job
    steps: list[np.ndarray]
    epoch: np.ndarray
    rates: np.ndarray
    tokens: np.ndarray
    ended: int | None = None
    diverged: bool = False

    def active(self, step: int) -> bool:
        return step < len(self.steps) and self.ended is None

    def epoch_ends(self, step: int) -> bool:
        last = step + 1 == len(self.steps)
        return last or self.epoch[step + 1] != self.epoch[step]


def course(job: Job, config: FinetuneConfig) -> Course:
    """Plan one adapter's steps."""
    by_epoch = row_order(len(job.rows), config.epochs, config.batch_size, job.order_seed)
    steps = [step for epoch in by_epoch for step in epoch]
    counts = np.array([sum(row.targets[1:]) for row in job.rows])
    return Course(
        job, steps, np.repeat(np.arange(config.epochs), [len(e) for e in by_epoch]),
        learning_rates(config, len(steps)), np.array([counts[step].sum() for step in steps]),
    )


@dataclass
class Trained:
    """What training K adapters gives.

    courses : K plans, with how each ended
    losses : shape (K, steps), each step's loss before its update, nats per target token
    """

    courses: list[Course]
    losses: np.ndarray = field(repr=False)

    def curve(self, adapter: int) -> pd.DataFrame:
        """step (from 1), epoch (from 1), lr, loss (nats per target token), tokens (targets)."""
        c = self.courses[adapter]
        n = len(c.steps) if c.ended is None else c.ended
        return pd.DataFrame({
            "step": np.arange(1, n + 1), "epoch": c.epoch[:n] + 1, "lr": c.rates[:n],
            "loss": self.losses[adapter, :n], "tokens": c.tokens[:n],
        })


def train(
    stack: AdapterStack,
    body: Body,
    jobs: Sequence[Job],
    *,
    group: Group | None = None,
    on_epoch: Callable[[int, int], bool | None] | None = None,
    progress: bool = False,
) -> Trained:
    """Train the stack's adapters, which are on `body`'s model, each on its job.

    on_epoch : called with adapter and epoch (from 1) after each; a true answer ends the adapter
    group : the processes that share the rows of each step

    Adapters with fewer steps, and those whose loss is no number, drop out; the others go on
    untouched, as no row of one adapter meets the values of another.
    """
    config, group = stack.config, group or Group()
    courses = [course(job, config) for job in jobs]
    total = max(len(c.steps) for c in courses)
    losses = torch.zeros(len(jobs), total, device=body.device)
    micro = MicroTokens(config.micro_tokens, group)
    # a look at the loss waits for the GPU, so there it is taken once an epoch
    each_step = body.device.type == "cpu"
    for step in tqdm(range(total), desc="steps", disable=not progress):
        active = [k for k, c in enumerate(courses) if c.active(step)]
        if not active:
            break
        _gradients(stack, body, courses, active, step, losses, micro)
        group.add_up(stack.gradients, losses[:, step])
        rates = np.full(len(courses), np.nan)
        for k in active:
            rates[k] = courses[k].rates[step]
        stack.step(rates)
        ending = [k for k in active if courses[k].epoch_ends(step)]
        if each_step or ending:
            _stop_diverged(courses, active, losses, step)
        for k in ending:
            epoch = int(courses[k].epoch[step]) + 1
            if courses[k].ended is None and on_epoch is not None and on_epoch(k, epoch):
                courses[k].ended = step + 1
    return Trained(courses, losses.double().cpu().numpy())


def _gradients(stack, body, courses, active, step, losses, micro) -> None:
    """Add the step's gradients to the stack, and its loss to column `step` of `losses`."""
    owners = [k for k in active for _ in courses[k].steps[step]]
    rows = [courses[k].job.rows[i] for k in active for i in courses[k].steps[step]]
    mine = micro.group.share([len(row) for row in rows])
    if not body.packed:  # similar lengths together pad little; an adapter's rows stay together
        mine = sorted(mine, key=lambda i: (owners[i], len(rows[i])))
    owners, rows = [owners[i] for i in mine], [rows[i] for i in mine]
    tokens = [c.tokens[step] if c.active(step) else 0 for c in courses]
    new = partial(torch.tensor, dtype=torch.float32, device=body.device)
    scales = new([loss_scale(n, body.lm.dtype) for n in tokens])
    share = new([1 / n if n else 0.0 for n in tokens])

    def clear() -> None:
        stack.gradients.zero_()
        losses[:, step] = 0

    micro.step(
        [len(row) for row in rows],
        lambda size: _backward(stack, body, rows, owners, share, scales, losses[:, step], size),
        clear,
    )
    if body.lm.dtype == torch.float16:
        stack.gradients.div_(scales[:, None])


def _backward(stack, body, rows, owners, share, scales, losses, size) -> None:
    """Micro-batches of at most `size` tokens; share, scales : shape (K,), as for `loss_scale`."""
    lengths = [len(row) for row in rows]
    for part in micro_batches(lengths, size, padded=not body.packed):
        batch = body.batch([rows[i] for i in part])
        owner = torch.tensor([owners[i] for i in part], device=body.device)[batch.row_of]
        stack.send([owners[i] for i in part], batch.slots)
        loss, each = body.loss(batch, (share * scales)[owner])
        loss.backward()
        losses.index_add_(0, owner, each * share[owner])


def loss_scale(tokens: int, dtype: torch.dtype) -> float:
    """What a step's loss is multiplied by before its gradients, which are divided by it after.

    tokens : target tokens of the step, whose weight is 1 / tokens
    dtype : of the base. float16 ends at 6e-8, under which most gradients of a mean over thousands
        of tokens lie; a power of two that brings the weight into (0.5, 1] loses nothing and keeps
        four decimal places free above. Other types have the range, and their scale is 1.
    """
    return 2.0 ** math.floor(math.log2(tokens)) if dtype == torch.float16 and tokens else 1.0


def _stop_diverged(courses, active, losses, step) -> None:
    bad = ~torch.isfinite(losses[:, : step + 1]).all(dim=1).cpu().numpy()
    for k in active:
        if bad[k]:
            courses[k].ended, courses[k].diverged = step + 1, True
