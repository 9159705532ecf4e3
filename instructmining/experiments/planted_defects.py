"""Answers made worse in a known way: what the loss sees of it, on the embedded corpus and on real
data; and, where defects are planted in the candidates, who finds the defective twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import product

import numpy as np
import pandas as pd
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection import beat_random
from instructmining_core.selection.select import choose_rows

from ..design import interleaved, of_sources
from ..embedded import ground_truth
from ..embedded.defects import KINDS
from ..profile import Profile
from ..study import PlannedRun, Study
from .comparisons import LOSSES
from .gate import pool_parts

FITTED, UNSEEN = "fitted candidates", "unseen pool rows"
AVERAGINGS = {"prompts": "", "tokens": "_token"}  # of a loss -> end of its column's name
DOSE_COLUMNS = ["run_id", "kind", "dose", "rows", "seed", *LOSSES, "base_eval_1",
                "base_eval_1_token"]  # fmt: skip
LEAST_WORDS = 8  # of a real answer that is made worse: fewer can't be cut, scrambled or repeated
RESOLVED = 8.0  # standard errors of the clean sets' gain from which shares of it are told
ORDER = ["rule", "longest", "shortest", "lowest_ppl", "compression", "reward", "random",
         "loss_oracle", "oracle"]  # fmt: skip


def has_doses(profile: Profile) -> bool:
    """Whether the profile makes answers worse: always of the embedded corpus, else if it says."""
    return profile.data.kind == "embedded" or bool(profile.selection.dose_kinds)


def clean_rows(study: Study, sources: tuple[str, ...], words: int) -> pd.DataFrame:
    """Candidates without a planted defect, with the columns that `embedded.defects` reads.

    sources : whose rows, empty for all. Of real data, single turns with at least so many `words` in
    the answer; another answer there is one of the same source.
    """
    rows = of_sources(study.data.candidates, sources)
    if "kind" in rows:
        return rows[rows["kind"] == ""]
    said = [[m["role"] for m in messages] == ["user", "assistant"]
            and len(messages[-1]["content"].split()) >= words
            for messages in rows["messages"]]  # fmt: skip
    rows = rows[said]
    prompt, response = ([m[i]["content"] for m in rows["messages"]] for i in (0, 1))
    return rows.assign(prompt=prompt, response=response, symbol=rows["id"], question="")


def dose_sets_of(study: Study) -> pd.DataFrame:
    """The sets of `dose_plans`, with their `size`: rows of which a growing share is made worse.

    Doses between 0 and 1 are of the first size only.
    """
    config, parts = study.profile.selection, []
    rows = clean_rows(study, config.dose_sources, LEAST_WORDS)
    for i, size in enumerate(config.dose_rows or (study.profile.design.size,)):
        table = ground_truth.dose_sets(
            rows, size, doses=config.dose_levels, seeds=range(config.dose_seeds),
            kinds=config.dose_kinds or KINDS, partial=() if i else config.dose_partial,
        )  # fmt: skip
        parts.append(table.assign(size=size))
    return pd.concat(parts, ignore_index=True)


def dose_plans(table: pd.DataFrame) -> list[PlannedRun]:
    """A finetune for every set of `dose_sets_of`; any first part holds every kind and size."""
    groups = table.groupby(["size", "set_kind", "dose", "seed"], sort=False)
    plans = [
        PlannedRun(tuple(part["row_hash"]), {"kind": kind, "dose": dose, "size": size,
                                             "seed": seed}, seed, seed)
        for (size, kind, dose, seed), part in groups
    ]  # fmt: skip
    return interleaved(plans, lambda p: (p.label["size"], p.label["kind"], p.label["dose"]))


def dose_runs(study: Study) -> pd.DataFrame:
    """Finetune on sets in which a growing share of the rows is replaced by its defective twin.

    One row a run with kind ("clean" at dose 0), dose, rows, seed and the losses.
    """
    table = dose_sets_of(study)
    return study.run("dose", dose_plans(table), tables=(table,))


def dose_shares(runs: pd.DataFrame) -> pd.DataFrame:
    """How much of the clean sets' gain remains where a share of the answers is made worse.

    runs : as `dose_runs` gives them. One row a number of rows, kind, dose above 0 and averaging of
    the loss ("prompts", "tokens"): left (mean gain over the base, nats), clean (the same of the
    clean sets), cost (clean - left) with low and high over seeds (Welch, 95 %), share (left /
    clean; NaN where the clean gain is not above `RESOLVED` standard errors), and sees: whether the
    cost's interval lies above 0.
    """
    found = []
    for (averaging, end), (rows, part) in product(AVERAGINGS.items(), runs.groupby("rows")):
        gains = part[f"base_eval_1{end}"] - part[f"loss_eval_1{end}"]
        clean = gains[part["kind"] == ground_truth.CLEAN].dropna()
        known = len(clean) > 1 and clean.mean() > RESOLVED * clean.sem()
        worse = part["kind"] != ground_truth.CLEAN
        for (kind, dose), own in gains[worse].groupby([part["kind"], part["dose"]], sort=False):
            low, high = welch_interval(clean, own.dropna())
            found.append({
                "rows": rows, "kind": kind, "dose": dose, "averaging": averaging,
                "left": own.mean(), "clean": clean.mean(), "cost": clean.mean() - own.mean(),
                "low": low, "high": high, "share": own.mean() / clean.mean() if known else np.nan,
                "sees": low > 0,
            })  # fmt: skip
    return pd.DataFrame(found)


def welch_interval(first: pd.Series, second: pd.Series) -> tuple[float, float]:
    """95 % interval of the difference of two means; NaN for a single value on a side."""
    if min(len(first), len(second)) < 2:
        return np.nan, np.nan
    both = CompareMeans(DescrStatsW(first), DescrStatsW(second))
    return tuple(float(x) for x in both.tconfint_diff(usevar="unequal"))


def unseen_kinds(shares: pd.DataFrame) -> list[str]:
    """Kinds whose full dose the loss was not seen to punish: under both averagings, at any size.

    shares : from `dose_shares`. A rule that is fitted to this loss can't find them: they belong on
    its card, under `not_for`.
    """
    by_size = shares[shares["dose"] == 1].groupby(["kind", "rows"], sort=False)["sees"].all()
    seen = by_size.groupby("kind", sort=False).any()
    return list(seen.index[~seen])


def auc_of_study(study: Study, rule: RuleCard, effects: pd.DataFrame) -> pd.DataFrame:
    """AUC within twins of the rule and its rivals, by kind of defect and library.

    Columns of `ground_truth.twin_auc` and rows: "fitted candidates", from which the rule was
    fitted, or "unseen pool rows".
    """
    told = study.data.everything.drop_duplicates("id").set_index("id")[["kind", "twin"]]
    scores = study.scores.drop_duplicates("id").join(told, on="id").reset_index(drop=True)
    rules = {"rule": rule.predict(scores), **ground_truth.rivals(scores, effects)}
    return apart(scores, rules, set(study.candidate_scores["id"]))


def apart(
    scores: pd.DataFrame, rules: Mapping[str, pd.Series], fitted: Set[str]
) -> pd.DataFrame:
    """`ground_truth.twin_auc` of the rows whose id is in `fitted`, and of the others."""
    parts = []
    for name, part in scores.groupby(scores["id"].isin(fitted).map({True: FITTED, False: UNSEEN})):
        if ((part["kind"] != "") & part["twin"].isin(part["id"])).any():
            parts.append(ground_truth.twin_auc(part, rules).assign(rows=name))
    if not parts:
        raise InstructMiningError("No defective row has its clean twin beside it in the scores.")
    return pd.concat(parts, ignore_index=True)


def auc_table(auc: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC over libraries with its interval: fitted and unseen rows, kinds seen and unseen."""
    table = ground_truth.over_libraries(auc, by=("scorer", "rows", "seen"))
    table["kinds"] = table["seen"].map({True: "kinds the stand-ins saw", False: "unseen kinds"})
    table["text"] = [_text(row) for row in table.itertuples()]
    wide = table.pivot(index="scorer", columns=["rows", "kinds"], values="text")
    return wide.reindex(ORDER).dropna(how="all").sort_index(axis=1)


def _text(row) -> str:
    return f"{row.auc:.2f} [{row.low:.2f}, {row.high:.2f}]"


def rule_against(auc: pd.DataFrame) -> pd.DataFrame:
    """The rule's AUC minus each rival's, paired by library, on kinds that no stand-in saw.

    Index rival; columns rows (fitted or unseen), difference, low, high, sources.
    """
    rivals = [name for name in ORDER[1:] if name in set(auc["scorer"])]
    unseen = auc[~auc["seen"].astype(bool)]
    parts = [ground_truth.against(unseen, "rule", name, by=("rows",)).assign(rival=name)
             for name in rivals]  # fmt: skip
    return pd.concat(parts).set_index("rival")


def by_kind(auc: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """What each kind of defect does to the loss, beside who finds it.

    One row a kind: slope, low, high (log loss at a full dose), role ("harms", or "negative
    control": a kind that was not seen to harm is one the rule should not find), seen, and the AUC
    within twins of the rule, both ends of length and the reward, with intervals over libraries.
    """
    found = ground_truth.over_libraries(auc, by=("scorer", "kind"))
    found["text"] = [_text(row) for row in found.itertuples()]
    wide = found.pivot(index="kind", columns="scorer", values="text")
    table = effects[["slope", "low", "high", "seen"]].copy()
    table.insert(3, "role", effects["harms"].map({True: "harms", False: "negative control"}))
    shown = [name for name in ("rule", "longest", "shortest", "reward") if name in wide]
    return table.join(wide[shown])


def defects_found(auc: pd.DataFrame, effects: pd.DataFrame) -> dict:
    """The rule against the better end of length, on rows and kinds that were not seen.

    rows : which those are; rule, rule_low, rule_high : its own AUC within twins
    rival : "longest" or "shortest"; difference, low, high : of the AUC, rule minus rival; sources
    kind : in which the rival is furthest ahead, or least behind; kind_rule, kind_rival : their AUC
    there, the rival's being the share of pairs that length alone reads off; kind_harms
    harmful : difference, low, high on the kinds that harm the loss; None where there are none
    """
    rows = UNSEEN if (auc["rows"] == UNSEEN).any() else FITTED
    part = auc[(auc["rows"] == rows) & ~auc["seen"].astype(bool)]
    ends = {name: ground_truth.against(part, "rule", name, by=("rows",)).iloc[0]
            for name in ("longest", "shortest")}  # fmt: skip
    rival, row = min(ends.items(), key=lambda item: item[1]["difference"])
    kinds = ground_truth.over_libraries(part, by=("scorer", "kind")).pivot(
        index="kind", columns="scorer", values="auc")  # fmt: skip
    kind = (kinds[rival] - kinds["rule"]).idxmax()
    own = ground_truth.over_libraries(part[part["scorer"] == "rule"], by=("scorer",)).iloc[0]
    harmful = effects.index[effects["harms"].astype(bool)]
    costly, only = part[part["kind"].isin(harmful)], None
    if len(costly):
        only = ground_truth.against(costly, "rule", rival, by=("rows",)).iloc[0]
        only = only[["difference", "low", "high"]].to_dict()
    return {
        "rows": rows, "rule": own["auc"], "rule_low": own["low"], "rule_high": own["high"],
        "rival": rival, **row[["difference", "low", "high", "sources"]].to_dict(),
        "kind": kind, "kind_rule": kinds.loc[kind, "rule"], "kind_rival": kinds.loc[kind, rival],
        "kind_harms": kind in harmful, "harmful": only,
    }  # fmt: skip


def defect_pools(study: Study, rule: RuleCard) -> pd.DataFrame:
    """The gate's primary contrasts by the pool's share of defects, and where the defects went.

    One row a pool: pool, defects (share of the pool's rows), in_selected, in_random (share of
    defective rows among the chosen, mean over the repeats), difference, low, high,
    detectable (relative, second evaluation set), verdict.
    """
    config, size = study.profile.selection, study.profile.selection.size
    runs = study.frame("comparison.parquet")
    runs = runs[runs["method"].isin(["selected", "random"]) & (runs["size"] == size)]
    contrasts = beat_random.compare_with_random(runs, loss="loss_eval_2", primary_size=size)
    kind = study.data.everything.drop_duplicates("id").set_index("id")["kind"]

    def share(rows: pd.DataFrame) -> float:
        told = kind.reindex(rows["id"])  # NaN: evidence of a corpus that is not this one
        return float((told != "").mean()) if told.notna().all() else np.nan

    found = []
    for row in contrasts[contrasts["role"] == "primary"].to_dict("records"):
        parts = pool_parts(study, row["pool"])[1]
        taken = {
            method: np.mean([share(choose_rows(part, method, size, rule=rule, seed=seed))
                             for seed, part in enumerate(parts[:repeats])])
            for method, repeats in (("selected", config.seeds), ("random", config.draws))
        }  # fmt: skip
        found.append({
            "pool": row["pool"], "defects": share(study.pool_scores(row["pool"])),
            "in_selected": float(taken["selected"]), "in_random": float(taken["random"]),
            **{k: row[k] for k in ("difference", "low", "high", "detectable", "verdict")},
        })  # fmt: skip
    return pd.DataFrame(found)
