"""Asking the embedded corpus for the truth: dose sets, and who finds the defective twin."""

from __future__ import annotations

import pandas as pd

from .card import RuleCard
from .embedded import truth
from .experiments import LOSSES
from .records import row_hash
from .study import Plan, Study

DOSE_COLUMNS = ["run_id", "kind", "dose", "seed", *LOSSES]
ORDER = ["rule", "longest", "shortest", "lowest_ppl", "compression", "reward", "untrained_reward",
         "random", "loss_oracle", "oracle"]  # fmt: skip


def planted(study: Study) -> bool:
    """Whether this study's rows carry planted defects, so that there is a truth to ask for."""
    return study.profile.data.kind == "embedded"


def dose_runs(study: Study) -> pd.DataFrame:
    """Finetune on sets in which a growing share of the rows is replaced by its defective twin.

    One row a run with kind ("clean" at dose 0), dose, seed and the losses.
    """
    config = study.profile.selection
    rows = study.data.candidates
    table = truth.dose_sets(
        rows[rows["kind"] == ""], study.profile.design.size,
        doses=config.dose_levels, seeds=range(config.dose_seeds),
    )  # fmt: skip
    table = table.assign(row_hash=table["messages"].map(row_hash))
    plans = [
        Plan(
            tuple(part["row_hash"]), {"kind": kind, "dose": dose, "seed": seed},
            init_seed=seed, order_seed=seed,
        )
        for (kind, dose, seed), part in table.groupby(["set_kind", "dose", "seed"], sort=False)
    ]  # fmt: skip
    return study.run("dose", plans, tables=(table,))


def twin_auc(study: Study, rule: RuleCard, effects: pd.DataFrame) -> pd.DataFrame:
    """AUC within twins of the rule and its rivals, by kind of defect and library."""
    told = study.data.everything.drop_duplicates("id").set_index("id")[["kind", "twin"]]
    scores = study.scores.drop_duplicates("id").join(told, on="id").reset_index(drop=True)
    rules = {"rule": rule.predict(scores)}
    rules |= truth.rivals(scores, effects=effects, untrained=_untrained_reward(study, scores))
    return truth.twin_auc(scores, rules)


def summary(auc: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC over libraries with its interval: kinds the stand-ins saw, and unseen kinds."""
    table = truth.over_libraries(auc, by=("scorer", "seen"))
    table["text"] = [f"{r.auc:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in table.itertuples()]
    table["kinds"] = table["seen"].map({True: "kinds the stand-ins saw", False: "unseen kinds"})
    return table.pivot(index="scorer", columns="kinds", values="text").reindex(ORDER).dropna()


def rule_against(auc: pd.DataFrame) -> pd.DataFrame:
    """The rule's AUC minus each rival's, paired by library, on kinds that no stand-in saw."""
    rivals = [name for name in ORDER[1:] if name in set(auc["scorer"])]
    parts = [truth.against(auc, "rule", name).assign(rival=name) for name in rivals]
    table = pd.concat(parts)
    return table[~table["seen"].astype(bool)].set_index("rival").drop(columns="seen")


def _untrained_reward(study: Study, scores: pd.DataFrame) -> pd.Series | None:
    """The reward of the same architecture before its first step: what a random head would find."""
    from .profiles import ModelRef
    from .scoring import Scorer

    if not study.profile.models.reward.id.startswith("standin:"):
        return None
    ref = ModelRef("standin:reward_untrained")
    scorer = Scorer({"reward": ref}, indicators=("reward",), bank=study.bank,
                    standins=study.standins(ref))  # fmt: skip
    found = scorer.score(study.data.everything)
    return scores["id"].map(found.drop_duplicates("id").set_index("id")["reward"])
