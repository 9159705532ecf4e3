"""Does a rule reach these rows? Range, distance from the design, prediction intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import t as student

from .card import CardError, RuleCard

FAR_ROWS = 0.10  # share of rows outside the pool's 1–99 % ranges above which a set counts as far


class SupportError(CardError):
    """A data set lies outside what the rule was fitted on, and the caller wanted it strict."""


def support(card: RuleCard, scores: pd.DataFrame, *, strict: bool = False) -> pd.DataFrame:
    """One row a source, and "all": how far the rows lie from what the rule has seen.

    rows : number; outside_range : share with any indicator outside the range of the fitted *set
    means* (most single rows are: the rule carries from sets to rows by its straight line);
    outside_rows : share with two or more indicators outside the 1–99 % range of the fitting
    pool's *rows* (with nine indicators up to 17 % of the pool's own rows leave it in one);
    distance : Mahalanobis distance of the data set's mean from the design's centre;
    largest_distance : of the fitted sets; verdict : "inside", "far" (mean further out than any
    fitted set, or outside_rows > 10 %) or "unknown" (a card without ranges, as the published
    ones). strict : raise SupportError where "all" is not inside.
    """
    values = card.standardise(scores)
    names = scores["source"].astype(str) if "source" in scores else pd.Series("all", scores.index)
    parts = {"all": np.full(len(scores), True)}
    if names.nunique() > 1:
        parts |= {s: (names == s).to_numpy() for s in sorted(names.unique())}
    raw = scores[card.columns].astype(float)
    frame = pd.DataFrame([_one(card, raw[m], values[m]) for m in parts.values()],
                         index=pd.Index(parts, name="source"))
    worst = frame.at["all", "verdict"]
    if strict and worst != "inside":
        raise SupportError(
            f"this data set is {worst!r} to the rule's support: its mean lies "
            f"{frame.at['all', 'distance']:.1f} from the design (fitted sets reach "
            f"{frame.at['all', 'largest_distance']:.1f}), {frame.at['all', 'outside_rows']:.0%} "
            "of its rows leave the fitting pool's range; fit a rule on data like this, or leave "
            "out --strict")
    return frame


def _one(card: RuleCard, raw: pd.DataFrame, values: pd.DataFrame) -> dict:
    coefficients, design = card.data["coefficients"], card.data.get("design")
    result = {"rows": len(raw), "outside_range": np.nan, "outside_rows": np.nan,
              "distance": np.nan, "largest_distance": np.nan, "verdict": "unknown"}
    if design is None or any(not c.get("range") for c in coefficients) or raw.empty:
        return result
    result["outside_range"] = float((_beyond(raw, [c["range"] for c in coefficients]) > 0).mean())
    beyond = _beyond(raw, [c.get("row_range") or c["range"] for c in coefficients])
    result["outside_rows"] = float((beyond >= min(2, len(coefficients))).mean())
    gap = values.mean().to_numpy() - np.array(design["mean"])
    inverse = np.linalg.pinv(np.array(design["covariance"]))
    result["distance"] = float(np.sqrt(max(gap @ inverse @ gap, 0)))
    result["largest_distance"] = float(design["largest_distance"])
    far = (result["distance"] > result["largest_distance"]
           or result["outside_rows"] > FAR_ROWS)
    result["verdict"] = "far" if far else "inside"
    return result


def _beyond(raw: pd.DataFrame, ranges: list) -> np.ndarray:
    low, high = np.array(ranges, float).T
    values = raw.to_numpy(float)
    return ((values < low) | (values > high)).sum(axis=1)


def intervals(card: RuleCard, scores: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Prediction interval of each row: the log loss after training on a set of rows like it.

    predicted; low_these, high_these : these sources, HC3, with the run noise; low_new, high_new :
    a new source, jackknife, with the spread between sources' constants and the run noise (NaN
    without jackknife); outside : the row leaves the range of the fitted set means. Log losses.
    Errors: CardError for a card without `uncertainty`, as the published ones.
    """
    known = card.data.get("uncertainty")
    if not known:
        raise CardError("this card carries no uncertainty (the published rules have no "
                        "intervals): no prediction interval can be given")
    Z = card.standardise(scores).to_numpy(float)
    predicted = card.predict(scores)
    noise = known["sigma"] ** 2
    ones = np.hstack([np.ones((len(Z), 1)), Z])
    these = _half(ones, known["covariance"], noise, known["df"], level)
    new = np.full(len(Z), np.nan)
    if known["new_sources_covariance"] is not None and known["source_sd"] is not None:
        S = known["sources"]
        spread = known["source_sd"] ** 2 * (1 + 1 / S)
        new = _half(Z, known["new_sources_covariance"], noise + spread, S - 1, level)
    outside = _beyond(scores[card.columns].astype(float),
                      [c["range"] for c in card.data["coefficients"]]) > 0
    return pd.DataFrame({"predicted": predicted, "low_these": predicted - these,
                         "high_these": predicted + these, "low_new": predicted - new,
                         "high_new": predicted + new, "outside": outside}, scores.index)


def _half(rows: np.ndarray, covariance: list, extra: float, df: int, level: float) -> np.ndarray:
    variance = np.einsum("ij,jk,ik->i", rows, np.array(covariance), rows) + extra
    return student.ppf(0.5 + level / 2, df) * np.sqrt(variance)
