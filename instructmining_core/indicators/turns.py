"""Number of the assistant's turns.

The InstructMining paper names multi-turn dialogue as future work; LIMA (Zhou et al. 2023,
arXiv 2305.11206, section 4) finds that 30 dialogues among 1,000 rows change the model's dialogues.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instructmining_core.indicators.text import Column, Conversation


def compute_turns(
    conversations: Sequence[Conversation], model=None, *, progress: bool = False
) -> dict[str, Column]:
    """Assistant turns of each row; a row without one is NaN, with its reason."""
    counts = np.array([len(c.ends) or np.nan for c in conversations], dtype=np.float64)
    return {"turns": Column(counts, [c.problem for c in conversations])}
