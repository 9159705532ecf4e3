"""From a study's runs to the tables of notebooks 07, 10 and 12: inference, put side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from . import inference, regression
from .card import RuleCard
from .embedded.truth import permuted_within_source
from .experiments import ladder_sweep, size_pool
from .planner import plan_runs
from .records import assistant_turns, row_hash
from .runs import RunsError, Standardisation, share_matrix, standardised
from .selection import choose
from .study import Study
from .unigram import unigram_losses
from .within import NEW_SOURCES, THESE_SOURCES, Fit


def jackknife(runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation):
    """Intervals for new sources, or None where a deletion leaves too little to fit."""
    try:
        return inference.jackknife_sources(runs, columns, constants)
    except (RunsError, regression.RankError):
        return None


def coefficient_table(fit: Fit, jack) -> pd.DataFrame:
    """Every slope (log loss per sd of a row) with both intervals, raw slope and VIF."""
    table = fit.table()
    frame = table[["label", "estimate", "low", "high", "raw", "vif"]].rename(
        columns={"low": "low, these sources", "high": "high, these sources"}
    )
    low, high = (jack.table["low"], jack.table["high"]) if jack else (np.nan, np.nan)
    frame.insert(4, "low, new sources", low)
    frame.insert(5, "high, new sources", high)
    return frame


def coefficient_frame(fit: Fit, jack, by_paper) -> pd.DataFrame:
    """The coefficients in long form for the figure: name, estimate, low, high, kind."""
    parts = [fit.table().assign(kind=f"within, {THESE_SOURCES.split(':')[0]}")]
    if jack:
        parts.append(jack.table.assign(kind=f"within, {NEW_SOURCES.split(':')[0]}"))
    parts.append(by_paper.table().assign(kind="the paper's procedure (not valid after selection)"))
    frame = pd.concat(part.rename_axis("name").reset_index() for part in parts)
    return frame[["name", "estimate", "low", "high", "kind"]].reset_index(drop=True)


def predictions(fit: Fit) -> pd.DataFrame:
    """Each set's measured and fitted log loss, with its arm and source."""
    frame = fit.runs[[c for c in ("set_id", "arm", "source") if c in fit.runs]].copy()
    frame["measured"] = fit.ols.y
    frame["predicted"] = fit.ols.y - fit.ols.residuals
    return frame


def mundlak(
    study: Study, runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation
) -> tuple[pd.DataFrame, str]:
    """Slopes between and within sources, and the test of their equality in one line.

    An empty table, and why, where the sources are too few for it.
    """
    means = study.candidate_scores.groupby("source")[list(columns)].mean()
    try:
        split = regression.mundlak(runs, columns, means, constants)
    except (RunsError, regression.RankError) as error:
        return pd.DataFrame(), str(error)
    return split.table, f"between = within: F = {split.f:.2f}, p = {split.p:.3f}"


def baselines(
    study: Study, runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation
) -> pd.DataFrame:
    """How much of the loss a unigram model and the number of training tokens explain."""
    responses = {
        row_hash(messages): "\n".join(answer for _, answer in assistant_turns(messages))
        for messages in study.data.candidates["messages"]
    }
    asked = [assistant_turns(messages)[-1][1] for messages in study.data.eval_1["messages"]]
    # with other package versions than the run's, the corpus lacks some of its rows: ValueError
    try:
        losses = unigram_losses(study.sets, responses, asked)
        frame = runs.assign(
            unigram=runs["set_id"].map(losses), log_tokens=np.log(runs["tokens_trained"])
        )
        return regression.baseline_comparison(frame, columns, ["unigram", "log_tokens"], constants)
    except ValueError as error:
        return pd.DataFrame({"not to be had here": [str(error)]})


def transfer(study: Study, rule: RuleCard) -> pd.DataFrame:
    """The score of base A's rule against the loss of other bases, beside source shares.

    One row a base of the profile's ladder: slope (1 where the rule carries over in full), low,
    high, r2 beyond the shares. Empty where the profile has no ladder.
    """
    if not (study.profile.robustness.transfer and study.profile.models.ladder):
        return pd.DataFrame()
    rows = []
    for ref in study.profile.models.ladder:
        runs = study.joined(ladder_sweep(study, ref))
        fit = regression.transfer_slope(rule.predict(runs), runs)
        one = fit.table().iloc[0]
        rows.append({"base": ref.id, "slope": one["estimate"], "low": one["low"],
                     "high": one["high"], "r2": fit.r2_beyond_controls})  # fmt: skip
    return pd.DataFrame(rows)


def ablation(study: Study, rule: RuleCard) -> pd.DataFrame:
    """Drop one indicator, refit on the same runs, select again from the largest pool.

    One row an indicator: `jaccard` with the full rule's selection, `r2` of the smaller rule beyond
    the shares. Losses are worth a finetune only where the Jaccard index is under 0.8 (Table 5).
    """
    runs, columns = study.sweep(), study.profile.rule_columns()
    pool, size = study.pool_scores(size_pool(study)), study.profile.selection.size
    whole = set(choose(pool, "selected", size, rule=rule)["row_hash"])
    rows = []
    for dropped in columns if len(columns) > 1 else []:
        kept = [c for c in columns if c != dropped]
        constants = Standardisation.fit(study.candidate_scores, kept)
        fit = regression.fit_within(runs, kept, constants)
        order = (constants.apply(pool) * fit.slopes).sum(axis=1, skipna=False)
        part = set(pool.loc[order.nsmallest(size).index, "row_hash"])
        rows.append({"without": dropped, "jaccard": len(part & whole) / len(part | whole),
                     "r2": fit.r2_beyond_controls})  # fmt: skip
    return pd.DataFrame(rows)


def negative_control(study: Study) -> pd.DataFrame:
    """The whole procedure on indicators that mean nothing: rows shuffled within their source.

    The sets keep their rows and losses; which indicators belong to which row is shuffled, many
    times. One row: how many shuffles are "significant" at 5 % by the permutation test, their
    median and largest R², the study's own R², and its p against the shuffles. Sets of one source
    share rows, so both their losses and their shuffled means are alike and permuted runs are not
    quite exchangeable: where more than one shuffle in twenty is significant, the last p is the one
    to believe.
    """
    columns, scores = study.profile.rule_columns(), study.scores
    runs, settings = study.runs("sweep"), study.profile.inference
    size = min(4, len(columns))

    def test(table: pd.DataFrame, draws: int):
        constants = Standardisation.fit(table, columns)
        return inference.permutation(study.joined(runs, scores=table), columns, constants,
                                     size=size, n_permutations=draws)  # fmt: skip

    observed = test(scores, 1).statistic
    shuffled = [
        test(permuted_within_source(scores, columns, seed), 199)
        for seed in range(settings.shuffles)
    ]
    found = np.array([one.statistic for one in shuffled])
    rejected = sum(one.p < 0.05 for one in shuffled)
    return pd.DataFrame([{
        "shuffles": len(found), "significant at 5 %": rejected,
        "median R² of the shuffles": np.median(found), "largest": found.max(),
        "R² of the study": observed,
        "p against the shuffles": (1 + (found >= observed).sum()) / (1 + len(found)),
    }])  # fmt: skip


def rule_card(study: Study, fit: Fit, jack, held: pd.DataFrame, test) -> RuleCard:
    """The card of the study's rule, with all that is needed to use it or to refuse to."""
    from .card_making import make_card

    profile = study.profile
    base = study.base_of_sweep()
    stand_in = base["id"].startswith("standin:")
    sources = ", ".join(fit.sources)
    return make_card(
        fit, study.candidate_scores,
        fitted_on=f"profile {profile.name}: {len(fit.runs)} sets of {profile.design.size} rows "
        f"from {len(fit.sources)} sources ({sources})",
        not_for="other models, other reference sets, other languages; rows outside the range "
        "of the fitted sets" + ("; models of any use: these are stand-ins" * stand_in),
        new_sources=jack, held_out=held, permutation=test,
        base={"id": base["id"], "revision": base["revision"], "stand_in": stand_in},
    )  # fmt: skip


def planned_half_widths(study: Study, frame: pd.DataFrame, sigma: float = 0.01) -> pd.DataFrame:
    """Half-widths of the slopes that each arm would give, before any run.

    frame : `Study.set_frame`; sigma : assumed noise, sd of the log loss. Columns arm, runs,
    coefficient, half_width (95 %, log loss per sd of a row), low, high (80 % band).
    """
    columns = study.profile.rule_columns()
    constants = Standardisation.fit(study.candidate_scores, columns)
    assumed = inference.SeedVariance(sigma, 8, sigma, sigma)
    parts = []
    for arm, names in (("fusion", ["fusion"]), ("designed", ["within", "mixed"])):
        rows = frame[frame["arm"].isin(names)]
        order = rows.sample(frac=1.0, random_state=study.profile.design.seed)
        shares = share_matrix(order)[0]
        plan = plan_runs(shares, standardised(order, columns, constants), columns, assumed)
        parts.append(plan.table.assign(arm=arm))
    table = pd.concat(parts, ignore_index=True).replace(np.inf, np.nan)
    return table[["arm", "runs", "coefficient", "half_width", "low", "high"]]
