"""Several processes at one run: each takes a share of every step's rows, gradients are summed.

The weights of the targets are fixed by the whole step before its rows are shared out, so the sum
over processes is the step's gradient itself: the loss does not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The processes of this run. rank : of this one, from 0; size : how many."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes records."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> np.ndarray:
        """This process's rows of a step, in their order, shared so that tokens come out even.

        lengths : tokens of each row; returns : positions, possibly none
        """
        if self.size == 1:
            return np.arange(len(lengths))
        order = np.argsort(-np.asarray(lengths), kind="stable")
        # there and back again: 0 1 1 0 0 1 1 0 keeps the sums close on rows sorted by length
        turn = np.arange(len(order)) % (2 * self.size)
        owner = np.where(turn < self.size, turn, 2 * self.size - 1 - turn)
        return np.sort(order[owner == self.rank])

    def add_up(self, *tensors: torch.Tensor) -> None:
        """Sum tensors over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def join() -> Group:
    """The group that `accelerate launch` (or torchrun) started this process in, else a group of 1.

    gloo on CPUs, nccl on GPUs, as accelerate chooses.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group()
    if not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return Group(dist.get_rank(), dist.get_world_size())
