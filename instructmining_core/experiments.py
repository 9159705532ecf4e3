"""Which finetunes each question needs: plans, made from a study, that `Study.run` carries out.

Every plan's label has the columns that the tables of `verify` and `figures` read: pool, method,
size and seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from .card import RuleCard
from .ledger import Ledger
from .profiles import FinetuneConfig, ModelRef
from .runs import DESIGNED
from .selection import TOKENS, choose, choose_tokens
from .study import Plan, Study

LOSSES = ["loss_eval_1", "loss_eval_2", "loss_eval_1_token", "loss_eval_2_token"]
GATE_COLUMNS = ["run_id", "pool", "method", "size", "seed", *LOSSES, "rows", "steps",
                "tokens_trained", "seconds"]  # fmt: skip
DOSE_COLUMNS = ["run_id", "kind", "dose", "seed", *LOSSES]
FREE_RIVALS = ("longest", "shortest", "lowest_ppl", "reward", "compression")


def sweep_plans(study: Study) -> list[Plan]:
    """One finetune for each designed set and for each anchor's further seeds."""
    wanted = study.profile.design.by_epoch
    return [
        Plan(
            one.row_hashes,
            {"set_id": one.set_id, "arm": one.arm, "source": one.source, "anchor": one.anchor,
             "shares": dict(one.shares), "tilt": list(one.tilt)},
            one.init_seed,
            one.order_seed,
            by_epoch=wanted == "all" or (wanted == "anchors" and one.anchor),
        )
        for one in study.sets
    ]  # fmt: skip


def gate_plans(study: Study, rule: RuleCard) -> list[Plan]:
    """For every pool: the rule's best rows on several seeds, random draws, and each rival, at equal
    rows and once more at equal tokens.
    """
    config = study.profile.selection
    plans = []
    for pool in study.data.pools:
        counts = {"selected": config.seeds, "random": config.draws}
        counts |= {method: config.baseline_seeds for method in FREE_RIVALS}
        for method, repeats in counts.items():
            plans += repeated(study, rule, pool, method, config.size, repeats)
        plans += token_plans(study, rule, pool)
        size = len(study.data.pools[pool])
        plans += repeated(study, rule, pool, "full", size, config.baseline_seeds)
    return plans


def token_plans(study: Study, rule: RuleCard, pool: str) -> list[Plan]:
    """Random draws and rivals of one pool, each with as many target tokens as the selected rows.

    Methods are named `<method>_tokens`. The label's size is that of the selected set, for the
    tables; a set's own number of rows is what fits, so its number of steps is another one.
    """
    config, scores = study.profile.selection, study.pool_scores(pool)
    cost = target_tokens(study, scores["row_hash"])

    def tokens_of(rows: pd.DataFrame) -> list[int]:
        return [cost[one] for one in rows["row_hash"]]

    tokens = sum(tokens_of(choose(scores, "selected", config.size, rule=rule)))
    counts = {"random": config.draws} | dict.fromkeys(FREE_RIVALS, config.baseline_seeds)
    plans = []
    for method, repeats in counts.items():
        for seed in range(repeats):
            rows = choose_tokens(scores, method, tokens, seed=seed, tokens_of=tokens_of)
            label = {"pool": pool, "method": method + TOKENS, "size": config.size, "seed": seed}
            plans.append(Plan(tuple(rows["row_hash"]), label, init_seed=seed, order_seed=seed))
    return plans


def target_tokens(study: Study, hashes: Sequence[str]) -> dict[str, int]:
    """Row hash -> tokens that count in the loss of one pass over the row, as it is trained on."""
    encoded = study.encoded_rows(study.lm, study.profile.finetune, set(hashes))
    return {one: int(sum(row.targets)) for one, row in encoded.items()}


def per_example(
    study: Study, runs: pd.DataFrame, evaluation: str = "eval_2"
) -> dict[tuple[str, str, int], np.ndarray]:
    """Losses by prompt of comparison runs: (pool, method, size) -> ndarray (runs, prompts).

    runs : from `Study.run`, columns run_id, pool, method, size, seed. Runs stand in the order of
    their seeds, diverged ones left out; nats per target token; prompts without any target token
    are in no column. The mean of a row is that run's `loss_<evaluation>`.
    """
    ledger = Ledger(study.find("ledger"))
    finished = runs.dropna(subset=[f"loss_{evaluation}"]).sort_values("seed", kind="stable")
    found = {}
    for key, part in finished.groupby(["pool", "method", "size"], sort=False):
        examples = [ledger.read(one)["examples"][evaluation] for one in part["run_id"]]
        nll = np.array([one["nll"] for one in examples], float)
        tokens = np.array([one["tokens"] for one in examples], float)
        asked = tokens[0] > 0
        found[key] = nll[:, asked] / tokens[:, asked]
    return found


def repeated(
    study: Study, rule: RuleCard, pool: str, method: str, size: int, repeats: int, first: int = 0
) -> list[Plan]:
    """`repeats` finetunes of one method on one pool, seeds `first`, `first` + 1, ...

    A random draw changes with its seed; every other method keeps its rows.
    """
    scores = study.pool_scores(pool)
    plans = []
    for seed in range(first, first + repeats):
        rows = choose(scores, method, size, rule=rule, seed=seed)
        label = {"pool": pool, "method": method, "size": len(rows), "seed": seed}
        plans.append(Plan(tuple(rows["row_hash"]), label, init_seed=seed, order_seed=seed))
    return plans


def describe(plans: Sequence[Plan]) -> pd.DataFrame:
    """How many finetunes each method gets in a pool, and the mean rows of one, by pool."""
    labels = pd.DataFrame([{**plan.label, "rows": len(plan.row_hashes)} for plan in plans])
    groups = labels.groupby(["method", "pool"], sort=False)
    counts = groups.size().groupby("method", sort=False).max().rename("finetunes")
    sizes = groups["rows"].mean().unstack("pool", sort=False)
    return sizes.add_prefix("rows, ").join(counts)


def overlap(plans: Sequence[Plan]) -> pd.DataFrame:
    """Mean Jaccard index over pools between the rows of the methods, each at its first seed."""
    first = {
        (plan.label["pool"], plan.label["method"]): set(plan.row_hashes)
        for plan in plans
        if plan.label["seed"] == 0
    }
    methods = list(dict.fromkeys(method for _, method in first))
    pools = list(dict.fromkeys(pool for pool, _ in first))

    def jaccard(a: str, b: str) -> float:
        pairs = [(first[pool, a], first[pool, b]) for pool in pools]
        return sum(len(x & y) / len(x | y) for x, y in pairs) / len(pairs)

    return pd.DataFrame({a: {b: jaccard(a, b) for b in methods} for a in methods})


def selected_means(study: Study, plans: Sequence[Plan]) -> pd.DataFrame:
    """Mean of each indicator over the rows that each method takes, over all pools."""
    by_hash = study.scores.drop_duplicates("row_hash").set_index("row_hash")
    columns = list(study.profile.indicators)
    means = [
        by_hash.loc[list(plan.row_hashes), columns].mean().rename(plan.label["method"])
        for plan in plans
        if plan.label["seed"] == 0
    ]
    frame = pd.DataFrame(means)
    return frame.groupby(frame.index, sort=False).mean()


def pool_rows(study: Study) -> pd.DataFrame:
    """The scores of every pool's rows, each row once, with what made them in `.attrs`."""
    rows = pd.concat([study.pool_scores(pool) for pool in study.data.pools], ignore_index=True)
    rows = rows.drop_duplicates("row_hash", ignore_index=True)
    rows.attrs = study.scores.attrs
    return rows


def size_pool(study: Study) -> str:
    """The pool of the size curve and the robustness runs: the largest, the first of equals."""
    return max(study.data.pools, key=lambda name: len(study.data.pools[name]))


def size_trial(study: Study, rule: RuleCard, pool: str) -> Callable[[int], float]:
    """For the search: size of the best rows -> loss on the reporting set, as in the paper."""

    def trial(size: int) -> float:
        runs = study.run("search", repeated(study, rule, pool, "selected", size, 1), progress=False)
        return float(runs["loss_eval_2"].iloc[0])

    return trial


def size_plans(study: Study, rule: RuleCard, pool: str, best: int) -> list[Plan]:
    """Selected and random rows at each size, and at the size that the search found.

    Seeds start at 1: the search used seed 0, and its winner has to be seen anew.
    """
    config = study.profile.size
    most = len(study.data.pools[pool])
    sizes = sorted({min(size, most) for size in (*config.sizes, best)})
    return [
        plan
        for size in sizes
        for method in ("selected", "random")
        for plan in repeated(study, rule, pool, method, size, config.draws, first=1)
    ]


def robustness_plans(study: Study, rule: RuleCard) -> list[tuple[dict, list[Plan]]]:
    """Pairs of (arguments of `Study.run`, plans): each method of finetuning, and each base.

    The label's pool names the setting, so that `verify.compare` sets each against its own random
    draws.
    """
    config = study.profile.robustness
    settings = [(f"{method}", {"config": _method(study, method)}) for method in config.methods]
    settings += [
        (f"base {ref.id.removeprefix('standin:')}", {"base": ref})
        for ref in study.profile.models.ladder
    ]
    return [(arguments, _setting(study, rule, name)) for name, arguments in settings]


def _method(study: Study, method: str) -> FinetuneConfig:
    rate = study.profile.finetune.learning_rate
    if method == "full" and study.profile.finetune.method != "full":
        rate = study.profile.robustness.full_learning_rate
    return dataclasses.replace(study.profile.finetune, method=method, learning_rate=rate)


def _setting(study: Study, rule: RuleCard, name: str) -> list[Plan]:
    pool, size = size_pool(study), study.profile.selection.size
    plans = [
        plan
        for method in ("selected", "random")
        for plan in repeated(study, rule, pool, method, size, study.profile.robustness.seeds)
    ]
    return [
        dataclasses.replace(plan, label={**plan.label, "pool": f"{name}, {pool}"})
        for plan in plans
    ]


def ladder_sweep(study: Study, base: ModelRef) -> pd.DataFrame:
    """The designed arm of the sweep on another base, without the anchors' repeats."""
    plans = [p for p in sweep_plans(study) if p.label["arm"] in DESIGNED and not p.label["anchor"]]
    return study.run("transfer", plans, base=base)
