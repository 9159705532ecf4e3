"""From a study's runs to the tables of notebooks 07, 10 and 12: inference, put side by side; and
what the paper's procedure finds in simulated studies where nothing is.

Our own designs and inference are simulated by `bench.acceptance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import CountVectorizer
from statsmodels.stats.proportion import proportion_confint

from instructmining_core.config import COLUMNS, InstructMiningError
from instructmining_core.data.records import assistant_turns
from instructmining_core.finetuning.sets import TrainingSet
from instructmining_core.regression.checks import baseline_comparison, transfer_slope
from instructmining_core.regression.inference import (
    Jackknife,
    effective_dimensions,
    jackknife_sources,
    median_interval,
    r2_interval,
    r2_of,
)
from instructmining_core.regression.paper_rule import SubsetSearch, fit_paper
from instructmining_core.regression.permutation import Permutation, permutation
from instructmining_core.regression.rule import NEW_SOURCES, THESE_SOURCES, RuleFit, fit_rule, vif
from instructmining_core.regression.rule_card import RuleCard, make_card
from instructmining_core.regression.run_table import (
    RunsError,
    Standardizer,
    one_per_set,
    standardised,
)

from .experiments.comparisons import ladder_sweep
from .paper import R_SQUARED, RUNS, SET_SIZE
from .study import Study

TERMS = 4  # of the paper's rule
BETWEEN = 1.0  # sd of the source means over the sd inside a source
NOISE_SD = 0.01  # between seeds, in log loss
SOURCE_SD = 0.04  # of a source's own effect on log loss


def null_r2(n_sources: int, n_studies: int, seed: int) -> pd.DataFrame:
    """The paper's design and procedure where no indicator has any effect, only the sources differ.

    One row a study: study, n_sources, r2 (of the chosen terms), all_significant (every chosen
    p < 0.05), repeat_rank_correlation (of the rankings that this study and its repeat, new draws
    from the same sources, give to 50 new sources), first_three (share of the variance of the set
    means in three components), vif (median). Losses are log losses.
    """
    rng = np.random.default_rng(seed)
    one = np.ones((RUNS, 1))
    rows = []
    for study in range(n_studies):
        effects = rng.normal(0, SOURCE_SD, n_sources)
        strangers = rng.normal(0, BETWEEN, (50, len(COLUMNS)))
        means, rankings, first = _source_means(n_sources, rng), [], None
        for _ in range(2):
            shares, X = _fusion_means(means, rng)
            y = shares @ effects + rng.normal(0, NOISE_SD, RUNS)
            search = SubsetSearch(X, one, TERMS, smaller=True)
            choice = search.choose(y[:, None])
            members = search.members(choice.subset[0])
            rankings.append(strangers[:, members] @ choice.beta[0, : len(members)])
            first = first or (choice, X)
        choice, X = first
        rows.append({
            "study": study, "n_sources": n_sources, "r2": float(choice.r2[0]),
            "all_significant": bool(np.nanmax(choice.p[0]) < 0.05),
            "repeat_rank_correlation": float(spearmanr(*rankings)[0]),
            "first_three": effective_dimensions(X)["first_three"],
            "vif": float(np.median(vif(X))),
        })
    return pd.DataFrame(rows)


def _source_means(n_sources: int, rng: np.random.Generator) -> np.ndarray:
    """Means of the sources, (S, 9), correlated by three common factors."""
    p = len(COLUMNS)
    loadings = rng.normal(size=(3, p)) * 0.6
    means = rng.normal(size=(n_sources, 3)) @ loadings + rng.normal(size=(n_sources, p))
    return means * BETWEEN / np.sqrt((loadings**2).sum(axis=0) + 1)


def _fusion_means(means: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shares (n, S) and set means (n, 9) of the paper's design, its rows normal."""
    r = rng.uniform(size=(RUNS, len(means)))
    shares = r / r.sum(axis=1, keepdims=True)
    return shares, shares @ means + rng.normal(size=(RUNS, len(COLUMNS))) / np.sqrt(SET_SIZE)


WORDS = r"\w+|[^\w\s]"  # words and single punctuation marks
SMOOTHING = 0.1  # count added to every word of the joint vocabulary
EVALUATIONS = {"eval_1": "log_loss", "eval_2": "log_loss_eval_2"}
COUNTED, PLAIN = "shared rows counted", "shared rows not counted"
_wilson = partial(proportion_confint, method="wilson")  # count, n -> 95 % interval of the share

# (base, evaluation set) -> the runs, with `log_loss` and `log_loss_eval_2`
Settings = Mapping[tuple[str, str], pd.DataFrame]


def unigram_losses(
    sets: Sequence[TrainingSet], responses: Mapping[str, str], evaluation: Sequence[str]
) -> pd.Series:
    """Loss of the evaluation responses under each set's own unigram model; index set_id.

    responses : row hash -> response text (several turns joined); evaluation : response texts.
    Mean over prompts of the mean negative log probability per word, in nats; `SMOOTHING` is added
    to every count. Raises InstructMiningError where a row has no response text.
    """
    distinct = {s.set_id: s.row_hashes for s in sets}
    needed = list(dict.fromkeys(h for hashes in distinct.values() for h in hashes))
    lacking = [h for h in needed if h not in responses]
    if lacking or not evaluation:
        raise InstructMiningError(f"{len(lacking)} of {len(needed)} rows have no response text, "
                                  f"and there are {len(evaluation)} evaluation responses")
    counter = CountVectorizer(token_pattern=WORDS, preprocessor=str.casefold)
    counts = counter.fit_transform([*(responses[h] for h in needed), *evaluation])
    prompts = counts[len(needed):].toarray()
    prompts = prompts[prompts.any(axis=1)]
    weight = (prompts / prompts.sum(axis=1, keepdims=True)).mean(axis=0)
    place = {h: i for i, h in enumerate(needed)}
    losses = {}
    for name, hashes in distinct.items():
        held = counts[[place[h] for h in hashes]].sum(axis=0).A1 + SMOOTHING
        losses[name] = float(-weight @ np.log(held / held.sum()))
    return pd.Series(losses, name="unigram").rename_axis("set_id")


def failure_table(null: pd.DataFrame) -> pd.DataFrame:
    """What simulated studies without any effect find (`null_r2`), in words.

    One row a number of sources: studies; medians, bounds by order statistics; shares of studies
    that reach the paper's R² or call every chosen term "significant", bounds by Wilson.
    """
    def median(values: pd.Series) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(values.median(), *median_interval(values))

    def share(hits: pd.Series) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(hits.mean(), *_wilson(hits.sum(), len(hits)))

    rows = {
        sources: {
            "studies": str(len(part)), "median R²": median(part["r2"]),
            "median rank correlation": median(part["repeat_rank_correlation"]),
            "R² as large as the paper's": share(part["r2"] >= R_SQUARED),
            "every term “significant”": share(part["all_significant"]),
        }
        for sources, part in null.groupby("n_sources")
    }  # fmt: skip
    return pd.DataFrame(rows).T.rename_axis("sources")


def paper_table(
    runs: pd.DataFrame, columns: Sequence[str], constants: Standardizer, size: int
) -> pd.DataFrame:
    """The paper's procedure on all arms at equal rows, and on its own design, fusion alone.

    One row a design and chosen term: estimate, low, high, p_paper, and the fit's r2 with r2_low
    and r2_high. All of it takes the choice as given: not valid after selection.
    """
    parts = []
    for name, arms in (("all arms", None), ("fusion, the paper's own design", ("fusion",))):
        sets = runs.loc[runs["arm"].isin(arms or set(runs["arm"])), "set_id"].nunique()
        if sets <= size + 2:  # smoke's two mixtures leave nothing to choose from
            continue
        found = fit_paper(runs, columns, constants, size=size, arms=arms)
        r2, low, high = r2_of(found.fit)
        part = found.table()[["estimate", "low", "high", "p_paper"]]
        parts.append(part.assign(design=name, runs=len(found.fit.runs), r2=r2, r2_low=low,
                                 r2_high=high).reset_index())  # fmt: skip
    return pd.concat(parts).set_index(["design", "column"])


def dimensions(runs: pd.DataFrame, fit: RuleFit) -> pd.DataFrame:
    """Effective dimensions of the rule's design beside its shares, and of fusion's."""
    found = {"designed sets, beside the source shares":
             effective_dimensions(fit.indicators, fit.controls)}  # fmt: skip
    fusion = one_per_set(runs[runs["arm"] == "fusion"])
    if len(fusion) > 2:
        means = standardised(fusion, fit.columns, fit.standardizer)
        found["fusion sets, the paper's design"] = effective_dimensions(means)
    return pd.DataFrame(found).T


def tests_table(tests: Sequence[Permutation], fit: RuleFit, size: int) -> pd.DataFrame:
    """The permutation tests with what belongs to them.

    One row a test: R² of the best `size` terms (of the whitened runs where shared rows are counted)
    and its bounds (these sources; the choice is taken as given, so the lower one is too high), the
    95 % quantile of the permutations, p with its bounds (Wilson), the errors' share of rows.
    """
    rows = []
    for test in tests:
        spent = fit.controls.shape[1] if test.hypothesis == "H0b" else 1
        low, high = r2_interval(test.statistic, size, len(fit.runs) - spent - size)
        n = len(test.null)
        p_low, p_high = _wilson((test.null >= test.statistic - 1e-12).sum(), n)
        rows.append({
            "hypothesis": test.meaning, "largest R²": test.statistic, "low": low, "high": high,
            "95 % of permutations below": np.quantile(test.null, 0.95), "p": test.p,
            "p low": p_low, "p high": p_high, "permutations": n,
            "share of rows": "not counted" if test.row_share is None else f"{test.row_share:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def transfer_settings(study: Study) -> Settings:
    """The runs of every base at hand, once for each evaluation set; the first is the rule's own.

    The other evaluation set costs nothing, its losses are in the ledger. The further bases of the
    profile's ladder are finetuned on the designed sets where `robustness.transfer` asks for it.
    """
    by_base = {study.base_of_sweep()["id"]: study.sweep()}
    if study.profile.robustness.transfer:
        for ref in study.profile.models.ladder:
            by_base[ref.id] = study.joined(ladder_sweep(study, ref))
    return {(base, name): runs for base, runs in by_base.items() for name in EVALUATIONS}


def transfer_table(found: Settings, rule: RuleCard) -> pd.DataFrame:
    """The score of the rule against the loss of every setting, beside the source shares.

    One row a setting: base, evaluation, sets, slope (1 where the rule carries over whole, 0 where
    nothing does; the first row's is 1 by construction) with low and high (these sources), r2
    beyond the shares with r2_low and r2_high, carries.
    """
    rows = []
    for (base, name), runs in found.items():
        fit = transfer_slope(rule.predict(runs), runs, outcome=EVALUATIONS[name])
        one = fit.table().iloc[0]
        r2, r2_low, r2_high = r2_of(fit)
        rows.append({
            "base": base, "evaluation": name, "sets": len(fit.runs), "slope": one["estimate"],
            "low": one["low"], "high": one["high"], "r2": r2, "r2_low": r2_low,
            "r2_high": r2_high, "carries": carries(one["low"], one["high"]) if rows else "fitted",
        })  # fmt: skip
    return pd.DataFrame(rows)


def carries(low: float, high: float) -> str:
    """The interval of a transfer slope in words."""
    if high < 0:
        return "reversed"
    if not low > 0:
        return "not seen"
    return "in part" if high < 1 else "whole" if low <= 1 else "amplified"


def coefficient_map(
    found: Settings, columns: Sequence[str], constants: Standardizer
) -> pd.DataFrame:
    """Which slopes hold, the rule fitted anew in every setting; the first one makes the claims.

    One row a setting ("base, evaluation set") and indicator: setting, name, estimate, low, high
    (these sources), same_sign (as in the first), holds: "claims nothing" where the first interval
    holds zero, else "holds" or "reversed" (the interval here leaves out zero too, on the same or
    the other side), or "not seen"; in the first setting itself "claimed".
    """
    parts = []
    for (base, name), runs in found.items():
        table = fit_rule(runs, columns, constants, outcome=EVALUATIONS[name]).table()
        clear = table["low"] * table["high"] > 0
        if not parts:
            first, claimed = table["estimate"], clear
        same = np.sign(table["estimate"]) == np.sign(first)
        holds = np.select([~claimed, clear & same, clear],
                          ["claims nothing", "holds" if parts else "claimed", "reversed"],
                          "not seen")  # fmt: skip
        part = table[["estimate", "low", "high"]].assign(same_sign=same, holds=holds)
        parts.append(part.rename_axis("name").assign(setting=f"{base}, {name}").reset_index())
    frame = pd.concat(parts, ignore_index=True)
    return frame[["setting", "name", "estimate", "low", "high", "same_sign", "holds"]]


def jackknife(
    runs: pd.DataFrame, columns: Sequence[str], constants: Standardizer
) -> Jackknife | None:
    """Intervals for new sources, or None where a deletion leaves too little to fit."""
    try:
        return jackknife_sources(runs, columns, constants)
    except RunsError:
        return None


def both_intervals(fit: RuleFit, jack) -> pd.DataFrame:
    """Every slope (log loss per sd of a row) with both intervals, raw slope with bounds, VIF."""
    table = fit.table()
    frame = table[["label", "estimate", "low", "high"]].rename(
        columns={"low": "low, these sources", "high": "high, these sources"}
    )
    low, high = (jack.table["low"], jack.table["high"]) if jack else (np.nan, np.nan)
    frame["low, new sources"], frame["high, new sources"] = low, high
    sd = fit.standardizer.sd[list(fit.columns)]
    raw = table[["raw", "low", "high"]].copy()
    raw[["low", "high"]] = raw[["low", "high"]].div(sd, axis=0)
    frame[["raw", "raw low", "raw high"]] = raw  # bounds for these sources
    frame["vif"] = table["vif"]
    return frame


def coefficient_frame(fit: RuleFit, jack, by_paper) -> pd.DataFrame:
    """The coefficients in long form for the figure: name, estimate, low, high, kind."""
    parts = [fit.table().assign(kind=f"within, {THESE_SOURCES.split(':')[0]}")]
    if jack:
        parts.append(jack.table.assign(kind=f"within, {NEW_SOURCES.split(':')[0]}"))
    parts.append(by_paper.table().assign(kind="the paper's procedure (not valid after selection)"))
    frame = pd.concat(part.rename_axis("name").reset_index() for part in parts)
    return frame[["name", "estimate", "low", "high", "kind"]].reset_index(drop=True)


def vocabulary_baselines(
    study: Study, runs: pd.DataFrame, columns: Sequence[str], constants: Standardizer
) -> pd.DataFrame:
    """How much of the loss a unigram model and the number of training tokens explain."""
    rows = study.data.candidates
    responses = {own: "\n".join(answer for _, answer in assistant_turns(messages))
                 for own, messages in zip(rows["row_hash"], rows["messages"], strict=True)}
    asked = [assistant_turns(messages)[-1][1] for messages in study.data.eval_1["messages"]]
    # with other package versions than the run's, the corpus lacks some of its rows
    try:
        losses = unigram_losses(study.sets, responses, asked)
        frame = runs.assign(unigram=runs["set_id"].map(losses),
                            log_tokens=np.log(runs["tokens_trained"]))  # fmt: skip
        return baseline_comparison(frame, columns, ["unigram", "log_tokens"], constants)
    except InstructMiningError as error:
        return pd.DataFrame({"not to be had here": [str(error)]})


def negative_control(study: Study) -> pd.DataFrame:
    """The whole procedure on indicators that mean nothing: rows shuffled within their source.

    The sets keep their rows and losses; which indicators belong to which row is shuffled, many
    times, and every shuffle is tested with the shared rows counted and without.
    """
    columns, settings = study.profile.rule_columns(), study.profile.inference
    runs, size = study.runs("sweep"), min(4, len(columns))
    known = {COUNTED: {one.set_id: one.row_hashes for one in study.sets}, PLAIN: None}

    def tests(table: pd.DataFrame, draws: int) -> dict[str, Permutation]:
        constants, joined = Standardizer.fit(table, columns), study.joined(runs, scores=table)
        return {name: permutation(joined, columns, constants, size=size, n_permutations=draws,
                                  rows=rows) for name, rows in known.items()}  # fmt: skip

    own = tests(study.scores, settings.permutations)
    shuffled = [tests(permuted_within_source(study.scores, columns, seed), 199)
                for seed in range(settings.shuffles)]  # fmt: skip
    return control_table(own, shuffled)


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


def control_table(
    own: Mapping[str, Permutation], shuffled: Sequence[Mapping[str, Permutation]]
) -> pd.DataFrame:
    """The tests by name, COUNTED and PLAIN, of the study and of its shuffles, as two rows.

    For PLAIN also p of the study's R² against the shuffles, which share rows in just the same way;
    whitened R² can't be compared over shuffles.
    """
    table, n = {}, len(shuffled)
    for name, test in own.items():
        rejected = sum(one[name].p < 0.05 for one in shuffled)
        low, high = _wilson(rejected, n)
        table[name] = {"shuffles": n, "significant at 5 %": rejected,
                       "share significant": rejected / n, "low": low, "high": high,
                       "p of the study": test.p}  # fmt: skip
    found, observed = np.array([one[PLAIN].statistic for one in shuffled]), own[PLAIN].statistic
    table[PLAIN] |= {"median R² of the shuffles": np.median(found), "largest": found.max(),
                     "R² of the study": observed,
                     "p against the shuffles": (1 + (found >= observed).sum()) / (1 + n)}
    return pd.DataFrame(table).T


def rule_card(
    study: Study, fit: RuleFit, jack, held: pd.DataFrame, test, blind: Sequence[str]
) -> RuleCard:  # fmt: skip
    """The card of the study's rule, with all that is needed to use it or to refuse to.

    blind : ways of making an answer worse that the study's loss was not seen to punish
    """
    profile, base = study.profile, study.base_of_sweep()
    stand_in = base["id"].startswith("standin:")
    return make_card(
        fit, study.candidate_scores, profile=profile.name, set_size=profile.design.size,
        not_for="other models, other reference sets, other languages; rows outside the range "
        "of the fitted sets" + ("; models of any use: these are stand-ins" * stand_in)
        + (f"; finding what its loss was not seen to punish ({', '.join(blind)})" if blind else ""),
        new_sources=jack, held_out=held, permutation_p=test.p,
        base={"id": base["id"], "revision": base["revision"], "stand_in": stand_in},
    )  # fmt: skip
