"""The regime: at which depth, learning rate and number of rows can the hypothesis be tested at all?

The criterion is written before any run (statistics, section 0, "Rules that follow"). A setting is
admissible where finetuning on an equal mixture lowers the loss by `SURE` standard errors, at least
half of the collections alone lower it, and answers to other questions cost loss: each under both
averagings, on prompts that serve nothing else. Of the admissible settings that one is taken that
tells collections apart most reliably for a second of computing.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pandas as pd

from instructmining_core.config import ProfileError

from ..design import interleaved
from ..study import PlannedRun, Study
from .comparisons import base_by_prompt, body_of
from .planted_defects import CLEAN, clean_rows, dose_sets

SURE = 5.0  # standard errors over prompts by which the mixture must lower the loss
SEEN = 2.0  # standard errors over prompts by which answers to other questions must raise it
MIXTURE, OTHER = "mixture", "other_answer"
SETTING = ["layers", "rows", "learning_rate"]
LOSSES = ["loss_regime", "loss_regime_token", "base_regime", "base_regime_token"]


def regime_sets(study: Study) -> pd.DataFrame:
    """Record rows with `size`, `set` (MIXTURE, OTHER or a source) and `seed`; a set is one of each.

    OTHER is the first mixture with every answer exchanged for one of its source's other rows.
    """
    config, parts = study.profile.regime, []
    if "regime" not in study.data.exams:
        raise ProfileError("The regime needs prompts of its own: data.regime_prompts, and for "
                           "files data.eval_more to draw them from.")
    rows = clean_rows(study, config.sources, words=1)
    for size in config.rows:
        mixed = dose_sets(rows, size, doses=(0.0, 1.0), seeds=range(config.draws), kinds=(OTHER,))
        mixed = mixed[(mixed["set_kind"] == CLEAN) | (mixed["seed"] == 0)]
        names = mixed["set_kind"].replace(CLEAN, MIXTURE)
        parts.append(mixed.assign(set=names, size=size))
        for source, own in rows.groupby("source", sort=True):
            drawn = own.sample(size, random_state=study.profile.data.seed)
            parts.append(drawn.assign(set=source, size=size, seed=0))
    return pd.concat(parts, ignore_index=True)


def regime_plans(study: Study, table: pd.DataFrame) -> list[PlannedRun]:
    """Every set of `regime_sets` under every setting; any first part holds all settings alike."""
    config, plans = study.profile.regime, []
    for rate, size, layers in product(config.learning_rates, config.rows, config.layers):
        usual = study.profile.finetune
        setting = dataclasses.replace(usual, learning_rate=rate, layers=layers)
        sets = table[table["size"] == size].groupby(["set", "seed"], sort=False)
        for (name, seed), part in sets:
            label = {"kind": name, "seed": seed, "layers": layers, "learning_rate": rate}
            plans.append(PlannedRun(tuple(part["row_hash"]), label, seed, seed, config=setting,
                                    exams=("regime",)))  # fmt: skip
    return interleaved(plans, lambda p: (p.config.learning_rate, p.config.layers,
                                         len(p.row_hashes)))  # fmt: skip


def regime_runs(study: Study) -> pd.DataFrame:
    """The regime's finetunes, one row a run: kind (the set), seed, the settings, the losses."""
    table = regime_sets(study)
    return study.run("regime", regime_plans(study, table), tables=(table,))


def regime_table(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """The criterion, setting by setting; index `SETTING`.

    Columns: gain, gain_token (base minus mixture, nats) and their standard errors over prompts
    gain_se, gain_token_se; lower (collections that lower the loss) of collections; cost,
    cost_token, cost_se, cost_token_se (answers to other questions minus the mixture); spread (sd
    between collections, less that of draws) and reliability; seconds of a run; admissible; chosen.
    """
    mixed, (base, tokens) = runs[runs["kind"] == MIXTURE], base_by_prompt(study, "regime")
    # between draws of the mixture, by number of rows, over settings
    draws = mixed.groupby(SETTING)["loss_regime"].var().groupby("rows").mean()
    rows = {key: _reading(study, part, base, tokens, draws[key[1]])
            for key, part in runs.groupby(SETTING)}  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = table.index.set_names(SETTING)
    worth = (table["reliability"] / table["seconds"]).where(table["admissible"])
    return table.assign(chosen=table["admissible"] & (worth == worth.max()))


def _reading(
    study: Study, part: pd.DataFrame, base: np.ndarray, tokens: np.ndarray, noise: float
) -> dict:
    by_run = {(one.kind, one.seed): body_of(study.ledger.read(one.run_id)["examples"]["regime"],
                                            "nll")
              for one in part.sort_values("seed").itertuples()}  # fmt: skip
    nll = {kind: np.mean([own for (name, _), own in by_run.items() if name == kind], axis=0)
           for kind in sorted(set(part["kind"]))}  # fmt: skip
    found = both_means(base - nll[MIXTURE], tokens, "gain")
    found |= both_means(nll[OTHER] - by_run[MIXTURE, 0], tokens, "cost")
    gains = [both_means(base - one, tokens, "gain")
             for kind, one in nll.items() if kind not in (MIXTURE, OTHER)]  # fmt: skip
    lower = sum(one["gain"] > 0 and one["gain_token"] > 0 for one in gains)
    between = max(float(np.var([one["gain"] for one in gains], ddof=1)) - noise, 0.0)
    ends = ("", "_token")
    sure = all(found[f"gain{end}"] >= SURE * found[f"gain{end}_se"] for end in ends)
    sees = all(found[f"cost{end}"] >= SEEN * found[f"cost{end}_se"] for end in ends)
    return found | {
        "lower": lower, "collections": len(gains), "spread": np.sqrt(between),
        "reliability": between / (between + noise) if between else 0.0,
        "seconds": part["seconds"].mean(),
        "admissible": sure and sees and 2 * lower >= len(gains),
    }  # fmt: skip


def both_means(nll: np.ndarray, tokens: np.ndarray, name: str) -> dict[str, float]:
    """A difference of nll by prompt, in nats per token: mean over prompts (`name`) and over tokens
    (`name`_token), each with its standard error over prompts (`_se`). shape of both: (prompts,)
    """
    nll, tokens = nll[tokens > 0], tokens[tokens > 0]
    each, n = nll / tokens, len(tokens)
    ratio = nll.sum() / tokens.sum()
    # of a ratio of sums, by linearisation (Cochran 1977, section 6.3)
    left = nll - ratio * tokens
    error = np.sqrt(n / (n - 1) * np.sum(left**2)) / tokens.sum()
    return {name: float(each.mean()), f"{name}_se": float(each.std(ddof=1) / np.sqrt(n)),
            f"{name}_token": float(ratio), f"{name}_token_se": float(error)}  # fmt: skip


def in_words(table: pd.DataFrame) -> str:
    """What the criterion says: the chosen setting, or that none is admissible."""
    if not table["admissible"].any():
        return (f"None of the {len(table)} settings is admissible: at none of them can this study "
                "test the hypothesis as the plan asks.")  # fmt: skip
    layers, rows, rate = table.index[table["chosen"]][0]
    depth = f"the top {layers} layers" if layers else "all layers"
    return (f"{table['admissible'].sum()} of {len(table)} settings are admissible; the criterion "
            f"takes {depth}, {rows} rows and a learning rate of {rate:g}.")  # fmt: skip
