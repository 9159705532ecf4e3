"""The equal-token arm: tilted sets with the same number of training tokens instead of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .subsets import (
    MAX_ROW_SHARE,
    SubsetError,
    TrainingSet,
    directions,
    pool_rows,
    tilted_order,
    training_set,
    within_space,
)


def equal_token_sets(table: pd.DataFrame, scores: pd.DataFrame, n: int, tokens: int,
                     strength: float = 1.5, seed: int = 0, *, columns: Sequence[str] | None = None,
                     length: str = "len_out") -> list[TrainingSet]:
    """Tilted sets of one source with the same number of response tokens instead of rows.

    Rows are drawn as in `designed_sets` until their `length` sums to `tokens`; the last row is
    kept where that comes nearer. At a fixed number of rows mean length is the number of training
    tokens, so only this arm (24 sets or more) can tell the two apart.
    """
    rng = np.random.default_rng(seed)
    pool = pool_rows(table)
    columns = list(columns or scores.select_dtypes("number").columns.difference(["row"]))
    space = within_space(scores, pool, columns)
    lengths = scores.drop_duplicates("row_hash").set_index("row_hash")[length].astype(float)
    own = {s: lengths.loc[rows].fillna(0).to_numpy() for s, rows in pool.items()}
    eligible = [s for s in pool if own[s].sum() * MAX_ROW_SHARE >= tokens]
    if not eligible:
        raise SubsetError(f"no source holds {tokens / MAX_ROW_SHARE:.0f} tokens of responses, "
                          f"which a set of {tokens} needs; lower the number of tokens")
    made = []
    for i, tilt in enumerate(directions(n, len(columns), rng)):
        source = eligible[(i // 2) % len(eligible)]
        order = tilted_order(space[source] @ tilt, strength, rng)
        summed = np.cumsum(own[source][order])
        last = int(np.argmin(np.abs(summed - tokens))) + 1
        rows = pool[source][order[:last]]
        made.append(training_set("tokens", [source], [last], [rows], tilt, source))
    return made
