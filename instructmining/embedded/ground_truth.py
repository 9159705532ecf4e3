"""The known truth of the embedded corpus: what a defect costs, and who finds it.

Statistical plan, section 8. The truth is measured, not declared: dose-response runs say which
kinds of defect harm the loss. A rule is then judged within twins, clean row against defective row,
library by library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import t as student

from instructmining_core.config import InstructMiningError

from .defects import KINDS, SEEN_KINDS, twins

LEVEL = 0.95  # of every interval here
CLEAN = "clean"  # the kind of a dose of 0, which all kinds share


def dose_sets(
    table: pd.DataFrame, size: int, *, doses: Sequence[float], seeds: Sequence[int],
    kinds: Sequence[str] = KINDS, partial: Sequence[str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Training sets that differ in the share of defective twins and in nothing else.

    table : clean record rows (id, source, symbol, question, prompt, response, messages)
    size : rows of one set, drawn equally from all sources
    kinds : of defects; partial : those with doses between 0 and 1, None for all
    returns : record rows with columns `dose` (0 to 1), `seed` and `place` (0 to size - 1, the order
        in training); one set is one (kind, dose, seed). At one seed every set asks the same prompts
        in the same places; a larger dose keeps the twins of a smaller one. Dose 0 stands once per
        seed, with kind "clean" in column `set_kind`; the others have their kind there.
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

    Every dose of a kind has a level of its own: responses bend (a kind may harm only where no row
    is clean), and a common straight line through the shared dose 0 would let the kinds that bend
    push up those that do nothing.
    """
    kinds = [kind for kind in dict.fromkeys(runs["kind"]) if kind != CLEAN]
    if not kinds:
        raise InstructMiningError("No run has a dose above 0; run the dose sets first.")
    seeds = sorted(runs["seed"].unique())
    levels = [(k, d) for k in kinds for d in sorted(runs.loc[runs["kind"] == k, "dose"].unique())]
    design = np.column_stack(
        [(runs["seed"] == s).to_numpy(float) for s in seeds]
        + [((runs["kind"] == k) & (runs["dose"] == d)).to_numpy(float) for k, d in levels]
    )
    largest = [len(seeds) + max(i for i, (name, _) in enumerate(levels) if name == k)
               for k in kinds]
    fit = sm.OLS(np.log(runs["loss_eval_1"].to_numpy(float)), design).fit()
    known = fit.df_resid > 0
    low, high = fit.conf_int(1 - LEVEL)[largest].T if known else np.full((2, len(kinds)), np.nan)
    frame = pd.DataFrame(
        {"slope": fit.params[largest], "low": low, "high": high,
         "p": fit.pvalues[largest] if known else np.nan, "df": int(fit.df_resid),
         "runs": [int((runs["kind"] == k).sum()) for k in kinds]},
        index=pd.Index(kinds, name="kind"),
    )  # fmt: skip
    return frame.assign(harms=frame["low"] > 0, seen=frame.index.isin(SEEN_KINDS))


def rivals(scores: pd.DataFrame, effects: pd.DataFrame) -> dict[str, pd.Series]:
    """What stands beside a rule: each a Series on the index of `scores`, lower is better.

    scores : columns `kind`, and those of len_out, ppl, compression and reward that are there
    effects : as `dose_effects` gives it, for the loss oracle
    returns : "random", "longest", "shortest", "lowest_ppl", "compression", "reward", "oracle" (the
        true label) and "loss_oracle" (the kind's measured slope where that kind `harms`; 0 for
        clean rows and for kinds that were not seen to harm, so that it knows the loss and not the
        label)
    """
    signs = {"longest": ("len_out", -1), "shortest": ("len_out", 1), "lowest_ppl": ("ppl", 1),
             "compression": ("compression", 1), "reward": ("reward", -1)}  # fmt: skip
    draws = np.random.default_rng(0).random(len(scores))
    found = {"random": pd.Series(draws, index=scores.index)}
    for name, (column, sign) in signs.items():
        if column in scores:
            found[name] = sign * scores[column]
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
        (share of pairs won, a tie counts half), missing (pairs left out, as a score is missing) and
        seen (the stand-in reward and evaluator models learnt from that kind)
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
    half = student.ppf(0.5 + LEVEL / 2, result["sources"] - 1) * error
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


def permuted_within_source(
    scores: pd.DataFrame, columns: Sequence[str], seed: int
) -> pd.DataFrame:
    """The negative control: the rows' indicators, all together, shuffled within each source.

    Correlations between indicators and everything about sources stay; what a row's indicators say
    about that row is gone, so the whole procedure must end in "no evidence".
    """
    rng = np.random.default_rng(seed)
    place = np.arange(len(scores))
    for index in scores.groupby("source", sort=True).indices.values():
        place[index] = rng.permutation(index)
    shuffled = scores.copy()
    shuffled[list(columns)] = scores[list(columns)].to_numpy()[place]
    return shuffled


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
