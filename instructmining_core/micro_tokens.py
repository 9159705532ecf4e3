"""The tokens of a micro-batch: as configured, fewer once memory has run out.

A step's gradient is a sum over its rows with weights that the whole step fixes, so how the rows are
cut into micro-batches changes nothing but the order in which that sum is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .batching import is_out_of_memory
from .distributed import Group


class MicroTokens:
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
