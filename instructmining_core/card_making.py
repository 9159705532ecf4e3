"""From a fit and its inference to a rule card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from .card import SCHEMA, RuleCard
from .card_schema import indicator_of
from .held_out import Jackknife
from .permutation import Permutation
from .runs import RunsError
from .within import Fit


def make_card(fit: Fit, scores: pd.DataFrame, *, fitted_on: str, not_for: str,
              new_sources: Jackknife | None = None, held_out: pd.DataFrame | None = None,
              permutation: Permutation | float | None = None,
              base: Mapping[str, Any] | None = None, auto_size: int | None = None,
              outcome: str = "log_loss", made_at: str | None = None) -> RuleCard:
    """The card of a fitted rule.

    fit : from fit_within (or fit_pooled); scores : the rows of the fitting pool with
    `.attrs["indicators"]`, which give models, versions, reference and the rows' ranges;
    base : {"id", "revision", "stand_in"} of the finetuned base where no indicator names it;
    auto_size : number of rows that a search found best; made_at : ISO time, default now (UTC).
    A pool of one source may only make a "within" card (RunsError).
    """
    if len(fit.sources) < 2 and fit.kind == "within" and new_sources is not None:
        raise RunsError("one source says nothing about new sources: leave new_sources out")
    if fit.kind != "within" and scores["source"].nunique() < 2:
        raise RunsError(f"a pool of one source may only make a 'within' card, not {fit.kind!r}")
    known = scores.attrs.get("indicators", {})
    references = [known[c]["reference"] for c in fit.columns if known.get(c, {}).get("reference")]
    data = {
        "schema": SCHEMA,
        "kind": fit.kind,
        "outcome": outcome,
        "intercept": fit.intercept,
        "coefficients": _coefficients(fit, scores, known, new_sources),
        "standardisation": {c: {"mean": float(fit.standardisation.mean[c]),
                                "sd": float(fit.standardisation.sd[c])} for c in fit.columns},
        "held_out": _records(held_out),
        "permutation_p": getattr(permutation, "p", permutation),
        "models": _models(fit.columns, known, base),
        "knn_reference": dict(references[0]) if references else None,
        "design": _design(fit),
        "uncertainty": _uncertainty(fit, new_sources),
        "fitted_on": fitted_on,
        "not_for": not_for,
        "made_at": made_at or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if auto_size is not None:
        data["auto_size"] = int(auto_size)
    return RuleCard(data)


def _coefficients(fit: Fit, scores: pd.DataFrame, known: Mapping,
                  new: Jackknife | None) -> list[dict]:
    table = fit.table()
    raw = fit.runs[list(fit.columns)]
    rows = scores[list(fit.columns)].astype(float).quantile([0.01, 0.99])
    found = []
    for c in fit.columns:
        bounds = None if new is None else [float(new.table.at[c, b]) for b in ("low", "high")]
        vif = float(table.at[c, "vif"])
        entry = indicator_of(c)
        found.append({
            "name": c, "label": table.at[c, "label"], "estimate": float(table.at[c, "estimate"]),
            "raw": float(table.at[c, "raw"]),
            "interval_these_sources": [float(table.at[c, b]) for b in ("low", "high")],
            "interval_new_sources": bounds,
            "vif": vif if np.isfinite(vif) else None,
            "range": [float(raw[c].min()), float(raw[c].max())],
            "row_range": [float(rows[c].iloc[0]), float(rows[c].iloc[1])],
            "role": entry.role if entry and known.get(c, {}).get("model") else None,
            "version": known.get(c, {}).get("version"),
            "pool_relative": bool(entry and entry.pool_relative),
        })
    return found


def _models(columns: Sequence[str], known: Mapping, base: Mapping | None) -> list[dict]:
    found: dict[str, dict] = {}
    if base:
        found["base"] = {"role": "base", **{k: base[k] for k in ("id", "revision", "stand_in")}}
    for c in columns:
        here, entry = known.get(c, {}), indicator_of(c)
        if entry and entry.role and here.get("model"):
            found[entry.role] = {"role": entry.role, "id": here["model"],
                                 "revision": here.get("revision") or None,
                                 "stand_in": bool(here.get("stand_in", False))}
    return [found[role] for role in sorted(found)]


def _records(frame: pd.DataFrame | None) -> list[dict]:
    if frame is None:
        return []
    return [{"source": str(r.source), "n_sets": int(r.n_sets), "r2": _plain(r.r2),
             "slope": _plain(r.slope), "slope_interval": _pair(r.slope_low, r.slope_high)}
            for r in frame.itertuples()]


def _pair(low: float, high: float) -> list[float] | None:
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _design(fit: Fit) -> dict[str, Any]:
    """Where the fitted set means lie, in sd of the pool's rows, and how far out they reach."""
    X = fit.indicators
    mean, cov = X.mean(axis=0), np.atleast_2d(np.cov(X, rowvar=False))
    gaps = X - mean
    distance = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", gaps, np.linalg.pinv(cov), gaps), 0))
    return {"mean": mean.tolist(), "covariance": cov.tolist(),
            "largest_distance": float(distance.max()), "sets": len(X)}


def _uncertainty(fit: Fit, new: Jackknife | None) -> dict[str, Any]:
    """What prediction intervals need: covariances of (intercept, slopes), noise, source spread.

    constants : each fitted source's own constant with its variance and its covariances with the
    slopes (all HC3), so that a row of that source is not predicted by the sources' average.
    """
    m = fit.controls.shape[1]
    p = len(fit.columns)
    # the card's intercept is the mean of the controls' constants
    pick = np.zeros((p + 1, m + p))
    pick[0, :m] = 1 / m
    pick[1:, m:] = np.eye(p)
    joint = fit.ols.cov_hc3()
    constants = [{"source": source, "estimate": float(fit.ols.beta[i]),
                  "variance": float(joint[i, i]),
                  "covariance_with_slopes": joint[i, m:].tolist()}
                 for i, source in enumerate(fit.sources)]
    return {
        "sigma": fit.ols.sigma, "df": fit.ols.df,
        "covariance": (pick @ joint @ pick.T).tolist(),
        "new_sources_covariance": None if new is None else new.covariance.to_numpy().tolist(),
        "source_sd": float(np.std(fit.ols.beta[:m], ddof=1)) if m > 1 else None,
        "sources": m,
        "constants": constants,
    }
