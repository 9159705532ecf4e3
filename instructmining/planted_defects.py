"""Asking the embedded corpus for the truth: dose sets, and who finds the defective twin."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
import pandas as pd

from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection import beat_random
from instructmining_core.selection.select import choose_rows

from .embedded import ground_truth
from .experiments import LOSSES
from .study import PlannedRun, Study

FITTED, UNSEEN = "fitted candidates", "unseen pool rows"
DOSE_COLUMNS = ["run_id", "kind", "dose", "seed", *LOSSES]
ORDER = ["rule", "longest", "shortest", "lowest_ppl", "compression", "reward", "random",
         "loss_oracle", "oracle"]  # fmt: skip


def dose_runs(study: Study) -> pd.DataFrame:
    """Finetune on sets in which a growing share of the rows is replaced by its defective twin.

    One row a run with kind ("clean" at dose 0), dose, seed and the losses.
    """
    config = study.profile.selection
    rows = study.data.candidates
    table = ground_truth.dose_sets(
        rows[rows["kind"] == ""], study.profile.design.size,
        doses=config.dose_levels, seeds=range(config.dose_seeds),
    )  # fmt: skip
    plans = [
        PlannedRun(tuple(part["row_hash"]), {"kind": kind, "dose": dose, "seed": seed}, seed, seed)
        for (kind, dose, seed), part in table.groupby(["set_kind", "dose", "seed"], sort=False)
    ]  # fmt: skip
    return study.run("dose", plans, tables=(table,))


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
    defective rows among the chosen, the latter mean over the draws), difference, low, high,
    detectable (relative, second evaluation set), verdict.
    """
    size, draws = study.profile.selection.size, study.profile.selection.draws
    runs = study.frame("comparison.parquet")
    runs = runs[runs["method"].isin(["selected", "random"]) & (runs["size"] == size)]
    contrasts = beat_random.compare_with_random(runs, loss="loss_eval_2", primary_size=size)
    kind = study.data.everything.drop_duplicates("id").set_index("id")["kind"]

    def share(rows: pd.DataFrame) -> float:
        told = kind.reindex(rows["id"])  # NaN: evidence of a corpus that is not this one
        return float((told != "").mean()) if told.notna().all() else np.nan

    found = []
    for row in contrasts[contrasts["role"] == "primary"].to_dict("records"):
        pool = study.pool_scores(row["pool"])
        random = [share(choose_rows(pool, "random", size, seed=seed)) for seed in range(draws)]
        found.append({
            "pool": row["pool"], "defects": share(pool),
            "in_selected": share(choose_rows(pool, "selected", size, rule=rule)),
            "in_random": float(np.mean(random)),
            **{k: row[k] for k in ("difference", "low", "high", "detectable", "verdict")},
        })  # fmt: skip
    return pd.DataFrame(found)
