"""The table of runs that the regressions read, and the constants that standardise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config import InstructMiningError

DESIGNED = ("within", "mixed")
EQUAL_TOKENS = "tokens"  # the arm at equal tokens instead of rows


class RunsError(InstructMiningError):
    """The table of runs can't be used as asked."""


class RankError(RunsError):
    """A design matrix can't tell its columns apart."""


@dataclass(frozen=True)
class Standardizer:
    """Mean and sd of each indicator over the rows of the fitting pool; travels with the rule.

    mean, sd : Series indexed by column, in the indicator's units; sd > 0
    """

    mean: pd.Series
    sd: pd.Series

    @classmethod
    def fit(cls, scores: pd.DataFrame, columns: Sequence[str]) -> Standardizer:
        """From the rows of the pool, missing values left out; a constant column is an error."""
        values = scores[list(columns)].astype(float)
        mean, sd = values.mean(), values.std()
        flat = [c for c in columns if not sd[c] > 0]
        if flat:
            raise RunsError(f"indicators {flat} do not vary over the pool: leave them out")
        return cls(mean, sd)

    @classmethod
    def identity(cls, columns: Sequence[str]) -> Standardizer:
        """Leaves values as they are: for columns that are standardised already."""
        return cls(pd.Series(0.0, list(columns)), pd.Series(1.0, list(columns)))

    def transform(self, frame: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """(value − mean)/sd of the columns (default: all that are known here); same index."""
        columns = list(self.mean.index if columns is None else columns)
        return (frame[columns].astype(float) - self.mean[columns]) / self.sd[columns]


def run_table(ledger: pd.DataFrame, means: pd.DataFrame, loss: str) -> pd.DataFrame:
    """Join the ledger and the set means to the table of runs that every fit takes.

    ledger : one row a run, with `set_id`, `arm`, `source`, `shares` (dict), `status` and a
    column named `loss` (nats per token, > 0); means : index set_id, raw units, from `set_means`.
    Returns the finished runs with `log_loss`, `share_<source>` and the indicator columns.
    `.attrs["left_out"]` counts runs that diverged, failed or have no finite loss.
    """
    if loss not in ledger:
        known = [c for c in ledger if str(c).startswith("loss")]
        raise RunsError(f"the ledger has no column {loss!r}; its losses are {known}")
    done = ledger["status"].eq("done") if "status" in ledger else pd.Series(True, ledger.index)
    values = ledger[loss].astype(float)
    runs = ledger[done & np.isfinite(values) & (values > 0)].copy()
    runs["log_loss"] = np.log(runs[loss].astype(float))
    shares = pd.DataFrame(list(runs["shares"]), index=runs.index).fillna(0.0)
    shares = shares[sorted(shares.columns)].add_prefix("share_")
    unknown = ~runs["set_id"].isin(means.index)
    if unknown.any():
        raise RunsError(f"{int(unknown.sum())} runs have no set means, the first is set "
                        f"{runs.loc[unknown, 'set_id'].iloc[0]}")
    joined = means.loc[runs["set_id"]].set_axis(runs.index)
    clash = [c for c in (*shares, *joined) if c in runs]
    runs = pd.concat([runs.drop(columns=clash), shares, joined], axis=1)
    runs.attrs["left_out"] = int(len(ledger) - len(runs))
    return runs


def one_per_set(runs: pd.DataFrame) -> pd.DataFrame:
    """The run with the lowest seeds of each set_id; all rows where there is no set_id.

    Repeats serve the seed variance only: other seeds would put their own effects into a few sets.
    """
    if "set_id" not in runs:
        return runs
    seeds = [c for c in ("init_seed", "order_seed") if c in runs]
    ordered = runs.sort_values(seeds, kind="stable") if seeds else runs
    return ordered.drop_duplicates("set_id").sort_index()


def pick_arms(runs: pd.DataFrame, arms: Sequence[str] | None) -> pd.DataFrame:
    """One run a set, of the given arms (no `arm` column: all).

    None takes every arm at equal rows: the equal-token arm enters a fit only where it is named.
    DESIGNED takes the fusion sets of a study that has no others, as the paper's has.
    """
    runs = one_per_set(runs)
    if "arm" not in runs:
        return runs
    if arms is None:
        return runs[runs["arm"] != EQUAL_TOKENS]
    picked = runs[runs["arm"].isin(arms)]
    if picked.empty and tuple(arms) == DESIGNED:
        picked = runs[runs["arm"] == "fusion"]
    if picked.empty:
        raise RunsError(f"no run of arm {tuple(arms)}; there are {sorted(set(runs['arm']))}")
    return picked


def share_matrix(runs: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...]]:
    """Shares of the sources that occur, (n, S), and their names; every row must sum to one."""
    columns = [c for c in runs if str(c).startswith("share_")]
    if not columns:
        raise RunsError("no share_<source> columns in the runs: make them with run_table")
    shares = runs[columns].fillna(0.0).to_numpy(float)
    off = np.abs(shares.sum(axis=1) - 1) > 1e-6
    if off.any():
        raise RunsError(f"shares of {int(off.sum())} runs do not sum to one, the first is run "
                        f"{runs.index[off][0]!r} with {shares[off][0].sum():.4f}")
    present = shares.any(axis=0)
    names = tuple(c.removeprefix("share_") for c, p in zip(columns, present, strict=True) if p)
    return shares[:, present], names


def standardised(runs: pd.DataFrame, columns: Sequence[str],
                 standardizer: Standardizer | None) -> np.ndarray:
    """Indicator means in units of the pool's sd, (n, p); None: the columns are standardised."""
    if standardizer is None:
        return runs[list(columns)].to_numpy(float)
    return standardizer.transform(runs, columns).to_numpy(float)


def within_sources(
    runs: pd.DataFrame, columns: Sequence[str], standardizer: Standardizer | None,
    arms: Sequence[str] | None = DESIGNED, outcome: str = "log_loss",
) -> tuple[pd.DataFrame, np.ndarray, tuple[str, ...], np.ndarray, np.ndarray]:  # fmt: skip
    """What a fit beside source shares takes: one run a set of the arms, `share_matrix`, indicators
    (n, p), outcome (n,)."""
    runs = pick_arms(runs, arms)
    X = standardised(runs, columns, standardizer)
    return (runs, *share_matrix(runs), X, runs[outcome].to_numpy(float))
