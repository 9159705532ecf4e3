"""From a fit and its inference to a rule card.

What a rule card must hold, down to its leaves: errors name the path of what is wrong.

The rule card: a fitted rule as one JSON file that says what it is and where it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import write_atomic
from ..indicators import INDICATORS, Indicator
from .inference import Jackknife
from .permutation import Permutation
from .rule import RuleFit, hc3
from .run_table import RunsError

SCHEMA = "instructmining.rule/2"  # /2 adds uncertainty.constants: the sources' own constants
READABLE = ("instructmining.rule/1", SCHEMA)
KINDS = ("within", "between", "pooled")
REQUIRED = ("schema", "kind", "coefficients", "standardisation", "held_out", "permutation_p",
            "models", "knn_reference", "fitted_on", "not_for")


class CardError(ValueError):
    """A rule card is broken, unknown, or lacks what was asked of it."""


Check = tuple[Callable[[Any], bool], str]


def _finite(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and bool(np.isfinite(value)))


def _bounds(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 2
                             and all(map(_finite, value)) and value[0] <= value[1])


def _word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


NUMBER: Check = (_finite, "a finite number")
MAYBE: Check = (lambda v: v is None or _finite(v), "a finite number, or null where not known")
BOUNDS: Check = (_bounds, "[low, high], or null where not known")
TEXT: Check = (lambda v: isinstance(v, str), "text")
WORD: Check = (_word, "a text that is not empty")
PROBABILITY: Check = (lambda v: v is None or (_finite(v) and 0 <= v <= 1),
                      "between 0 and 1, or null where not known")
COEFFICIENT = {"name": WORD, "estimate": NUMBER, "interval_these_sources": BOUNDS,
               "interval_new_sources": BOUNDS, "vif": MAYBE, "range": BOUNDS}
HELD_OUT = {"source": WORD, "r2": MAYBE, "slope": MAYBE}
MODEL: dict[str, Check] = {
    "role": WORD, "id": WORD,
    "revision": (lambda v: v is None or _word(v), "a commit or hash, or null where not known"),
    "stand_in": (lambda v: isinstance(v, bool), "true or false"),
}  # fmt: skip
REFERENCE: dict[str, Check] = {
    "hash": WORD, "size": (lambda v: _finite(v) and v >= 1 and v == int(v), "a number of rows"),
}  # fmt: skip
CONSTANT: dict[str, Check] = {
    "source": WORD, "estimate": NUMBER, "variance": NUMBER,
    "covariance_with_slopes": (lambda v: isinstance(v, list) and all(map(_finite, v)),
                               "a list of numbers, one a coefficient"),
}  # fmt: skip


def validate(data: Any) -> None:
    """Raises CardError naming the path of the first field that is missing or wrong.

    `intercept` may be left out: predictions are then differences from the pool's mean row.
    """
    if not isinstance(data, Mapping):
        raise CardError("a rule card is a JSON object")
    missing = [k for k in REQUIRED if k not in data]
    if missing:
        raise CardError(f"the rule card lacks {missing}; schema {SCHEMA} needs {list(REQUIRED)}")
    if data["schema"] not in READABLE:
        raise CardError(f"schema {data['schema']!r} is not known here; this version reads "
                        f"{' and '.join(READABLE)}")
    if data["kind"] not in KINDS:
        raise CardError(f"kind {data['kind']!r} is none of {KINDS}")
    if not data["coefficients"]:
        raise CardError("the rule card has no coefficients")
    top = {"permutation_p": PROBABILITY, "fitted_on": TEXT, "not_for": TEXT}
    _hold(data, top | ({"intercept": NUMBER} if "intercept" in data else {}), "")
    _hold_all(data["coefficients"], COEFFICIENT, "coefficients")
    _hold_all(data["held_out"], HELD_OUT, "held_out")
    _hold_all(data["models"], MODEL, "models")
    if data["knn_reference"] is not None:
        _hold(data["knn_reference"], REFERENCE, "knn_reference")
    _hold_all((data.get("uncertainty") or {}).get("constants") or [], CONSTANT,
              "uncertainty.constants")
    _standardisation(data)
    _every_model(data)


def _hold_all(parts: Any, checks: Mapping[str, Check], path: str) -> None:
    if not isinstance(parts, list | tuple):
        raise CardError(f"{path} is {parts!r}; it must be a list")
    for i, part in enumerate(parts):
        _hold(part, checks, f"{path}[{i}]")


def _hold(part: Any, checks: Mapping[str, Check], path: str) -> None:
    if not isinstance(part, Mapping):
        raise CardError(f"{path} is {part!r}; it must be an object")
    for key, (right, what) in checks.items():
        place = f"{path}.{key}".lstrip(".")
        if key not in part:
            raise CardError(f"the rule card lacks {place}, {what}")
        if not right(part[key]):
            raise CardError(f"{place} is {part[key]!r}; it must be {what}")


def _standardisation(data: Mapping[str, Any]) -> None:
    constants = data["standardisation"]
    if constants is not None and not isinstance(constants, Mapping):
        raise CardError("standardisation must be an object, or null for a rule in raw units")
    for name in [c["name"] for c in data["coefficients"]] if constants else []:
        here = constants.get(name) or {}
        if not (_finite(here.get("mean")) and _finite(here.get("sd")) and here["sd"] > 0):
            raise CardError(f"standardisation.{name} needs a mean and an sd above 0")


def _every_model(data: Mapping[str, Any]) -> None:
    """Each indicator that a model scores has that model's entry, and each role one entry."""
    roles = [model["role"] for model in data["models"]]
    twice = sorted({role for role in roles if roles.count(role) > 1})
    if twice:
        raise CardError(f"models names the role {twice[0]!r} more than once")
    for i, one in enumerate(data["coefficients"]):
        role, entry = role_of(one), indicator_of(one["name"])
        if role and role not in roles and not (entry and entry.role_optional):
            raise CardError(f"models has no entry of role {role!r}, whose model scores "
                            f"coefficients[{i}] {one['name']!r}")


def indicator_of(column: str) -> Indicator | None:
    """The registry's entry for a column; None for a column that no known indicator makes."""
    return next((i for i in INDICATORS.values() if column in i.columns), None)


def role_of(coefficient: Mapping[str, Any]) -> str | None:
    """Which model's values the rule was fitted on, by the registry, whatever the card says.

    None for indicators without a model, also where the stated version is the one that an indicator
    has without its model; a column that is not in the registry has the role that the card states.
    """
    entry = indicator_of(coefficient["name"])
    if entry is None:
        return coefficient.get("role")
    without = entry.role_optional and coefficient.get("version") == entry.version_without
    return None if without else entry.role


def is_pool_relative(coefficient: Mapping[str, Any]) -> bool:
    """Do the values depend on a reference set? By the registry, else as the card states."""
    entry = indicator_of(coefficient["name"])
    return bool(coefficient.get("pool_relative")) if entry is None else entry.pool_relative


__all__ = ["SCHEMA", "CardError", "CardMismatch", "RuleCard", "differences", "load_rule", "presets"]

RULES = Path(__file__).parent.parent / "rules"
OUTSIDE_HASH = ("made_at", "content_hash")


class CardMismatch(CardError):
    """A table of scores was made by another model, version or reference set than the card's."""


@dataclass(frozen=True)
class RuleCard:
    """A rule. `data` is the content of rule.json, checked; the methods read it.

    Predictions are log losses (nats per token, natural log); lower is better. What a reader sees
    is `card_page.card_markdown`; how far the rule reaches is in `support`.
    """

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        validate(self.data)

    @property
    def kind(self) -> str:
        """within, between or pooled: which slopes the coefficients are."""
        return self.data["kind"]

    @property
    def columns(self) -> list[str]:
        """The indicators of the rule, in order."""
        return [c["name"] for c in self.data["coefficients"]]

    @property
    def intercept(self) -> float:
        """Predicted log loss of the pool's mean row; 0 where the card gives none."""
        return self.data.get("intercept", 0.0)

    @property
    def content_hash(self) -> str:
        """First 32 hex of sha256 over the content; the time of making is left out."""
        content = {k: v for k, v in self.data.items() if k not in OUTSIDE_HASH}
        return hashlib.sha256(_dump(content).encode()).hexdigest()[:32]

    def standardise(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Indicators in the card's units: (value − mean)/sd, or as they are for a raw rule."""
        missing = [c for c in self.columns if c not in scores]
        if missing:
            raise CardError(f"the table has no column {missing}, which this rule needs: score it "
                            f"with --indicators {','.join(self.columns)}")
        constants = self.data["standardisation"]
        values = scores[self.columns].astype(float)
        if not constants:
            return values
        mean = pd.Series({c: constants[c]["mean"] for c in self.columns})
        sd = pd.Series({c: constants[c]["sd"] for c in self.columns})
        return (values - mean) / sd

    def contributions(self, scores: pd.DataFrame) -> pd.DataFrame:
        """What each indicator adds to a row's predicted log loss; sums to predict − intercept."""
        slopes = pd.Series({c["name"]: c["estimate"] for c in self.data["coefficients"]})
        return self.standardise(scores) * slopes

    def predict(self, scores: pd.DataFrame) -> pd.Series:
        """Predicted log loss of each row, lower is better; NaN where an indicator is missing."""
        total = self.contributions(scores).sum(axis=1, skipna=False) + self.intercept
        return total.rename("predicted_log_loss")

    def check(self, attrs: Mapping[str, Any], *, sources: Sequence[str] | None = None,
              allow_mismatch: bool = False) -> list[str]:
        """Is the table scored as the card's fitting table was?

        attrs : `.attrs` of a score table (`indicators`: column -> version, model, revision,
        stand_in, reference); sources : names in the pool, to hold a rule that is not "within"
        off a pool of one source. Raises CardMismatch naming every difference, or returns them
        with allow_mismatch=True ([] where all agree).
        """
        found = differences(self.data, attrs)
        if sources is not None and len(set(sources)) < 2 and self.kind != "within":
            found.append(f"a pool of one source may only use a 'within' rule, this card is "
                         f"{self.kind!r}")
        if found and not allow_mismatch:
            raise CardMismatch("this table was not scored as the rule's own data were:\n  - "
                               + "\n  - ".join(found)
                               + "\nScore it again with the card's models and reference, or pass "
                               "--allow-mismatch to rank without any claim")
        return found

    def to_json(self) -> str:
        """rule.json: keys sorted, two spaces, the content hash inside; same rule, same text."""
        return _dump({**self.data, "content_hash": self.content_hash}, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write rule.json whole or not at all."""
        write_atomic(path, self.to_json())


def _dump(content: Mapping, indent: int | None = None) -> str:
    return json.dumps(content, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False)


def load_rule(name_or_path: str | Path) -> RuleCard:
    """A published rule by name ("v1", "v3"), or a rule.json; a changed card is a CardError."""
    path = Path(name_or_path)
    if str(name_or_path) in presets():
        path = RULES / f"{name_or_path}.json"
    if not path.is_file():
        raise CardError(f"{name_or_path!s} is neither a published rule ({', '.join(presets())}) "
                        "nor a file: name one of them or the path of a rule.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CardError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    card = RuleCard(data)
    stated = data.get("content_hash")
    if stated and stated != card.content_hash:
        raise CardError(f"{path} was changed by hand: its content_hash is {stated} but its "
                        f"content gives {card.content_hash}; fit it again or remove the hash")
    return card


def presets() -> list[str]:
    """Names of the published rules."""
    return sorted(p.stem for p in RULES.glob("*.json"))


def differences(data: Mapping[str, Any], attrs: Mapping[str, Any]) -> list[str]:
    """Every way in which a score table's attrs differ from the card, in words.

    Which model and reference an indicator needs is known from the indicators' registry, not from
    the card. What the card leaves open (null: the paper did not say) is not compared.
    """
    models = {m["role"]: m for m in data["models"]}
    known = attrs.get("indicators") or {}
    reference = {k: v for k, v in (data["knn_reference"] or {}).items() if k in ("hash", "size")}
    found = []
    for one in data["coefficients"]:
        here = known.get(one["name"])
        if here is None:
            found.append(f"{one['name']}: the table does not say how it was scored")
            continue
        pairs = [("version", one.get("version"), here.get("version"))]
        role = role_of(one)
        model = models.get(role)
        if model:
            # a folder is known by the hash of its weights: it may lie elsewhere on this machine
            moved = _by_weights(model["revision"]) and _by_weights(here.get("revision"))
            pairs += [] if moved else [("model", model["id"], here.get("model"))]
            pairs += [("revision", model["revision"], here.get("revision")),
                      ("stand-in", model["stand_in"], here.get("stand_in"))]
        elif role:  # an indicator that also works without a model, and a card that names none
            pairs.append(("model", "", here.get("model") or ""))
        if is_pool_relative(one):
            theirs = here.get("reference") or {}
            pairs += [(f"reference {k}", reference[k], theirs.get(k)) for k in reference]
            if not reference:
                found.append(f"{one['name']}: the card names no reference set, so that its "
                             "distances can't be told to be on the same scale")
        found += [f"{one['name']}: {what} is {theirs!r} in the table, {mine!r} in the card"
                  for what, mine, theirs in pairs if mine is not None and mine != theirs]
    return found


def _by_weights(revision: Any) -> bool:
    return isinstance(revision, str) and revision.startswith("sha256:")


def make_card(fit: RuleFit, scores: pd.DataFrame, *, fitted_on: str, not_for: str,
              new_sources: Jackknife | None = None, held_out: pd.DataFrame | None = None,
              permutation: Permutation | float | None = None,
              base: Mapping[str, Any] | None = None, auto_size: int | None = None,
              outcome: str = "log_loss", made_at: str | None = None) -> RuleCard:
    """The card of a fitted rule.

    fit : from fit_rule (or fit_pooled); scores : the rows of the fitting pool with
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
        "standardisation": {c: {"mean": float(fit.standardizer.mean[c]),
                                "sd": float(fit.standardizer.sd[c])} for c in fit.columns},
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


def _coefficients(fit: RuleFit, scores: pd.DataFrame, known: Mapping,
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


def _design(fit: RuleFit) -> dict[str, Any]:
    """Where the fitted set means lie, in sd of the pool's rows, and how far out they reach."""
    X = fit.indicators
    mean, cov = X.mean(axis=0), np.atleast_2d(np.cov(X, rowvar=False))
    gaps = X - mean
    distance = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", gaps, np.linalg.pinv(cov), gaps), 0))
    return {"mean": mean.tolist(), "covariance": cov.tolist(),
            "largest_distance": float(distance.max()), "sets": len(X)}


def _uncertainty(fit: RuleFit, new: Jackknife | None) -> dict[str, Any]:
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
    joint = hc3(fit.ols)
    constants = [{"source": source, "estimate": float(fit.ols.params[i]),
                  "variance": float(joint[i, i]),
                  "covariance_with_slopes": joint[i, m:].tolist()}
                 for i, source in enumerate(fit.sources)]
    return {
        "sigma": fit.sigma, "df": fit.df,
        "covariance": (pick @ joint @ pick.T).tolist(),
        "new_sources_covariance": None if new is None else new.covariance.to_numpy().tolist(),
        "source_sd": float(np.std(fit.ols.params[:m], ddof=1)) if m > 1 else None,
        "sources": m,
        "constants": constants,
    }
