"""The gate's finetunes: of every pool, what the rule selects, random rows, and each rival's.

Where the profile says `selection.redraws`, every repeat draws from a part of the pool of its own,
so that an interval over repeats speaks of the pool and not of one selection (statistics, section
6); and a pool that is one of the candidate sources is judged by the rule fitted without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from instructmining_core.config import FinetuneConfig
from instructmining_core.regression.rule import RuleFit, fit_rule
from instructmining_core.regression.rule_card import RuleCard, make_card
from instructmining_core.regression.run_table import (
    DESIGNED,
    RankError,
    RunsError,
    Standardizer,
    pick_arms,
)
from instructmining_core.selection.select import TOKENS, choose_rows, choose_tokens

from ..design import interleaved
from ..study import PlannedRun, Study
from .comparisons import one_run

MATCHED = "matched"  # method: random rows, alike in length to those that the rule selects
MAIN = ("selected", "random", MATCHED)  # judged on every prompt that there is
LEAST = 10  # rows of a part for each that is selected, else the parts are half-samples
NEAREST = 8  # rows alike in length among which a matched row is drawn
CUT = 10.0  # sd of log length that a cut answer is away from a whole one: further than any length
TRIES = 100  # resamples that may fail to tell the set means apart, before it is an error


def gate_plans(study: Study, rule: RuleCard) -> list[PlannedRun]:
    """Every finetune of the gate but the refits', so ordered that any prefix is balanced.

    rule : the study's, for pools that are no candidate source; `refit_plans` has the refits'
    """
    config, plans = study.profile.selection, []
    counts = {"selected": config.seeds, "random": config.draws, MATCHED: config.matched}
    counts |= dict.fromkeys(config.rivals, config.baseline_seeds)
    for i, pool in enumerate(study.data.pools):
        own, parts = rule_for(study, rule, pool), pool_parts(study, pool)[1]
        for method, repeats in counts.items():
            for seed, part in enumerate(parts[:repeats]):
                rows = _chosen(study, part, method, own, seed)
                plans.append(gate_run(study, rows, pool, method, len(rows), seed))
        if config.equal_tokens is None or i < config.equal_tokens:
            plans += token_plans(study, own, pool)
    return interleaved(plans, lambda plan: (plan.label["pool"], plan.label["method"]))


def gate_run(
    study: Study, rows: pd.DataFrame, pool: str, method: str, size: int, seed: int
) -> PlannedRun:
    """A finetune on `rows`; main arms are judged on the gate's own prompts too."""
    more = [name for name in ("gate", "human") if name in study.data.exams and method in MAIN]
    return one_run(rows, pool, method, size, seed, more)


def pool_parts(study: Study, pool: str) -> tuple[str, list[pd.DataFrame]]:
    """What each repeat draws from, and what that is called.

    "whole pool" without redraws; "disjoint part" where every part has `LEAST` rows for each that is
    selected; else "half-sample", drawn without replacement, so that parts share rows.
    """
    config, scores = study.profile.selection, study.pool_scores(pool)
    n = max(config.seeds, config.draws, config.matched, config.baseline_seeds, config.refits)
    if not config.redraws:
        return "whole pool", [scores] * n
    rows = scores.drop_duplicates("row_hash")
    rng, width = np.random.default_rng(study.profile.data.seed), len(rows) // n
    if width >= LEAST * config.size:
        order = rng.permutation(len(rows))
        return "disjoint part", [rows.iloc[order[i * width:(i + 1) * width]] for i in range(n)]
    return "half-sample", [rows.iloc[rng.permutation(len(rows))[:len(rows) // 2]]
                           for _ in range(n)]  # fmt: skip


def _chosen(
    study: Study, part: pd.DataFrame, method: str, rule: RuleCard, seed: int
) -> pd.DataFrame:
    size = study.profile.selection.size
    if method != MATCHED:
        return choose_rows(part, method, size, rule=rule, seed=seed)
    selected = choose_rows(part, "selected", size, rule=rule)
    return matched_rows(part, selected, row_lengths(study, part["row_hash"]), seed)


def row_lengths(study: Study, hashes: Sequence[str]) -> pd.DataFrame:
    """Index row hash; `answer`: tokens that count in the loss of one pass, as trained on; `prompt`:
    the other tokens; `whole`: nothing was cut.
    """
    encoded = study.encoded_rows(study.lm, study.profile.finetune, set(hashes))
    return pd.DataFrame.from_dict({
        one: {"answer": sum(row.targets), "prompt": len(row) - sum(row.targets),
              "whole": not (row.truncated or row.dropped)}
        for one, row in encoded.items()
    }, orient="index")  # fmt: skip


def matched_rows(
    part: pd.DataFrame, selected: pd.DataFrame, lengths: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """As many rows as are selected, drawn at random but alike in length.

    For each selected row one of the `NEAREST` rows that are left, by log tokens of answer and
    prompt in sd of the part and by whether it was cut. Selected rows may be drawn, as they may in a
    random draw. lengths : from `row_lengths`
    """
    own = lengths.loc[part["row_hash"]]
    logs = np.log1p(own[["answer", "prompt"]].to_numpy(float))
    spread = logs.std(axis=0)
    space = np.column_stack([logs / np.where(spread > 0, spread, 1.0), CUT * own["whole"]])
    place = {one: i for i, one in enumerate(part["row_hash"])}
    rng, free = np.random.default_rng(seed), np.ones(len(part), bool)
    taken = []
    for one in rng.permutation(selected["row_hash"].to_numpy(object)):
        far = np.linalg.norm(space - space[place[one]], axis=1)
        near = np.argsort(np.where(free, far, np.inf), kind="stable")[:NEAREST]
        drawn = rng.choice(near[free[near]])
        free[drawn] = False
        taken.append(drawn)
    return part.iloc[taken]


def token_plans(study: Study, rule: RuleCard, pool: str) -> list[PlannedRun]:
    """Random draws and rivals of one pool, each with as many target tokens as the selected rows.

    Methods are named `<method>_tokens`. The label's size is that of the selected set, for the
    tables; a set's own number of rows is what fits, so its number of steps is another one, unless
    `selection.equal_steps` gives it batches of another size.
    """
    config = study.profile.selection
    rivals = [name for name in config.rivals if name not in ("full", "worst")]
    plans = []
    for seed, part in enumerate(pool_parts(study, pool)[1]):
        counts = {"random": config.draws} | dict.fromkeys(rivals, config.baseline_seeds)
        methods = [method for method, repeats in counts.items() if seed < repeats]
        if not methods:
            break
        cost = row_lengths(study, part["row_hash"])["answer"]
        selected = choose_rows(part, "selected", config.size, rule=rule)
        tokens = int(cost.loc[selected["row_hash"]].sum())
        for method in methods:
            rows = choose_tokens(part, method, tokens, seed=seed,
                                 tokens_of=lambda rows, cost=cost: cost.loc[rows["row_hash"]])
            plan = gate_run(study, rows, pool, method + TOKENS, config.size, seed)
            if config.equal_steps:
                same = same_steps(study.profile.finetune, len(rows), config.size)
                plan = dataclasses.replace(plan, config=same)
            plans.append(plan)
    return plans


def same_steps(config: FinetuneConfig, rows: int, size: int) -> FinetuneConfig:
    """The settings under which `rows` rows take as many steps as `size` rows do under `config`, or
    one an epoch fewer where no size of batch gives as many.
    """
    steps = -(-size // config.batch_size)
    return dataclasses.replace(config, batch_size=-(-rows // steps))


# The rules that pools are judged by


def left_out(study: Study, pool: str) -> str:
    """The source that a pool's rule is fitted without: its own, where sets were drawn from it."""
    return pool if pool in set(study.data.candidates["source"]) else ""


def rule_for(study: Study, rule: RuleCard, pool: str) -> RuleCard:
    """The rule that selects from a pool: `rule`, or the one fitted without the pool's source."""
    without = left_out(study, pool)
    if not without:
        return rule
    runs, scores, columns = *_fitting(study, pool), study.profile.rule_columns()
    fit = fit_rule(runs, columns, Standardizer.fit(scores, columns), arms=None)
    return make_card(fit, scores, profile=study.profile.name, set_size=study.profile.design.size,
                     note=f"fitted without {without}", not_for="anything but the gate")  # fmt: skip


def fitted_scores(study: Study, pool: str) -> pd.DataFrame:
    """The candidates' scores that a pool's rule is fitted from."""
    scores = study.candidate_scores
    kept = scores[scores["source"] != left_out(study, pool)]
    kept.attrs = scores.attrs
    return kept


def _fitting(study: Study, pool: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The designed runs that a pool's rule is fitted to, and `fitted_scores`."""
    runs, share = pick_arms(study.sweep(), DESIGNED), f"share_{left_out(study, pool)}"
    if share in runs:
        runs = runs[runs[share] == 0]
    return runs, fitted_scores(study, pool)


def refit_cards(study: Study, n: int, pool: str) -> list[RuleCard]:
    """`n` rules for a pool, each fitted to the study's sweep with its sets drawn again.

    Over refitted rules a contrast carries the uncertainty of the sweep too (statistical plan,
    section 6). Estimator, indicators and standardising constants are those of the pool's rule. A
    resample whose set means can't be told apart is drawn again; RunsError where `TRIES` in a row
    can't.
    """
    columns = study.profile.rule_columns()
    runs, scores = _fitting(study, pool)
    constants, rng = Standardizer.fit(scores, columns), np.random.default_rng(0)

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

    return [
        make_card(
            fit, scores, profile=study.profile.name, set_size=study.profile.design.size,
            note=f"bootstrap {i}: sets drawn again, {fit.runs['drawn'].nunique()} of them distinct",
            not_for="selecting: it shows how far the study's own rule is uncertain",
        )
        for i, fit in enumerate(fitted() for _ in range(n))
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


def refit_plans(study: Study) -> list[PlannedRun]:
    """For every pool one finetune a refitted rule, on its own best rows; method "refit".

    The refit's number is the seed of its finetune and the part that it draws from, so that runs
    differ by rule, rows *and* seed, as random draws do by rows and seed.
    """
    config, cards, plans = study.profile.selection, {}, []
    for pool in study.data.pools if config.refits else ():
        without, parts = left_out(study, pool), pool_parts(study, pool)[1]
        if without not in cards:
            cards[without] = refit_cards(study, config.refits, pool)
        plans += [
            gate_run(study, choose_rows(parts[i], "selected", config.size, rule=card), pool,
                    "refit", config.size, i)
            for i, card in enumerate(cards[without])
        ]  # fmt: skip
    return plans
