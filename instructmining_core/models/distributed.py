"""Several processes at one run: each takes a share of every step's rows, gradients are summed.

The weights of the targets are fixed by the whole step before its rows are shared out, so the sum
over processes is the step's gradient itself: the loss does not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .batching import is_out_of_memory

SHARD = "INSTRUCTMINING_SHARD"  # set to 1: the base does not fit onto one GPU (`sharded`)


class GroupError(RuntimeError):
    """Another process of the run failed."""


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
                # gloo takes a column for the numbers that follow its first one in memory
                whole = tensor.contiguous()
                dist.all_reduce(whole)
                if whole is not tensor:
                    tensor.copy_(whole)

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        # nccl takes tensors of the process's GPU only, which `join` made the current one
        found = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return -self.most(-number)

    def tell(self, value: Any = None) -> Any:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_or_none(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; where one process raises all do, so that none waits for another.

        Raises its own error; where only another process failed, GroupError, and where memory ran
        out on any, an error that says so on all, since what follows depends on it.
        """
        if self.size == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            if not getattr(error, "agreed", False):  # else all know of it from within
                own = _kind(error)
                _raise_worse(self.most(own), own, error)
                error.agreed = True
            raise
        _raise_worse(self.most(0), 0, None)
        return result


def _kind(error: Exception) -> int:
    return 2 if is_out_of_memory(error) else 1


def _raise_worse(worst: int, own: int, cause: Exception | None) -> None:
    """Raise what happened elsewhere, where that is worse than what happened here."""
    if worst <= own:
        return
    error = (GroupError("another process of this run failed; its own output says why")
             if worst == 1 else MemoryError("out of memory in another process of this run"))
    error.agreed = True
    raise error from cause


def join() -> Group:
    """The group that `accelerate launch` (or torchrun) started this process in, else a group of 1.

    gloo on CPUs, nccl on GPUs, as accelerate chooses.
    """
    if not launched():
        return Group()
    if not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return Group(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Take this process out of its group, when all its work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether this process is one of several that were started for the same runs."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str) -> str:
    """`device`, where "cuda" is this process's own GPU: that of its LOCAL_RANK, when launched."""
    if device == "cuda" and launched():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def sharding() -> bool:
    """Whether a base is to be cut up among the processes: asked for by SHARD, and several."""
    return launched() and os.environ.get(SHARD, "") not in ("", "0")
