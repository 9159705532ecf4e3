"""Does a rule reach these rows? Range, distance from the design, prediction intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import t as student

from ..config import InstructMiningError
from ..indicators.score_table import ScoreTable, parts_of
from ..regression.rule_card import RuleCard, Uncertainty

LEVEL = 0.95  # of the prediction intervals
FAR_ROWS = 0.10  # share of rows outside the pool's 1–99 % ranges above which a set counts as far


def support(
    card: RuleCard, scores: pd.DataFrame | ScoreTable, *, strict: bool = False
) -> pd.DataFrame:
    """One row a source, and "all": how far the rows lie from what the rule has seen.

    rows : number; missing : share of rows that lack an indicator, which count as outside below;
    outside_range : share with any indicator outside the range of the fitted *set means*, as most
    single rows are; outside_rows : share with two or more indicators outside the 1–99 % range of
    the fitting pool's *rows*; distance : Mahalanobis distance of the data set's mean from the
    design's centre; row_distance_median, row_distance_95 : of the rows themselves;
    largest_distance : of the fitted sets; verdict : "inside", "far" (mean further out than any
    fitted set, or outside_rows > 10 %) or "unknown" (a card without ranges, as the published ones).
    strict : raise InstructMiningError naming every source that is not inside.
    """
    names = {name for part in parts_of(scores, ["source"]) for name in _sources(part).unique()}
    kind = pd.CategoricalDtype(sorted(names))  # a byte a row, not a name
    found = [_measured(card, part, kind) for part in parts_of(scores, ["source", *card.columns])]
    rows = pd.concat([rows for rows, _ in found])
    sums = sum(sums for _, sums in found)
    parts = {"all": (rows, sums.sum())}
    if len(names) > 1:
        by_source = rows.groupby("source", observed=True)
        parts |= {name: (own, sums.loc[name]) for name, own in by_source}
    frame = pd.DataFrame([_one(card, *part) for part in parts.values()],
                         index=pd.Index(parts, name="source"))
    outside = frame[frame["verdict"] != "inside"]
    if strict and len(outside):
        told = "\n".join(f"  - {_in_words(name, one)}" for name, one in outside.iterrows())
        raise InstructMiningError(
            f"the rule's support does not hold all of these data:\n{told}\nFit a rule on data "
            "like these, leave these sources out, or leave out --strict"
        )
    return frame


def _in_words(name: str, one: pd.Series) -> str:
    if one["verdict"] == "unknown":
        return f"{name}: unknown, the card does not say which range its rule was fitted on"
    return (f"{name}: {one['verdict']}, its mean lies {one['distance']:.1f} from the design "
            f"(fitted sets reach {one['largest_distance']:.1f}), {one['outside_rows']:.0%} of its "
            f"{one['rows']:,} rows leave the fitting pool's range or lack an indicator")


def _ranges_known(card: RuleCard) -> bool:
    return card.design is not None and all(c.range is not None for c in card.coefficients)


def _sources(scores: pd.DataFrame) -> pd.Series:
    return scores["source"].astype(str) if "source" in scores else pd.Series("all", scores.index)


def _measured(
    card: RuleCard, scores: pd.DataFrame, kind: pd.CategoricalDtype
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is kept of each row, and by source the sum of the whole rows' gaps to the design."""
    values = card.standardise(scores).to_numpy(float)
    raw = scores[card.columns].astype(float)
    missing = raw.isna().any(axis=1).to_numpy()
    rows = pd.DataFrame({"source": _sources(scores).astype(kind), "missing": missing})
    if not _ranges_known(card):
        return rows, pd.DataFrame(0.0, index=kind.categories, columns=[])
    beyond = _beyond(raw, [c.row_range or c.range for c in card.coefficients])
    gaps = values - np.array(card.design.mean)
    inverse = np.linalg.pinv(np.array(card.design.covariance))
    rows["outside_range"] = (_beyond(raw, [c.range for c in card.coefficients]) > 0) | missing
    rows["outside_rows"] = (beyond >= min(2, len(card.coefficients))) | missing
    rows["distance"] = np.sqrt(np.maximum(_quadratic(gaps, inverse), 0))
    whole = pd.DataFrame(np.where(missing[:, None], 0.0, gaps), scores.index)
    return rows, whole.groupby(rows["source"], observed=False).sum()


def _one(card: RuleCard, rows: pd.DataFrame, sums: pd.Series) -> dict:
    result = {"rows": len(rows), "missing": float(rows["missing"].mean())}
    result |= dict.fromkeys(("outside_range", "outside_rows", "distance", "row_distance_median",
                             "row_distance_95", "largest_distance"), np.nan)  # fmt: skip
    result["verdict"] = "unknown"
    if not _ranges_known(card) or rows.empty:
        return result
    result |= {name: float(rows[name].mean()) for name in ("outside_range", "outside_rows")}
    distances = rows["distance"].dropna()
    if len(distances):
        middle = sums.to_numpy() / len(distances)
        inverse = np.linalg.pinv(np.array(card.design.covariance))
        result["distance"] = float(np.sqrt(max(middle @ inverse @ middle, 0)))
        result["row_distance_median"] = float(distances.median())
        result["row_distance_95"] = float(distances.quantile(0.95))
    result["largest_distance"] = card.design.largest_distance
    near = result["distance"] <= result["largest_distance"]
    result["verdict"] = "inside" if near and result["outside_rows"] <= FAR_ROWS else "far"
    return result


def _beyond(raw: pd.DataFrame, ranges: list) -> np.ndarray:
    low, high = np.array(ranges, float).T
    values = raw.to_numpy(float)
    return ((values < low) | (values > high)).sum(axis=1)


def intervals(card: RuleCard, scores: pd.DataFrame) -> pd.DataFrame:
    """95 % prediction interval of each row: the log loss after training on a set of rows like it.

    predicted : with the constant of the row's own source where the rule was fitted on it (then
    own_source is True), else with the sources' mean constant, as `RuleCard.predict` for ranking;
    low_these, high_these : about `predicted`, slopes of these sources (HC3) and the run noise;
    without an own constant also the spread between the sources' constants, since the row's source
    is then one more of them; low_new, high_new : a new source, about `RuleCard.predict`: jackknife
    slopes, spread and run noise (NaN without jackknife); outside : the row leaves the range of the
    fitted set means, or lacks an indicator. Log losses.
    Errors: InstructMiningError for a card without `uncertainty`, as the published ones.
    """
    known = card.uncertainty
    if known is None:
        raise InstructMiningError("this card carries no uncertainty (the published rules have no "
                                  "intervals): no prediction interval can be given")
    Z = card.standardise(scores).to_numpy(float)
    mean = card.predict(scores).to_numpy(float)
    sources = scores["source"] if "source" in scores else pd.Series("", scores.index)
    centre, these, own = _these(card, known, Z, mean, sources.astype(str).to_numpy())
    new = np.full(len(Z), np.nan)
    if known.new_sources_covariance is not None and known.source_sd is not None:
        variance = _quadratic(Z, known.new_sources_covariance) + known.sigma ** 2
        new = _half(variance + _spread(known), known.sources - 1)
    raw = scores[card.columns].astype(float)
    ranges = [c.range or (-np.inf, np.inf) for c in card.coefficients]
    outside = (_beyond(raw, ranges) > 0) | raw.isna().any(axis=1).to_numpy()
    return pd.DataFrame({"predicted": centre, "low_these": centre - these,
                         "high_these": centre + these, "low_new": mean - new,
                         "high_new": mean + new, "own_source": own, "outside": outside},
                        scores.index)


def row_intervals(card: RuleCard, scores: pd.DataFrame) -> pd.DataFrame:
    """The one interval to show beside a row: predicted, low, high, and `interval`, what it is.

    "its own source" where the rule was fitted on it, else "a new source", or "these sources" where
    the card has no jackknife. No columns for a card without `uncertainty`. Log losses.
    """
    if card.uncertainty is None:
        return pd.DataFrame(index=scores.index)
    found = intervals(card, scores)
    new = ~found["own_source"] & found["low_new"].notna()
    frame = found[["predicted"]].assign(low=found["low_these"].mask(new, found["low_new"]),
                                        high=found["high_these"].mask(new, found["high_new"]))
    kinds = np.select([found["own_source"], new], ["its own source", "a new source"],
                      "these sources")
    return frame.assign(interval=kinds)


def _these(card: RuleCard, known: Uncertainty, Z: np.ndarray, mean: np.ndarray, names: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, half-width and "has a constant of its own" of each row, for these sources."""
    covariance = np.array(known.covariance)
    ones = np.hstack([np.ones((len(Z), 1)), Z])
    noise, spread, S = known.sigma ** 2, _spread(known), known.sources
    alone = card.kind == "within" and S == 1  # one source tells nothing of another's constant
    variance = _quadratic(ones, covariance) + noise + (np.nan if alone else spread)
    df = np.full(len(Z), min(known.df, S - 1) if spread else known.df)
    centre, own = mean.copy(), np.zeros(len(Z), bool)
    for one in known.constants:
        here = names == one.source
        with_slopes = Z[here] @ np.array(one.covariance_with_slopes)
        variance[here] = (one.variance + 2 * with_slopes
                          + _quadratic(Z[here], covariance[1:, 1:]) + noise)
        centre[here] += one.estimate - card.constant
        df[here], own[here] = known.df, True
    return centre, _half(variance, df), own


def _spread(known: Uncertainty) -> float:
    """Variance of one more source's constant about the mean of those that were fitted."""
    return (known.source_sd or 0.0) ** 2 * (1 + 1 / known.sources)


def _quadratic(rows: np.ndarray, covariance: list | np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", rows, np.array(covariance), rows)


def _half(variance: np.ndarray, df: int | np.ndarray) -> np.ndarray:
    return student.ppf(0.5 + LEVEL / 2, df) * np.sqrt(variance)
