"""How much an indicator moves with what must not matter: batches, order, padding, precision.

Other scorers change their numbers with the batch size (reward-bench issue 137, lm-eval 704). In
float32 each condition is compared with one row a call; in bfloat16 with the same rows sorted, and
those with float32. `python -m bench.invariance --profile NAME --out FILE` writes the
table for the rows of a profile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from instructmining.study import Study
from instructmining_core.indicators import INDICATORS, Indicator
from instructmining_core.indicators.scorer import Models, read_rows
from instructmining_core.indicators.turns import Column

if TYPE_CHECKING:
    from instructmining_core.config import ModelRef

ALONE, SORTED, SHUFFLED, PADDED = "one row a call", "sorted", "shuffled", "left-padded"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
Run = tuple[str, str]  # dtype and way of batching
COMPARED: tuple[tuple[Run, Run], ...] = (  # a run, and what it is held against
    *(((FLOAT32, way), (FLOAT32, ALONE)) for way in (SORTED, SHUFFLED, PADDED)),
    *(((BFLOAT16, way), (BFLOAT16, SORTED)) for way in (ALONE, SHUFFLED, PADDED)),
    ((BFLOAT16, SORTED), (FLOAT32, SORTED)),
)
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
    """Score the same rows in every way, and compare each indicator that has its model.

    table : record table; its readable rows are scored
    returns : one row a column and pair of `COMPARED`:
        column, dtype and condition of a run ("sorted": pooled, by length, token budget;
        "shuffled": the same rows in another order; "left-padded"; "one row a call"), against (the
        run it is held against), rows, largest_difference (absolute, in the column's unit),
        largest_relative (by the spread of the column: its standard deviation), rank_correlation
        (Spearman; NaN where a column has one value only).
        A run that an indicator does not have (padding or precision without a model) is left out.
        The reference of pool-relative indicators is the table itself.
    """
    parsed = read_rows(table)
    rows = ([parsed.conversations[i] for i in parsed.readable],
            [parsed.row_hashes[i] for i in parsed.readable])  # fmt: skip
    opened = {
        dtype: Models(_with_dtype(models or {}, dtype), standins, device)
        for dtype in (FLOAT32, BFLOAT16)
    }
    chosen = [
        i for i in INDICATORS.values()
        if i.role is None or i.role_optional or i.role in opened["float32"].refs
    ]  # fmt: skip
    found = []
    for indicator in tqdm(chosen, desc="invariance", disable=not progress):
        runs = _runs(indicator, *rows, opened, np.random.default_rng(seed))
        values = {name: run() for name, run in runs.items()}
        found += [
            _compared(column, run, against, values[against][column], values[run][column])
            for column in indicator.columns
            for run, against in COMPARED
            if run in values
        ]
    return pd.DataFrame(found)


def _with_dtype(models: Mapping[str, ModelRef], dtype: str) -> dict[str, ModelRef]:
    return {role: replace(ref, dtype=dtype) for role, ref in models.items()}


def _runs(
    indicator: Indicator, conversations: Sequence, names: Sequence[str],
    opened: Mapping[str, Models], random: np.random.Generator,
) -> dict[Run, Callable[[], dict[str, np.ndarray]]]:  # fmt: skip
    """Run -> a call that gives each column's values in the rows' own order."""
    order = random.permutation(len(conversations))

    @cache  # a reference is embedded once, not once a run
    def options_of(dtype: str) -> dict[str, Any]:
        return _options(indicator, conversations, names, opened[dtype])

    def run(dtype: str, where: Sequence[int] | None = None, **more) -> dict:
        options = dict(options_of(dtype))
        where = range(len(conversations)) if where is None else where
        if "reference" in options:
            options["row_hashes"] = [names[i] for i in where]
        compute = indicator.load()
        return _values(compute([conversations[i] for i in where], **options, **more))

    def shuffled(dtype: str) -> dict:
        return {name: one[np.argsort(order)] for name, one in run(dtype, where=order).items()}

    def one_by_one(dtype: str) -> dict:
        parts = [run(dtype, where=[i]) for i in range(len(conversations))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    uses_batches = indicator.role is not None and not indicator.role_optional
    alone = partial(run, batch_tokens=1) if uses_batches else one_by_one
    ways = {ALONE: alone, SORTED: run, SHUFFLED: shuffled}
    if indicator.name in _PADDED:
        ways[PADDED] = partial(run, padding_side="left")
    dtypes = (FLOAT32, BFLOAT16) if uses_batches else (FLOAT32,)
    return {(dtype, way): partial(call, dtype) for dtype in dtypes for way, call in ways.items()}


def _options(indicator: Indicator, conversations, names, models: Models) -> dict[str, Any]:
    options: dict[str, Any] = {"model": models.open(indicator.role)}
    if indicator.pool_relative:
        from instructmining_core.indicators.neighbours import make_reference

        reference = make_reference(models.open("encoder"), conversations, names)
        options |= {"reference": reference, "row_hashes": list(names)}
    return options


def _values(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    return {name: column.values for name, column in columns.items()}


def _compared(
    name: str, run: Run, against: Run, one: np.ndarray, other: np.ndarray
) -> dict[str, Any]:
    both = ~np.isnan(one)
    if (np.isnan(other) == both).any():
        raise ValueError(f"{name}: other rows are NaN in the run {run} than in {against}")
    difference = float(np.abs(one - other)[both].max(initial=0.0))
    spread = float(np.std(one[both])) if both.any() else 0.0
    ranks = pd.Series(one[both]).rank(), pd.Series(other[both]).rank()
    constant = any(r.nunique() < 2 for r in ranks)
    return {
        "column": name, "dtype": run[0], "condition": run[1],
        "against": ", ".join(reversed(against)), "rows": int(both.sum()),
        "largest_difference": difference,
        "largest_relative": difference / spread if spread else float(difference > 0),
        "rank_correlation": float("nan") if constant else float(ranks[0].corr(ranks[1])),
    }  # fmt: skip


def profile_table(name: str, rows: int, seed: int = 0, *, progress: bool = False) -> pd.DataFrame:
    """`invariance_table` of candidates of a profile, with its models, stand-ins included.

    rows : candidates drawn by `seed`; all of them where there are fewer
    returns : as `invariance_table`, the profile's name in front
    """
    study = Study.open(name)
    candidates = study.data.candidates
    draw = np.random.default_rng(seed).permutation(len(candidates))[:rows]
    models = study.profile.models.roles()
    found = invariance_table(
        candidates.iloc[np.sort(draw)].reset_index(drop=True), models,
        standins=study.standins(*models.values()), seed=seed, progress=progress,
    )  # fmt: skip
    found.insert(0, "profile", study.profile.name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table of a profile's rows as CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.invariance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", required=True, help="a preset or a YAML file")
    parser.add_argument("--rows", type=int, default=256, help="candidates drawn (default 256)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV to write")
    options = parser.parse_args(arguments)
    found = profile_table(options.profile, options.rows, progress=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    ranks = found["rank_correlation"]  # three digits would make 1 of what is not
    found["rank_correlation"] = ["" if np.isnan(rank) else f"{rank:.5f}" for rank in ranks]
    found.to_csv(options.out, index=False, float_format="%.3g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
