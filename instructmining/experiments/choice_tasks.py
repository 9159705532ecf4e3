"""What models score on the multiple-choice tasks, and whether the loss is a good proxy of it.

The paper's quality hypothesis takes a lower loss for a better model (v3, section 2) and shows one
figure of it. Here the correlations, over all models that have both, carry two intervals, and what
costs no loss is asked for its cost in accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from instructmining_core.data.choices import Question
from instructmining_core.finetuning.ledger import Ledger

from ..claims import FAILS, HOLDS, UNDECIDED, unasked
from ..study import Study
from .comparisons import LOSSES
from .planted_defects import CLEAN

Tasks = Mapping[str, Sequence[Question]]  # by the task's name

def answered_right(records: Sequence[Mapping], task: str) -> np.ndarray:
    """Which questions each record's model got right by `acc_norm`: 0 or 1, (records, questions)."""
    told = [record["choices"][task]["right_norm"] for record in records]
    return np.array([[int(mark) for mark in marks] for marks in told], float)


def difference(right: np.ndarray, versus: np.ndarray) -> dict[str, float]:
    """Difference of two groups' accuracy, paired by question, with a 95 % interval.

    right, versus : of `answered_right`. The variance is that over questions plus, of a group with
    several models, that over models: a little is counted twice. With one model a side the interval
    speaks of these two models.
    """
    apart = right.mean(0) - versus.mean(0)
    terms = [(apart.var(ddof=1) / len(apart), len(apart) - 1)]
    terms += [(group.mean(1).var(ddof=1) / len(group), len(group) - 1)
              for group in (right, versus) if len(group) > 1]
    total = sum(one for one, _ in terms)
    df = total**2 / sum(one**2 / d for one, d in terms) if total else 1.0  # Satterthwaite
    half = stats.t.isf(0.025, df) * np.sqrt(total)
    return {"accuracy": right.mean(), "versus": versus.mean(), "difference": apart.mean(),
            "low": apart.mean() - half, "high": apart.mean() + half}  # fmt: skip


def chances(tasks: Tasks) -> dict[str, float]:
    """The share that guessing gets right, by task."""
    return {name: float(np.mean([1 / len(one.choices) for one in questions]))
            for name, questions in tasks.items()}


def base_scores(tasks: Tasks, record: Mapping) -> pd.DataFrame:
    """What the untuned base scores on every task, beside chance.

    record : of any run of that base. One row a task: questions, chance, acc, acc_norm with low and
    high (Wilson), above_chance (low > chance: a model at chance can show no difference).
    """
    rows, chance_of = [], chances(tasks)
    for name, found in record["base_choices"].items():
        chance = chance_of[name]
        hits, count = found["right_norm"].count("1"), found["questions"]
        low, high = proportion_confint(hits, count, method="wilson")
        rows.append({"task": name, "questions": count, "chance": chance, "acc": found["acc"],
                     "acc_norm": found["acc_norm"], "low": low, "high": high,
                     "above_chance": low > chance})  # fmt: skip
    return pd.DataFrame(rows).set_index("task")


def selected_against_random(ledger: Ledger, runs: pd.DataFrame) -> pd.DataFrame:
    """Do selected rows train a model that answers more questions rightly than random rows do?

    runs : the gate's, columns run_id, pool, method, size; of the size that `selected` has. One row
    a pool and task: n, n_versus, and `difference`'s columns.
    """
    rows, size = [], runs.loc[runs["method"] == "selected", "size"].iloc[0]
    for pool, part in runs[runs["size"] == size].groupby("pool", sort=False):
        groups = [[ledger.read(one) for one in part.loc[part["method"] == method, "run_id"]]
                  for method in ("selected", "random")]  # fmt: skip
        for task in groups[0][0].get("choices", {}):
            told = difference(*(answered_right(group, task) for group in groups))
            rows.append({"pool": pool, "task": task, "n": len(groups[0]),
                         "n_versus": len(groups[1]), **told})  # fmt: skip
    return pd.DataFrame(rows)


PRIMARY = ("loss_eval_1", "loss_eval_1_token")  # the co-primary losses
WHOSE = {"all": "all", "sweep": "the sweep's"}  # models, in words
LEAST = 5  # models, or sources, that an interval rests on


def models(study: Study) -> pd.DataFrame:
    """Every finished run of the study's base that was asked the tasks, with its `group`.

    The group is what models have in common: the source of their rows (of a mixture the largest),
    else the kind of defect, else the pool. Empty where no task was asked.
    """
    runs = study.ledger_of(study.find("ledger")).load()
    tasks = tasks_in(runs)
    if not tasks:
        return pd.DataFrame()
    kept = runs[(runs["status"] == "done") & (runs["base"] == study.base_of_sweep()["id"])]
    kept = kept.dropna(subset=tasks, how="all").reset_index(drop=True)
    return kept.assign(group=[_group(row) for row in kept.to_dict("records")])


def tasks_in(runs: pd.DataFrame) -> list[str]:
    """The columns of the tasks' accuracies per character (`acc_norm`)."""
    return [name for name in runs if name.startswith("accuracy_") and name.endswith("_norm")]


def _group(row: dict) -> str:
    named = [row.get(name) for name in ("source", "kind", "pool")]
    told = next((one for one in named if isinstance(one, str) and one), row["purpose"])
    shares = row.get("shares")
    return max(shares, key=shares.get) if isinstance(shares, dict) and shares else told


def correlations(runs: pd.DataFrame) -> pd.DataFrame:
    """Pearson's correlation of every loss with every task.

    runs : from `models`. One row a set of models ("sweep": the designed sets, of one size; "all"),
    loss and task: models, r, low, high (Fisher's z, over runs), groups, low_sources, high_sources
    (delete-one-group jackknife of z with t, over sources; NaN for fewer than `LEAST`). Negative
    where a lower loss goes with a better answer.
    """
    rows, losses = [], [name for name in LOSSES if name in runs]
    for name, part in (("sweep", runs[runs["purpose"] == "sweep"]), ("all", runs)):
        for loss in losses:
            for task in tasks_in(runs):
                both = part[[loss, task, "group"]].dropna()
                rows.append({"runs": name, "loss": loss, "task": task, "models": len(both),
                             **_correlation(both[loss], both[task], both["group"])})
    return pd.DataFrame(rows)


def _correlation(x: pd.Series, y: pd.Series, group: pd.Series) -> dict[str, float]:
    z, names, reach, over = _fisher(x, y), group.unique(), np.nan, np.nan
    if len(x) >= LEAST:
        reach = stats.norm.isf(0.025) / np.sqrt(len(x) - 3)
    if min(len(x), len(names)) >= LEAST:
        left = np.array([_fisher(x[group != one], y[group != one]) for one in names])
        over = stats.t.isf(0.025, len(left) - 1) * np.sqrt((len(left) - 1) * left.var())
    return {"r": np.tanh(z), "low": np.tanh(z - reach), "high": np.tanh(z + reach),
            "groups": len(names), "low_sources": np.tanh(z - over),
            "high_sources": np.tanh(z + over)}  # fmt: skip


def _fisher(x: pd.Series, y: pd.Series) -> float:
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return np.nan
    return float(np.arctanh(np.clip(np.corrcoef(x, y)[0, 1], -1 + 1e-9, 1 - 1e-9)))


def damage_costs(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """What each kind of damage costs: in loss, and in each task.

    runs : columns run_id, kind, dose, loss_eval_1; each kind at its largest dose is held against
    kind "clean". One row a kind and task: loss (relative change), accuracy, versus, difference,
    low, high (shares of the questions, `difference`).
    """
    ledger, rows = study.ledger_of(study.find("ledger")), []
    clean = runs[runs["kind"] == CLEAN]
    for kind, part in runs[runs["kind"] != CLEAN].groupby("kind", sort=False):
        part = part[part["dose"] == part["dose"].max()]
        change = np.log(part["loss_eval_1"]).mean() - np.log(clean["loss_eval_1"]).mean()
        here, there = ([ledger.read(one) for one in some["run_id"]] for some in (part, clean))
        for task in here[0].get("choices", {}):
            told = difference(answered_right(here, task), answered_right(there, task))
            rows.append({"kind": kind, "task": task, "loss": np.expm1(change), **told})
    return pd.DataFrame(rows)


def proxy_claim(table: pd.DataFrame) -> dict[str, str]:
    """Does a lower loss go with better answers? From `correlations`.

    It holds for a task where both intervals of both losses on the first evaluation set lie below 0;
    asked of all models and of the sweep's alone, since models of damaged or tiny sets may carry the
    whole of a correlation.
    """
    if table.empty:
        return unasked("no run was asked a task (data.choices is empty)")
    primary, ours, verdicts = table[table["loss"].isin(PRIMARY)], [], []
    for task, part in primary.groupby("task", sort=False):
        name, words = task.removeprefix("accuracy_").removesuffix("_norm"), {}
        for which, rows in part.groupby("runs"):
            one, words[which] = rows.iloc[0], _word(rows)
            ours.append(f"{name}, {WHOSE[which]} {one.models} models: r = {one.r:+.2f} "
                        f"[{one.low:+.2f}, {one.high:+.2f}], over sources "
                        f"[{one.low_sources:+.2f}, {one.high_sources:+.2f}]")
        alike = len(set(words.values())) == 1
        verdicts.append(f"{name}: " + (words["all"] if alike else
                        f"{words['all']} over all models, {words['sweep']} in the sweep alone"))
    most = primary["models"].max()
    return {"ours": "; ".join(ours), "verdict": "; ".join(verdicts),
            "detectable": f"|r| of {np.tanh(2.8 / np.sqrt(max(most - 3, 1))):.2f}"}


def _word(rows: pd.DataFrame) -> str:
    low, high = rows[["low", "low_sources"]].min(), rows[["high", "high_sources"]].max()
    if rows.isna().any(axis=None):
        return UNDECIDED
    return HOLDS if high.max() < 0 else FAILS if low.min() > 0 else UNDECIDED
