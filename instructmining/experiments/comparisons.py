"""Which finetunes each question needs: plans, made from a study, that `Study.run` carries out.

A plan's label has the columns that tables and figures read: pool, method, size and seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining_core.config import ModelRef
from instructmining_core.regression.inference import r2_of
from instructmining_core.regression.rule import RuleFit, fit_rule
from instructmining_core.regression.rule_card import RuleCard, make_card
from instructmining_core.regression.run_table import DESIGNED, Standardizer
from instructmining_core.selection.beat_random import compare_with_random
from instructmining_core.selection.improvement import Arms, improvement
from instructmining_core.selection.select import choose_rows

from ..design import interleaved
from ..study import USUAL, PlannedRun, Study

LOSSES = ["loss_eval_1", "loss_eval_2", "loss_eval_1_token", "loss_eval_2_token"]
GATE_COLUMNS = ["run_id", "pool", "method", "size", "seed", *LOSSES, "rows", "steps",
                "tokens_trained", "seconds",
                "base_eval_2", "base_eval_2_token", "relevance", "base_relevance"]  # fmt: skip
SAME = 0.8  # Jaccard index from which two selections count as the same


def sweep_plans(study: Study) -> list[PlannedRun]:
    """One finetune for each designed set and for each anchor's further seeds.

    Any first part of the list holds every arm, and every source of a tilted set, in proportion.
    """
    wanted = study.profile.design.by_epoch
    plans = []
    for one in study.sets:
        label = {"set_id": one.set_id, "arm": one.arm, "source": one.source, "anchor": one.anchor,
                 "shares": dict(one.shares), "tilt": list(one.tilt)}  # fmt: skip
        often = wanted == "all" or (wanted == "anchors" and one.anchor)
        plans.append(PlannedRun(one.row_hashes, label, one.init_seed, one.order_seed, often))
    return interleaved(plans, lambda p: (p.label["arm"], p.label["source"], p.label["anchor"]))


def one_run(
    rows: pd.DataFrame, pool: str, method: str, size: int, seed: int, exams: Sequence[str] = ()
) -> PlannedRun:
    """A finetune on `rows`; exams : evaluation sets beside the usual ones."""
    label = {"pool": pool, "method": method, "size": size, "seed": seed}
    return PlannedRun(tuple(rows["row_hash"]), label, seed, seed, exams=(*USUAL, *exams))


def per_example(
    study: Study, runs: pd.DataFrame, evaluation: str = "eval_2"
) -> dict[tuple[str, str, int], np.ndarray]:
    """Losses by prompt of comparison runs: (pool, method, size) -> ndarray (runs, prompts).

    runs : from `Study.run`, columns run_id, pool, method, size, seed. Runs stand in the order of
    their seeds, diverged ones left out; nats per token of the answers' body; prompts without
    any are in no column. The mean of a row is that run's `loss_<evaluation>`.
    """
    ledger = study.ledger_of(study.find("ledger"))
    finished = runs.dropna(subset=[f"loss_{evaluation}"]).sort_values("seed", kind="stable")
    found = {}
    for key, part in finished.groupby(["pool", "method", "size"], sort=False):
        examples = [ledger.read(one)["examples"][evaluation] for one in part["run_id"]]
        nll, tokens = (np.array([body_of(one, name) for one in examples]) for name in
                       ("nll", "tokens"))  # fmt: skip
        asked = tokens[0] > 0
        found[key] = nll[:, asked] / tokens[:, asked]
    return found


def body_of(example: Mapping[str, Sequence[float]], name: str) -> np.ndarray:
    """nll or tokens of the answers' body by prompt: without first token and end mark."""
    return np.array(example[name], float) - sum(
        np.nan_to_num(np.array(example[f"{name}_{part}"], float)) for part in ("first", "eos")
    )


def base_by_prompt(study: Study, evaluation: str) -> tuple[np.ndarray, np.ndarray]:
    """The untuned base's nll of the answers' body by prompt, nats, and its tokens."""
    from instructmining_core.models.causal_lm import evaluate

    rows = study.encoded_evals(study.lm, study.profile.finetune, (evaluation,))[evaluation]
    _, frame = evaluate(study.lm, rows)
    return body_of(frame, "nll"), body_of(frame, "tokens")


def improvements(study: Study, evaluation: str = "eval_2") -> pd.DataFrame:
    """How much of what random rows gain over the base the gate's selections gain beyond it.

    One row an averaging of the loss ("prompts", "tokens"), columns of `Improvement`. Finetunes of
    refitted rules count as selections.
    """
    runs = study.runs("gate")
    if study.profile.selection.refits:
        runs = pd.concat([runs, study.runs("refit")], ignore_index=True)
    runs = runs[runs["size"] == study.profile.selection.size]
    losses, arms = per_example(study, runs, evaluation), {}
    for pool in runs["pool"].unique():
        own = {method: part for (name, method, _), part in losses.items() if name == pool}
        selected = [own[method] for method in ("selected", "refit") if method in own]
        if selected and "random" in own:
            arms[pool] = Arms(np.vstack(selected), own["random"])
    nll, tokens = base_by_prompt(study, evaluation)
    base, tokens = nll[tokens > 0] / tokens[tokens > 0], tokens[tokens > 0]
    found = {"prompts": improvement(arms, base), "tokens": improvement(arms, base, weights=tokens)}
    return pd.DataFrame.from_dict({name: one._asdict() for name, one in found.items()},
                                  orient="index").rename_axis("averaging").reset_index()


def welch_interval(first: pd.Series, second: pd.Series) -> tuple[float, float]:
    """95 % interval of the difference of two means; NaN for a single value on a side."""
    if min(len(first), len(second)) < 2:
        return np.nan, np.nan
    both = CompareMeans(DescrStatsW(first), DescrStatsW(second))
    return tuple(float(x) for x in both.tconfint_diff(usevar="unequal"))


def repeated(
    study: Study, rule: RuleCard, pool: str, method: str, size: int, repeats: int, first: int = 0
) -> list[PlannedRun]:
    """`repeats` finetunes of one method on one pool, seeds `first`, `first` + 1, ...

    A random draw changes with its seed; every other method keeps its rows.
    """
    scores, plans = study.pool_scores(pool), []
    for seed in range(first, first + repeats):
        rows = choose_rows(scores, method, size, rule=rule, seed=seed)
        plans.append(one_run(rows, pool, method, len(rows), seed))
    return plans


def _with_random(
    study: Study, rule: RuleCard, pool: str, size: int, repeats: int, first: int = 0
) -> list[PlannedRun]:
    return [plan for method in ("selected", "random")
            for plan in repeated(study, rule, pool, method, size, repeats, first)]  # fmt: skip


def size_pool(study: Study) -> str:
    """The pool of the size curve and the robustness runs: the largest, the first of equals."""
    return max(study.data.pools, key=lambda name: len(study.data.pools[name]))


def size_trial(study: Study, rule: RuleCard, pool: str) -> Callable[[int], float]:
    """For the search: size of the best rows -> loss on the fitting set; the other is reported.

    The paper searches on the set that it reports (v3).
    """

    def trial(size: int) -> float:
        runs = study.run("search", repeated(study, rule, pool, "selected", size, 1), progress=False)
        return float(runs["loss_eval_1"].iloc[0])

    return trial


def size_plans(
    study: Study, rule: RuleCard, pool: str, found: Sequence[int]
) -> list[PlannedRun]:
    """Selected and random rows at each size, and at the sizes that searches found.

    Seeds start at 1: a search uses seed 0, and its winner has to be seen anew.
    """
    config, most = study.profile.size, len(study.data.pools[pool])
    sizes = sorted({min(size, most) for size in (*config.sizes, *found)})
    return [plan for size in sizes
            for plan in _with_random(study, rule, pool, size, config.draws, first=1)]  # fmt: skip


def at_fixed_steps(study: Study, plans: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The same sets, each trained for one number of steps; the label's pool names it.

    Here a set is written out again and again, a part of it once more at the end, as one epoch: of
    as many steps as the gate's sets take, or as the largest set needs to be seen once.
    """
    usual = study.profile.finetune
    largest = max(len(plan.row_hashes) for plan in plans)
    steps = max(usual.steps(study.profile.selection.size), -(-largest // usual.batch_size))
    config, needed, made = dataclasses.replace(usual, epochs=1), steps * usual.batch_size, []
    for plan in plans:
        own, rng = plan.row_hashes, np.random.default_rng(plan.order_seed)
        again, rest = divmod(needed, len(own))
        once_more = tuple(own[i] for i in rng.permutation(len(own))[:rest])
        label = {**plan.label, "pool": f"{plan.label['pool']}, {steps} steps"}
        made.append(dataclasses.replace(plan, row_hashes=own * again + once_more, label=label,
                                        config=config))  # fmt: skip
    return made


def robustness_plans(study: Study, rule: RuleCard) -> list[tuple[dict, list[PlannedRun]]]:
    """Pairs of (arguments of `Study.run`, plans): each method of finetuning, and each base.

    The label's pool names the setting, so that each is set against its own random draws.
    """
    config, usual, pool = study.profile.robustness, study.profile.finetune, size_pool(study)
    settings: dict[str, dict] = {}
    for method in config.methods:
        turned_full = method == "full" != usual.method
        rate = config.full_learning_rate if turned_full else usual.learning_rate
        changed = dataclasses.replace(usual, method=method, learning_rate=rate)
        settings[method] = {"config": changed}
    for ref in study.profile.models.ladder:
        settings[f"base {ref.id.removeprefix('standin:')}"] = {"base": ref}
    plans = _with_random(study, rule, pool, study.profile.selection.size, config.seeds)
    return [
        (arguments, [dataclasses.replace(plan, label={**plan.label, "pool": f"{name}, {pool}"})
                     for plan in plans])
        for name, arguments in settings.items()
    ]  # fmt: skip


def ladder_sweep(study: Study, base: ModelRef) -> pd.DataFrame:
    """The designed arm of the sweep on another base, without the anchors' repeats."""
    plans = [p for p in sweep_plans(study) if p.label["arm"] in DESIGNED and not p.label["anchor"]]
    return study.run("transfer", plans, base=base)


def smaller_rules(
    runs: pd.DataFrame, scores: pd.DataFrame, columns: Sequence[str]
) -> dict[str, tuple[RuleFit, RuleCard]]:
    """The rule without each indicator in turn, fitted on the same runs; empty for one column.

    scores : the rows of the fitting pool, which standardise
    """
    found = {}
    for dropped in columns if len(columns) > 1 else []:
        kept = [c for c in columns if c != dropped]
        fit = fit_rule(runs, kept, Standardizer.fit(scores, kept))
        found[dropped] = fit, make_card(fit, scores, not_for="anything but the ablation",
                                        note=f"the study's rule without {dropped}")  # fmt: skip
    return found


def ablation_overlaps(
    pool: pd.DataFrame, size: int, rule: RuleCard, smaller: Mapping[str, tuple[RuleFit, RuleCard]]
) -> pd.DataFrame:
    """How much of the full rule's selection each of `smaller_rules` keeps.

    One row an indicator: without, jaccard, r2 of the smaller rule beyond the shares with r2_low
    and r2_high (these sources), finetuned (whether the selections differ enough, see `SAME`).
    """
    whole = set(choose_rows(pool, "selected", size, rule=rule)["row_hash"])
    rows = []
    for dropped, (fit, card) in smaller.items():
        part = set(choose_rows(pool, "selected", size, rule=card)["row_hash"])
        rows.append((dropped, len(part & whole) / len(part | whole), *r2_of(fit)))
    table = pd.DataFrame(rows, columns=["without", "jaccard", "r2", "r2_low", "r2_high"])
    return table.assign(finetuned=table["jaccard"] < SAME)


def ablation(study: Study, rule: RuleCard) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which indicator carries the rule? Drop one, refit, select anew, finetune (v3, Table 5).

    Returns `ablation_overlaps`, and the contrasts (unadjusted) of the full rule, random rows and
    each smaller rule that selects other rows, on the largest pool: empty without
    `robustness.ablation` or where no selection differs enough.
    """
    smaller = smaller_rules(study.sweep(), study.candidate_scores, study.profile.rule_columns())
    pool, size = size_pool(study), study.profile.selection.size
    scores, seeds = study.pool_scores(pool), study.profile.robustness.seeds
    table = ablation_overlaps(scores, size, rule, smaller)
    others = table.loc[table["finetuned"], "without"]
    if not study.profile.robustness.ablation or others.empty:
        return table, pd.DataFrame()
    plans = _with_random(study, rule, pool, size, seeds)
    for dropped in others:
        rows = choose_rows(scores, "selected", size, rule=smaller[dropped][1])
        plans += [one_run(rows, pool, f"without {dropped}", len(rows), seed)
                  for seed in range(seeds)]  # fmt: skip
    return table, compare_with_random(study.run("ablation", plans))


def draw_prompts(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows of a record table, as equally from its sources as they allow, by seed.

    The numbers from any two sources differ by at most one, unless one has no more rows. Rows keep
    the table's order; all of them where the table has no more than `count`.
    """
    shuffled = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    # one row of every source, then a second of every source, ...
    turn = shuffled.groupby("source", sort=False).cumcount()
    first = shuffled.loc[turn.sort_values(kind="stable").index[:count]]
    return table[table.index.isin(first.index)]

