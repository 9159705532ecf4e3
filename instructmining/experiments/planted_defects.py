"""Answers made worse in a known way: what the loss sees of it, on the embedded corpus and on real
data; and, where defects are planted in the candidates, who finds the defective twin.

Statistical plan, section 8. The truth is measured, not declared: dose-response runs say which
kinds of defect harm the loss. A rule is then judged within twins, clean row against defective row,
library by library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import product

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import t as student

from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import RuleCard
from instructmining_core.selection import beat_random
from instructmining_core.selection.select import choose_rows

from ..design import interleaved, of_sources
from ..embedded.defects import KINDS, SEEN_KINDS, twins
from ..profile import Profile
from ..study import PlannedRun, Study
from .comparisons import LOSSES, welch_interval
from .gate import pool_parts

CLEAN = "clean"  # the kind of a dose of 0, which all kinds share


def dose_sets(
    table: pd.DataFrame, size: int, *, doses: Sequence[float], seeds: Sequence[int],
    kinds: Sequence[str] = KINDS, partial: Sequence[str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Training sets that differ in the share of defective twins and in nothing else.

    table : clean record rows (id, source, symbol, question, prompt, response, messages)
    size : rows of one set, drawn equally from all sources
    kinds : of defects; partial : those with doses between 0 and 1, None for all
    returns : record rows with columns set_kind (CLEAN at dose 0), dose (0 to 1), seed and place (0
        to size - 1, the order in training). At one seed every set asks the same prompts in the same
        places; a larger dose keeps the twins of a smaller one.
    Raises InstructMiningError where the sources cannot give `size` rows with a twin of every kind.
    """
    made = {kind: twins(table, kind, seed=0).set_index("twin", drop=False) for kind in kinds}
    whole = table["id"].map(lambda i: all(i in frame.index for frame in made.values()))
    usable = table[whole]
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        clean = _equally(usable, size, rng).assign(kind="", twin="")
        turn = rng.permutation(size)  # the order in which places become defective
        for kind, dose in _settings(doses, kinds, partial):
            chosen = np.sort(turn[: round(dose * size)])
            rows = clean
            if len(chosen):
                bad = made[kind].loc[clean["id"].iloc[chosen]].set_index(clean.index[chosen])
                rows = pd.concat([clean.drop(index=clean.index[chosen]), bad]).sort_index()
            found.append(rows.assign(set_kind=kind, dose=dose, seed=seed, place=range(size)))
    return pd.concat(found, ignore_index=True)


def dose_effects(runs: pd.DataFrame) -> pd.DataFrame:
    """How much a full dose of each kind raises the log loss.

    runs : one row a finetune, columns kind ("clean" for dose 0), dose, seed and loss_eval_1 (nats)
    returns : index kind; columns slope (log loss at the kind's largest dose minus dose 0, by least
        squares on all runs with one intercept a seed), low, high (t interval), p, df, runs (of that
        kind), harms (low > 0) and seen (the stand-ins learnt from that kind). With no degree of
        freedom left the interval is NaN and `harms` False.

    Every dose of a kind has a level of its own: with a common line through the shared dose 0, kinds
    whose response bends would push up those that do nothing.
    """
    worse = runs[runs["kind"] != CLEAN]
    if worse.empty:
        raise InstructMiningError("No run has a dose above 0; run the dose sets first.")
    kinds = list(dict.fromkeys(worse["kind"]))
    names = runs["kind"] + " " + runs["dose"].astype(str)
    levels = pd.get_dummies(names[worse.index], dtype=float).reindex(runs.index, fill_value=0.0)
    design = pd.get_dummies(runs["seed"], dtype=float).join(levels)
    largest = names[worse.groupby("kind", sort=False)["dose"].idxmax()].to_list()
    fit = sm.OLS(np.log(runs["loss_eval_1"].astype(float)), design).fit()
    known = fit.df_resid > 0
    low, high = fit.conf_int().loc[largest].T.to_numpy() if known else (np.nan, np.nan)
    frame = pd.DataFrame({
        "slope": fit.params[largest].to_numpy(), "low": low, "high": high,
        "p": fit.pvalues[largest].to_numpy() if known else np.nan, "df": int(fit.df_resid),
        "runs": worse.groupby("kind", sort=False).size()[kinds].to_numpy(),
    }, index=pd.Index(kinds, name="kind"))  # fmt: skip
    return frame.assign(harms=frame["low"] > 0, seen=frame.index.isin(SEEN_KINDS))


def rivals(scores: pd.DataFrame, effects: pd.DataFrame) -> dict[str, pd.Series]:
    """What stands beside a rule: each a Series on the index of `scores`, lower is better.

    scores : columns `kind`, and those of len_out, ppl, compression and reward that are there
    effects : as `dose_effects` gives it, for the loss oracle
    returns : "random", "longest", "shortest", "lowest_ppl", "compression", "reward", "oracle" (the
        true label) and "loss_oracle" (the kind's measured slope where that kind `harms`, else 0: it
        knows the loss and not the label)
    """
    signs = {"longest": ("len_out", -1), "shortest": ("len_out", 1), "lowest_ppl": ("ppl", 1),
             "compression": ("compression", 1), "reward": ("reward", -1)}  # fmt: skip
    draws = np.random.default_rng(0).random(len(scores))
    found = {"random": pd.Series(draws, index=scores.index)}
    found |= {name: sign * scores[column] for name, (column, sign) in signs.items()
              if column in scores}  # fmt: skip
    found["oracle"] = (scores["kind"] != "").astype(float)
    harm = effects["slope"].where(effects["harms"].astype(bool), 0.0)
    found["loss_oracle"] = scores["kind"].map(harm).fillna(0.0)
    return found


def twin_auc(scores: pd.DataFrame, rules: Mapping[str, pd.Series]) -> pd.DataFrame:
    """How often each rule puts the clean row before its own defective twin.

    scores : columns id, source, kind ("" for clean), twin (the clean row's id); clean and defective
        rows, each id once
    rules : name -> Series on the index of `scores`, lower is better
    returns : one row for each scorer, kind and source: columns scorer, kind, source, pairs, auc
        (share of pairs won, a tie counts half), missing (pairs without a score) and seen (the
        stand-in models learnt from that kind)
    Raises InstructMiningError where ids repeat or no defective row has its twin in the table.
    """
    if scores["id"].duplicated().any():
        raise InstructMiningError("An id stands twice in the scores; score each row once.")
    place = pd.Series(np.arange(len(scores)), index=scores["id"])
    bad = np.flatnonzero((scores["kind"] != "") & scores["twin"].isin(place.index))
    if not len(bad):
        raise InstructMiningError("No defective row has its clean twin in the scores.")
    good = place.loc[scores["twin"].iloc[bad]].to_numpy()
    frames = []
    for name, rule in rules.items():
        values = rule.reindex(scores.index).to_numpy(float)
        difference = values[bad] - values[good]
        frames.append(pd.DataFrame({
            "scorer": name, "kind": scores["kind"].to_numpy()[bad],
            "source": scores["source"].to_numpy()[bad],
            "won": np.where(np.isnan(difference), np.nan, np.sign(difference) / 2 + 0.5),
        }))  # fmt: skip
    pairs = pd.concat(frames).groupby(["scorer", "kind", "source"], sort=False)["won"]
    result = pairs.agg(pairs="count", auc="mean", missing=lambda w: int(w.isna().sum()))
    result = result.reset_index()
    return result.assign(seen=result["kind"].isin(SEEN_KINDS))


def over_libraries(
    auc: pd.DataFrame, by: Sequence[str] = ("scorer", "kind", "seen")
) -> pd.DataFrame:
    """Mean AUC over libraries with a 95 % t interval ("new sources").

    auc : as `twin_auc` gives it; by : what stays apart
    returns : columns of `by`, auc, low, high (of t, so they may leave 0 to 1; NaN for one library),
        sources, pairs. Every library counts once: what is not in `by` is averaged inside it first.
    """
    by = list(by)
    inside = auc.dropna(subset="auc").groupby([*by, "source"], sort=False)
    table = inside.agg(auc=("auc", "mean"), pairs=("pairs", "sum")).reset_index()
    groups = table.groupby(by, sort=False)
    result = groups.agg(auc=("auc", "mean"), sources=("source", "size"), pairs=("pairs", "sum"))
    error = groups["auc"].std(ddof=1) / np.sqrt(result["sources"])
    half = student.ppf(0.975, result["sources"] - 1) * error
    result = result.assign(low=result["auc"] - half, high=result["auc"] + half).reset_index()
    return result[[*by, "auc", "low", "high", "sources", "pairs"]]


def against(
    auc: pd.DataFrame, scorer: str, rival: str, by: Sequence[str] = ("seen",)
) -> pd.DataFrame:
    """Does `scorer` beat `rival`? Difference of AUC paired by library, with a t interval.

    returns : columns of `by`, difference, low, high, sources
    """
    wide = auc.pivot_table(index=[*by, "source"], columns="scorer", values="auc", aggfunc="mean")
    for name in (scorer, rival):
        if name not in wide:
            raise InstructMiningError(f"No AUC of {name!r}; there are {', '.join(wide.columns)}.")
    difference = (wide[scorer] - wide[rival]).rename("auc").reset_index()
    table = over_libraries(difference.assign(pairs=1), by)
    return table.rename(columns={"auc": "difference"}).drop(columns="pairs")


def _settings(
    doses: Sequence[float], kinds: Sequence[str], partial: Sequence[str] | None
) -> list[tuple[str, float]]:
    above = [(kind, dose) for kind in kinds for dose in sorted(doses)
             if dose == 1 or (dose > 0 and (partial is None or kind in partial))]  # fmt: skip
    return [(CLEAN, 0.0), *above] if 0 in doses else above


def _equally(table: pd.DataFrame, size: int, rng: np.random.Generator) -> pd.DataFrame:
    """`size` rows, as many of each source as of another (one more of the first ones), shuffled."""
    sources = sorted(table["source"].unique())
    order = rng.permutation(len(sources))
    parts = []
    for rank, number in enumerate(order):
        rows = table[table["source"] == sources[number]]
        wanted = size // len(sources) + (rank < size % len(sources))
        if len(rows) < wanted:
            raise InstructMiningError(
                f"Source {sources[number]!r} has {len(rows)} rows with a twin of every kind, "
                f"{wanted} are needed for sets of {size}.")
        parts.append(rows.iloc[np.sort(rng.permutation(len(rows))[:wanted])])
    drawn = pd.concat(parts)
    return drawn.iloc[rng.permutation(len(drawn))].reset_index(drop=True)


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
        table = dose_sets(
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
        clean = gains[part["kind"] == CLEAN].dropna()
        known = len(clean) > 1 and clean.mean() > RESOLVED * clean.sem()
        worse = part["kind"] != CLEAN
        for (kind, dose), own in gains[worse].groupby([part["kind"], part["dose"]], sort=False):
            low, high = welch_interval(clean, own.dropna())
            found.append({
                "rows": rows, "kind": kind, "dose": dose, "averaging": averaging,
                "left": own.mean(), "clean": clean.mean(), "cost": clean.mean() - own.mean(),
                "low": low, "high": high, "share": own.mean() / clean.mean() if known else np.nan,
                "sees": low > 0,
            })  # fmt: skip
    return pd.DataFrame(found)


def unseen_kinds(shares: pd.DataFrame) -> list[str]:
    """Kinds whose full dose the loss was not seen to punish: under both averagings, at any size.

    shares : from `dose_shares`. A rule fitted to this loss can't find them: for its card's not_for.
    """
    by_size = shares[shares["dose"] == 1].groupby(["kind", "rows"], sort=False)["sees"].all()
    seen = by_size.groupby("kind", sort=False).any()
    return list(seen.index[~seen])


def auc_of_study(study: Study, rule: RuleCard, effects: pd.DataFrame) -> pd.DataFrame:
    """AUC within twins of the rule and its rivals, by kind of defect and library.

    Columns of `twin_auc` and rows: FITTED, from which the rule was fitted, or UNSEEN.
    """
    told = study.data.everything.drop_duplicates("id").set_index("id")[["kind", "twin"]]
    scores = study.scores.drop_duplicates("id").join(told, on="id").reset_index(drop=True)
    rules = {"rule": rule.predict(scores), **rivals(scores, effects)}
    return apart(scores, rules, set(study.candidate_scores["id"]))


def apart(
    scores: pd.DataFrame, rules: Mapping[str, pd.Series], fitted: Set[str]
) -> pd.DataFrame:
    """`twin_auc` of the rows whose id is in `fitted`, and of the others."""
    parts = []
    for name, part in scores.groupby(scores["id"].isin(fitted).map({True: FITTED, False: UNSEEN})):
        if ((part["kind"] != "") & part["twin"].isin(part["id"])).any():
            parts.append(twin_auc(part, rules).assign(rows=name))
    if not parts:
        raise InstructMiningError("No defective row has its clean twin beside it in the scores.")
    return pd.concat(parts, ignore_index=True)


def auc_table(auc: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC over libraries with its interval: fitted and unseen rows, kinds seen and unseen."""
    table = over_libraries(auc, by=("scorer", "rows", "seen"))
    table["kinds"] = table["seen"].map({True: "kinds the stand-ins saw", False: "unseen kinds"})
    return _wide(table, "scorer", ["rows", "kinds"]).reindex(ORDER).dropna(how="all").sort_index(
        axis=1)


def _wide(table: pd.DataFrame, index: str, columns: str | list[str]) -> pd.DataFrame:
    """`over_libraries` with the AUC and its interval in a cell."""
    cells = [f"{row.auc:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in table.itertuples()]
    return table.assign(cell=cells).pivot(index=index, columns=columns, values="cell")


def rule_against(auc: pd.DataFrame) -> pd.DataFrame:
    """The rule's AUC minus each rival's, paired by library, on kinds that no stand-in saw.

    Index rival; columns rows (fitted or unseen), difference, low, high, sources.
    """
    rivals = [name for name in ORDER[1:] if name in set(auc["scorer"])]
    unseen = auc[~auc["seen"].astype(bool)]
    parts = [against(unseen, "rule", name, by=("rows",)).assign(rival=name)
             for name in rivals]  # fmt: skip
    return pd.concat(parts).set_index("rival")


def by_kind(auc: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """What each kind of defect does to the loss, beside who finds it.

    One row a kind: slope, low, high (log loss at a full dose), role ("harms", or "negative
    control": a kind that was not seen to harm is one the rule should not find), seen, and the AUC
    within twins of the rule, both ends of length and the reward, with intervals over libraries.
    """
    wide = _wide(over_libraries(auc, by=("scorer", "kind")), "kind", "scorer")
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
    ends = {name: against(part, "rule", name, by=("rows",)).iloc[0]
            for name in ("longest", "shortest")}  # fmt: skip
    rival, row = min(ends.items(), key=lambda item: item[1]["difference"])
    kinds = over_libraries(part, by=("scorer", "kind")).pivot(
        index="kind", columns="scorer", values="auc")  # fmt: skip
    kind = (kinds[rival] - kinds["rule"]).idxmax()
    own = over_libraries(part[part["scorer"] == "rule"], by=("scorer",)).iloc[0]
    harmful = effects.index[effects["harms"].astype(bool)]
    costly, only = part[part["kind"].isin(harmful)], None
    if len(costly):
        only = against(costly, "rule", rival, by=("rows",)).iloc[0]
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
