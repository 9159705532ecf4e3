"""Which finetunes each question needs: plans, made from a study, that `Study.run` carries out.

A plan's label has the columns that tables and figures read: pool, method, size and seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from instructmining_core.config import ModelRef
from instructmining_core.data.records import row_hash, with_row_hash
from instructmining_core.finetuning.ledger import Ledger
from instructmining_core.regression.intervals import r2_of
from instructmining_core.regression.rule import RuleFit, fit_rule
from instructmining_core.regression.rule_card import RuleCard, make_card
from instructmining_core.regression.run_table import (
    DESIGNED,
    RankError,
    RunsError,
    Standardizer,
    pick_arms,
)
from instructmining_core.selection.beat_random import compare_with_random
from instructmining_core.selection.select import TOKENS, choose_rows, choose_tokens

from .study import PlannedRun, Study

LOSSES = ["loss_eval_1", "loss_eval_2", "loss_eval_1_token", "loss_eval_2_token"]
GATE_COLUMNS = ["run_id", "pool", "method", "size", "seed", *LOSSES, "rows", "steps",
                "tokens_trained", "seconds"]  # fmt: skip
TRIES = 100  # resamples that may fail to tell the set means apart, before it is an error
SAME = 0.8  # Jaccard index from which two selections count as the same
FREE_RIVALS = ("longest", "shortest", "lowest_ppl", "reward", "compression")


def sweep_plans(study: Study) -> list[PlannedRun]:
    """One finetune for each designed set and for each anchor's further seeds."""
    wanted = study.profile.design.by_epoch
    return [
        PlannedRun(
            one.row_hashes,
            {"set_id": one.set_id, "arm": one.arm, "source": one.source, "anchor": one.anchor,
             "shares": dict(one.shares), "tilt": list(one.tilt)},
            one.init_seed,
            one.order_seed,
            by_epoch=wanted == "all" or (wanted == "anchors" and one.anchor),
        )
        for one in study.sets
    ]  # fmt: skip


def _plan(rows: pd.DataFrame, pool: str, method: str, size: int, seed: int) -> PlannedRun:
    label = {"pool": pool, "method": method, "size": size, "seed": seed}
    return PlannedRun(tuple(rows["row_hash"]), label, init_seed=seed, order_seed=seed)


def gate_plans(study: Study, rule: RuleCard) -> list[PlannedRun]:
    """For every pool: the rule's best rows on several seeds, random draws, and each rival, at equal
    rows and once more at equal tokens.
    """
    config = study.profile.selection
    plans = []
    for pool, rows in study.data.pools.items():
        counts = {"selected": config.seeds, "random": config.draws}
        counts |= dict.fromkeys(FREE_RIVALS, config.baseline_seeds)
        for method, repeats in counts.items():
            plans += repeated(study, rule, pool, method, config.size, repeats)
        plans += token_plans(study, rule, pool)
        plans += repeated(study, rule, pool, "full", len(rows), config.baseline_seeds)
    return plans


def token_plans(study: Study, rule: RuleCard, pool: str) -> list[PlannedRun]:
    """Random draws and rivals of one pool, each with as many target tokens as the selected rows.

    Methods are named `<method>_tokens`. The label's size is that of the selected set, for the
    tables; a set's own number of rows is what fits, so its number of steps is another one.
    """
    config, scores = study.profile.selection, study.pool_scores(pool)
    cost = target_tokens(study, scores["row_hash"])

    def tokens_of(rows: pd.DataFrame) -> list[int]:
        return rows["row_hash"].map(cost).tolist()

    tokens = sum(tokens_of(choose_rows(scores, "selected", config.size, rule=rule)))
    counts = {"random": config.draws} | dict.fromkeys(FREE_RIVALS, config.baseline_seeds)
    return [
        _plan(choose_tokens(scores, method, tokens, seed=seed, tokens_of=tokens_of), pool,
              method + TOKENS, config.size, seed)
        for method, repeats in counts.items() for seed in range(repeats)
    ]  # fmt: skip


def target_tokens(study: Study, hashes: Sequence[str]) -> dict[str, int]:
    """Row hash -> tokens that count in the loss of one pass over the row, as it is trained on."""
    encoded = study.encoded_rows(study.lm, study.profile.finetune, set(hashes))
    return {one: int(sum(row.targets)) for one, row in encoded.items()}


def per_example(
    study: Study, runs: pd.DataFrame, evaluation: str = "eval_2"
) -> dict[tuple[str, str, int], np.ndarray]:
    """Losses by prompt of comparison runs: (pool, method, size) -> ndarray (runs, prompts).

    runs : from `Study.run`, columns run_id, pool, method, size, seed. Runs stand in the order of
    their seeds, diverged ones left out; nats per token of the answers' body; prompts without
    any are in no column. The mean of a row is that run's `loss_<evaluation>`.
    """
    ledger = Ledger(study.find("ledger"))
    finished = runs.dropna(subset=[f"loss_{evaluation}"]).sort_values("seed", kind="stable")
    found = {}
    for key, part in finished.groupby(["pool", "method", "size"], sort=False):
        examples = [ledger.read(one)["examples"][evaluation] for one in part["run_id"]]
        nll, tokens = (np.array([_body(one, name) for one in examples]) for name in
                       ("nll", "tokens"))  # fmt: skip
        asked = tokens[0] > 0
        found[key] = nll[:, asked] / tokens[:, asked]
    return found


def _body(example: Mapping[str, list], name: str) -> np.ndarray:
    """nll or tokens of the answers' body by prompt; of whole answers in records without parts."""
    parts = (f"{name}_first", f"{name}_eos") if f"{name}_first" in example else ()
    return np.array(example[name], float) - sum(
        np.nan_to_num(np.array(example[part], float)) for part in parts
    )


def repeated(
    study: Study, rule: RuleCard, pool: str, method: str, size: int, repeats: int, first: int = 0
) -> list[PlannedRun]:
    """`repeats` finetunes of one method on one pool, seeds `first`, `first` + 1, ...

    A random draw changes with its seed; every other method keeps its rows.
    """
    scores = study.pool_scores(pool)
    plans = []
    for seed in range(first, first + repeats):
        rows = choose_rows(scores, method, size, rule=rule, seed=seed)
        plans.append(_plan(rows, pool, method, len(rows), seed))
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
    """For the search: size of the best rows -> loss on the reporting set, as in the paper."""

    def trial(size: int) -> float:
        runs = study.run("search", repeated(study, rule, pool, "selected", size, 1), progress=False)
        return float(runs["loss_eval_2"].iloc[0])

    return trial


def size_plans(study: Study, rule: RuleCard, pool: str, best: int) -> list[PlannedRun]:
    """Selected and random rows at each size, and at the size that the search found.

    Seeds start at 1: the search used seed 0, and its winner has to be seen anew.
    """
    config, most = study.profile.size, len(study.data.pools[pool])
    sizes = sorted({min(size, most) for size in (*config.sizes, best)})
    return [plan for size in sizes
            for plan in _with_random(study, rule, pool, size, config.draws, first=1)]  # fmt: skip


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


def refit_cards(study: Study, n: int) -> list[RuleCard]:
    """`n` rules, each fitted to the study's sweep with its sets drawn again.

    Over refitted rules a contrast carries the uncertainty of the sweep too (statistical plan,
    section 6). Estimator, indicators and standardising constants are those of the study's rule. A
    resample whose set means can't be told apart is drawn again; RunsError where `TRIES` in a row
    can't.
    """
    columns, scores = study.profile.rule_columns(), study.candidate_scores
    constants = Standardizer.fit(scores, columns)
    runs, rng = pick_arms(study.sweep(), DESIGNED), np.random.default_rng(0)

    def fitted() -> RuleFit:
        for _ in range(TRIES):
            try:
                return fit_rule(resampled(runs, rng), columns, constants, arms=None)
            except RankError:
                continue
        raise RunsError(
            f"{TRIES} resamples of {len(runs)} sets left too few distinct ones for "
            f"{len(columns)} slopes beside the source shares: more sets a source are needed"
        )

    fits = [fitted() for _ in range(n)]
    return [
        make_card(
            fit, scores, profile=study.profile.name, set_size=study.profile.design.size,
            note=f"bootstrap {i}: sets drawn again, {fit.runs['drawn'].nunique()} of them distinct",
            not_for="selecting: it shows how far the study's own rule is uncertain",
        )
        for i, fit in enumerate(fits)
    ]  # fmt: skip


def resampled(runs: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """One bootstrap of a sweep: rows drawn with replacement within `arm` and `source`.

    runs : one row a set. Copies get set ids of their own, since a fit takes one run a set_id; the
    id that was drawn is in `drawn`.
    """
    parts = [part.iloc[rng.integers(len(part), size=len(part))]
             for _, part in runs.groupby(["arm", "source"], sort=True)]  # fmt: skip
    drawn = pd.concat(parts, ignore_index=True)
    names = drawn["set_id"] + "#" + drawn.index.astype(str)
    return drawn.assign(drawn=drawn["set_id"], set_id=names)


def refit_plans(study: Study, cards: Sequence[RuleCard]) -> list[PlannedRun]:
    """For every pool one finetune a refitted rule, on its own best rows; method "refit".

    The refit's number is the seed of its finetune, so that runs differ by rule *and* seed, as
    random draws do by rows and seed.
    """
    size = study.profile.selection.size
    return [
        _plan(choose_rows(study.pool_scores(pool), "selected", size, rule=card), pool, "refit",
              size, i)
        for pool in study.data.pools
        for i, card in enumerate(cards)
    ]  # fmt: skip


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
    each smaller rule that selects other rows, on the largest pool: empty where the profile does
    not ask for the finetunes (`robustness.ablation`) or no selection differs enough.
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
        plans += [_plan(rows, pool, f"without {dropped}", len(rows), seed)
                  for seed in range(seeds)]  # fmt: skip
    return table, compare_with_random(study.run("ablation", plans))


def generate_pairs(study: Study, rule: RuleCard) -> pd.DataFrame:
    """Finetune pairs of models and let them answer the same prompts of eval_2, greedily.

    The prompts are drawn from all sources by the profile's data seed (`draw_prompts`).
    Returns columns pair (int), prompt_id, prompt (messages), selected, random (answers).
    """
    from instructmining_core.models.causal_lm import generate

    config = study.profile.judge
    prompts = draw_prompts(study.data.eval_2, config.prompts, study.profile.data.seed)
    questions = [messages[:-1] for messages in prompts["messages"]]
    pool, size = size_pool(study), study.profile.selection.size
    frames = []
    for pair in range(config.model_pairs):
        answers = {}
        for method in ("selected", "random"):
            plan = repeated(study, rule, pool, method, size, 1, first=pair)[0]
            with study.tuned(plan) as tuned:
                answers[method] = generate(
                    tuned.lm, questions, max_new_tokens=config.max_new_tokens, progress=True
                )
        told = {"pair": pair, "prompt_id": prompts["id"], "prompt": questions, **answers}
        frames.append(pd.DataFrame(told))
    return pd.concat(frames, ignore_index=True)


def draw_prompts(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows of a record table, as equally from its sources as they allow, by seed.

    The numbers from any two sources differ by at most one, unless one has no more rows. Rows keep
    the table's order; all of them where the table has no more than `count`.
    """
    shuffled = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    # one row of every source, then a second of every source, ...: which sources get one more
    # is as random as the rows are
    turn = shuffled.groupby("source", sort=False).cumcount()
    first = shuffled.loc[turn.sort_values(kind="stable").index[:count]]
    return table[table.index.isin(first.index)]


def judge_with_reward(study: Study, pairs: pd.DataFrame) -> pd.DataFrame:
    """The reward model's preference for each pair of answers, in both orders.

    pairs : from `generate_pairs`; returns the frame of `judge.judge_pairs`, all pairs of models.
    """
    from instructmining_core.indicators.scorer import score
    from instructmining_core.selection.judge import judge_pairs, reward_judge

    conversations = [
        [*row["prompt"], {"role": "assistant", "content": row[method]}]
        for row in pairs.to_dict("records")
        for method in ("selected", "random")
    ]
    table = with_row_hash(pd.DataFrame({
        "id": [str(i) for i in range(len(conversations))],
        "source": "answers", "messages": conversations, "file": "",
        "row": range(len(conversations)),
    }))  # fmt: skip
    ref = study.profile.models.reward
    scores = score(table, {"reward": ref}, indicators=("reward",), standins=study.standins(ref))
    rewards = dict(zip(table["row_hash"], scores["reward"], strict=True))
    judge = reward_judge(lambda messages: rewards[row_hash(messages)])
    judged = [
        judge_pairs(part["prompt"].tolist(), part["selected"].tolist(), part["random"].tolist(),
                    judge, pair=pair)
        for pair, part in pairs.groupby("pair")
    ]  # fmt: skip
    return pd.concat(judged, ignore_index=True)
