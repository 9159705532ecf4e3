"""Train K adapters together: the loss of each step exact, each adapter as if it were alone.

Which rows are in which step, at which learning rate: fixed by seeds, not by what computes it.

The tokens of a micro-batch: as configured, fewer once memory has run out.

A step's gradient is a sum over its rows with weights that the whole step fixes, so how the rows are
cut into micro-batches changes nothing but the order in which that sum is taken.

How many adapters to train in one pass: what memory holds, where it pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..config import FinetuneConfig
from ..data.tokenization import Encoded
from ..models.batching import is_out_of_memory
from ..models.causal_lm import LM, unwrapped
from ..models.distributed import Group, join
from .lora import shapes, target_layers
from .multi_lora import MultiLoRA
from .packing import PackedModel


def row_order(rows: int, epochs: int, batch_size: int, order_seed: int) -> list[list[np.ndarray]]:
    """Row positions of each step of each epoch.

    Every epoch is a new permutation; its last step holds what is left (no row is dropped or
    repeated). The same seed gives the same order for every set of the same size.

    returns : epochs x steps arrays of at most `batch_size` row positions
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


def micro_batches(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False
) -> list[np.ndarray]:
    """Split rows, in their order, into runs of at most `max_tokens` tokens; a longer row is alone.

    lengths : tokens of each row
    padded : count every row as long as the longest of its run
    returns : arrays of positions in `lengths`, none empty
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
    """How many tokens a micro-batch may have, over the steps of one training."""

    def __init__(self, tokens: int, group: Group, *, halves: bool = True) -> None:
        """halves : False where every process must do the same number of micro-batches"""
        self.tokens, self.group, self.halves = tokens, group, halves

    def step(
        self, lengths: Sequence[int], backward: Callable[[int], None], clear: Callable[[], None]
    ) -> None:
        """Do the backward passes of a step; when memory runs out, all of them again with half.

        lengths : tokens of each row of this process in the step; one row cannot be cut
        backward : adds the step's gradients, given the tokens of a micro-batch
        clear : takes back what an attempt that broke off has added

        Raises what `backward` raises, on every process of the group.
        """
        self.group.all_or_none(lambda: self._attempt(lengths, backward, clear))

    def _attempt(self, lengths, backward, clear) -> None:
        while True:
            try:
                return backward(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not (self.halves and is_out_of_memory(error) and self._halve(lengths)):
                    raise
            # outside the block above: the error's traceback holds the micro-batch's tensors
            clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, lengths: Sequence[int]) -> bool:
        """Halve, but not below the longest row; False where that changes nothing."""
        longest, total = max(lengths, default=0), sum(lengths)
        if min(self.tokens, total) <= longest:
            return False
        self.tokens = max(longest, min(self.tokens, total) // 2)
        return True


ON_CPU = 1  # measured: 4 adapters do 1.03 to 1.08 times its tokens a second, in thrice its memory
ON_GPU = 64  # at most
_BYTES = 22  # of one adapter's number: value, gradient, two moments, all float32, and work copies
_SHARE = 0.25  # of the free memory, for adapters; a micro-batch's size does not hang on K


def adapters_together(lm: LM, config: FinetuneConfig) -> int:
    """How many runs of this configuration to train in one pass over the base.

    On a CPU one. On a GPU as many as fit into a quarter of the free memory, at most 64: the tokens
    of a micro-batch are bounded by `config.micro_tokens`, so more adapters only cost their own
    numbers. Processes that share a run take the least of theirs.
    """
    if not str(lm.device).startswith("cuda"):
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(torch.device(lm.device))
    fitting = int(free * _SHARE / (_BYTES * adapter_size(lm, config)))
    return join().least(max(1, min(ON_GPU, fitting)))


def adapter_size(lm: LM, config: FinetuneConfig) -> int:
    """Numbers in one adapter."""
    layers = target_layers(unwrapped(lm.model), config).values()
    return sum(config.rank * sum(shapes(layer)) for layer in layers)


@dataclass(frozen=True)
class TrainingJob:
    """One adapter's rows and seeds."""

    rows: Sequence[Encoded]
    init_seed: int
    order_seed: int


@dataclass
class Schedule:
    """One adapter's way through training.

    steps : row positions of each step; epoch : epoch of each step, from 0
    rates : learning rate of each step; tokens : target tokens of each step
    ended : steps taken when it ended early (NaN, or `on_epoch` said so), else None
    """

    job: TrainingJob
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


def course(job: TrainingJob, config: FinetuneConfig) -> Schedule:
    """Plan one adapter's steps."""
    by_epoch = row_order(len(job.rows), config.epochs, config.batch_size, job.order_seed)
    steps = [step for epoch in by_epoch for step in epoch]
    counts = np.array([sum(row.targets[1:]) for row in job.rows])
    return Schedule(
        job, steps, np.repeat(np.arange(config.epochs), [len(e) for e in by_epoch]),
        learning_rates(config, len(steps)), np.array([counts[step].sum() for step in steps]),
    )


@dataclass
class Trained:
    """What training K adapters gives.

    courses : K plans, with how each ended
    losses : shape (K, steps), each step's loss before its update, nats per target token
    """

    courses: list[Schedule]
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
    stack: MultiLoRA,
    body: PackedModel,
    jobs: Sequence[TrainingJob],
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
    micro = MicroBatcher(config.micro_tokens, group)
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
