"""From a study's runs to the tables of notebooks 07, 10 and 12: inference, put side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from . import inference, regression
from .card import RuleCard
from .embedded.truth import permuted_within_source
from .intervals import share_interval
from .records import assistant_turns, row_hash
from .runs import RunsError, Standardisation
from .study import Study
from .unigram import unigram_losses
from .within import NEW_SOURCES, THESE_SOURCES, Fit

COUNTED, PLAIN = "shared rows counted", "shared rows not counted"


def jackknife(runs: pd.DataFrame, columns: Sequence[str], constants: Standardisation):
    """Intervals for new sources, or None where a deletion leaves too little to fit."""
    try:
        return inference.jackknife_sources(runs, columns, constants)
    except (RunsError, regression.RankError):
        return None


def coefficient_table(fit: Fit, jack) -> pd.DataFrame:
    """Every slope (log loss per sd of a row) with both intervals, raw slope with bounds, VIF."""
    table = fit.table()
    frame = table[["label", "estimate", "low", "high"]].rename(
        columns={"low": "low, these sources", "high": "high, these sources"}
    )
    low, high = (jack.table["low"], jack.table["high"]) if jack else (np.nan, np.nan)
    frame["low, new sources"], frame["high, new sources"] = low, high
    sd = fit.standardisation.sd[list(fit.columns)]
    raw = table[["raw", "low", "high"]].copy()
    raw[["low", "high"]] = raw[["low", "high"]].div(sd, axis=0)
    frame[["raw", "raw low", "raw high"]] = raw  # bounds for these sources
    frame["vif"] = table["vif"]
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
    """Slopes between and within sources, and the test of their equality in one sentence.

    An empty table, and why, where the sources are too few for it.
    """
    means = study.candidate_scores.groupby("source")[list(columns)].mean()
    try:
        split = regression.mundlak(runs, columns, means, constants)
    except (RunsError, regression.RankError) as error:
        return pd.DataFrame(), str(error)
    found = ("they differ: a rule fitted to mixtures is not a rule for rows here"
             if split.p < 0.05 else "no difference is seen, which does not prove them equal")
    differ = split.table[split.table["low"] * split.table["high"] > 0].index
    named = f"; one at a time the interval leaves out zero for {', '.join(differ)}"
    return split.table, (f"Between and within: F({split.df1}, {split.df2}) = {split.f:.2f}, "
                         f"p = {split.p:.2g}, {found}{named if len(differ) else ''}.")


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


def rows_of_sets(study: Study) -> dict[str, tuple[str, ...]]:
    """set_id -> row hashes, by which `inference.permutation` counts shared rows."""
    return {one.set_id: one.row_hashes for one in study.sets}


def negative_control(study: Study) -> pd.DataFrame:
    """The whole procedure on indicators that mean nothing: rows shuffled within their source.

    The sets keep their rows and losses; which indicators belong to which row is shuffled, many
    times, and every shuffle is tested with the shared rows counted and without. Two rows, COUNTED
    and PLAIN: shuffles, how many are "significant" at 5 %, their share with Wilson bounds, p of
    the study by the same test; for PLAIN also the shuffles' median and largest R², the study's, and
    its p against the shuffles, which share rows in just the same way (whitened R² can't be compared
    over shuffles). The control stops at the test: nothing is selected by it.
    """
    columns, settings = study.profile.rule_columns(), study.profile.inference
    runs, rows, size = study.runs("sweep"), rows_of_sets(study), min(4, len(columns))

    def tests(table: pd.DataFrame, draws: int) -> dict[str, inference.Permutation]:
        constants = Standardisation.fit(table, columns)
        joined = study.joined(runs, scores=table)
        return {
            name: inference.permutation(joined, columns, constants, size=size,
                                        n_permutations=draws, rows=known)
            for name, known in ((COUNTED, rows), (PLAIN, None))
        }  # fmt: skip

    own = tests(study.scores, settings.permutations)
    shuffled = [tests(permuted_within_source(study.scores, columns, seed), 199)
                for seed in range(settings.shuffles)]  # fmt: skip
    return control_table(own, shuffled)


def control_table(
    own: Mapping[str, inference.Permutation],
    shuffled: Sequence[Mapping[str, inference.Permutation]],
) -> pd.DataFrame:
    """See `negative_control`; own, shuffled : the tests by name, of the study and the shuffles."""
    table, n = {}, len(shuffled)
    for name, test in own.items():
        rejected = sum(one[name].p < 0.05 for one in shuffled)
        low, high = share_interval(rejected, n)
        table[name] = {"shuffles": n, "significant at 5 %": rejected,
                       "share significant": rejected / n, "low": low, "high": high,
                       "p of the study": test.p}  # fmt: skip
    found, observed = np.array([one[PLAIN].statistic for one in shuffled]), own[PLAIN].statistic
    table[PLAIN] |= {"median R² of the shuffles": np.median(found), "largest": found.max(),
                     "R² of the study": observed,
                     "p against the shuffles": (1 + (found >= observed).sum()) / (1 + n)}
    return pd.DataFrame(table).T


def control_said(control: pd.DataFrame) -> str:
    """The negative control in words: which permutation test keeps its level, and the p then."""
    said = []
    for name, row in control.iterrows():
        kept = ("agrees with one in twenty" if row["low"] <= 0.05 <= row["high"] else
                "is more than one in twenty, so that its p is not to be believed"
                if row["low"] > 0.05 else "is fewer than one in twenty: the test is cautious")
        said.append(f"With {name}, {row['significant at 5 %']:.0f} of {row['shuffles']:.0f} "
                    f"shuffles are significant at 5 %, {100 * row['share significant']:.0f} % "
                    f"[{100 * row['low']:.0f}, {100 * row['high']:.0f}], which {kept}; the "
                    f"study's p is {row['p of the study']:.2g}.")  # fmt: skip
    plain = control.loc[PLAIN]
    said.append(f"Held against the shuffles themselves the study's R² of "
                f"{plain['R² of the study']:.2f} has p = {plain['p against the shuffles']:.3f}; "
                f"the smallest that {plain['shuffles']:.0f} shuffles can give is "
                f"{1 / (1 + plain['shuffles']):.3f}.")
    return " ".join(said)


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
