"""How much an indicator moves with what must not matter: batches, order, padding, precision.

Other scorers change their numbers with the batch size (reward-bench issue 137, lm-eval 704). Each
condition is compared with one row a call in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from instructmining_core.indicators import INDICATORS, Indicator
from instructmining_core.indicators.reference import make_reference
from instructmining_core.indicators.text import Column
from instructmining_core.scoring_blocks import read_rows
from instructmining_core.scoring_models import Models

if TYPE_CHECKING:
    from instructmining_core.profiles import ModelRef

CONDITIONS = ("sorted", "shuffled", "left-padded", "bfloat16")
_PADDED = ("ppl", "ifd", "reward", "unieval")  # those whose `compute` takes a padding side


def invariance_table(
    table: pd.DataFrame,
    models: Mapping[str, ModelRef] | None = None,
    *,
    standins: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare every indicator that has its model under each condition with one row a call.

    table : record table; its readable rows are scored
    returns : one row a column and condition:
        column, condition ("sorted": pooled, by length, token budget; "shuffled": the same rows in
        another order; "left-padded"; "bfloat16": sorted, weights in bfloat16), rows,
        largest_difference (absolute, in the column's unit), largest_relative (by the spread of the
        column: its standard deviation), rank_correlation (Spearman).
        A condition that an indicator does not have (padding or precision without a model) is
        left out. The reference of pool-relative indicators is the table itself.
    """
    conversations, hashes = read_rows(table)
    fine = [i for i, c in enumerate(conversations) if not c.problem]
    rows = ([conversations[i] for i in fine], [hashes[i] for i in fine])
    opened = {
        dtype: Models(_with_dtype(models or {}, dtype), standins, device)
        for dtype in ("float32", "bfloat16")
    }
    chosen = [
        i for i in INDICATORS.values()
        if i.role is None or i.role_optional or i.role in opened["float32"].roles
    ]  # fmt: skip
    found = []
    for indicator in tqdm(chosen, desc="invariance", disable=not progress):
        runs = _runs(indicator, *rows, opened, np.random.default_rng(seed))
        alone = runs["alone"]()
        for condition in CONDITIONS:
            if condition in runs:
                other = runs[condition]()
                found += [_compared(name, condition, alone[name], other[name]) for name in alone]
    return pd.DataFrame(found)


def _with_dtype(models: Mapping[str, ModelRef], dtype: str) -> dict[str, ModelRef]:
    return {role: replace(ref, dtype=dtype) for role, ref in models.items()}


def _runs(
    indicator: Indicator, conversations: Sequence, names: Sequence[str],
    opened: Mapping[str, Models], random: np.random.Generator,
) -> dict[str, Callable[[], dict[str, np.ndarray]]]:  # fmt: skip
    """Condition -> a call that gives each column's values in the rows' own order."""
    order = random.permutation(len(conversations))

    def run(dtype: str = "float32", where: Sequence[int] | None = None, **more) -> dict:
        options = _options(indicator, conversations, names, opened[dtype])
        where = range(len(conversations)) if where is None else where
        if "reference" in options:
            options["row_hashes"] = [names[i] for i in where]
        compute = indicator.load().compute
        return _values(compute([conversations[i] for i in where], **options, **more))

    def shuffled() -> dict:
        return {name: values[np.argsort(order)] for name, values in run(where=order).items()}

    def one_by_one() -> dict:
        parts = [run(where=[i]) for i in range(len(conversations))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    uses_batches = indicator.role is not None and not indicator.role_optional
    alone = (lambda: run(batch_tokens=1)) if uses_batches else one_by_one
    runs = {"alone": alone, "sorted": run, "shuffled": shuffled}
    if indicator.name in _PADDED:
        runs["left-padded"] = lambda: run(padding_side="left")
    if uses_batches:
        runs["bfloat16"] = lambda: run(dtype="bfloat16")
    return runs


def _options(indicator: Indicator, conversations, names, models: Models) -> dict[str, Any]:
    has_model = indicator.role in models.roles
    options: dict[str, Any] = {"model": models.open(indicator.role) if has_model else None}
    if indicator.pool_relative:
        reference = make_reference(models.open("encoder"), conversations, names, size=len(names))
        options |= {"reference": reference, "row_hashes": list(names)}
    return options


def _values(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    return {name: column.values for name, column in columns.items()}


def _compared(name: str, condition: str, one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    both = ~np.isnan(one)
    if (np.isnan(other) == both).any():
        raise ValueError(f"{name}: other rows are NaN under {condition!r} than alone")
    difference = float(np.abs(one - other)[both].max(initial=0.0))
    spread = float(np.std(one[both])) if both.any() else 0.0
    ranks = pd.Series(one[both]).rank(), pd.Series(other[both]).rank()
    constant = any(r.nunique() < 2 for r in ranks)
    return {
        "column": name, "condition": condition, "rows": int(both.sum()),
        "largest_difference": difference,
        "largest_relative": difference / spread if spread else float(difference > 0),
        "rank_correlation": float("nan") if constant else float(ranks[0].corr(ranks[1])),
    }  # fmt: skip
