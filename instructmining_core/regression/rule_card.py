"""The rule card: a fitted rule as one JSON file that says what it is and where it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..config import InstructMiningError, in_plain_words
from ..files import write_atomic
from ..indicators import INDICATORS, Indicator
from .run_table import RunsError, share_matrix

if TYPE_CHECKING:
    from .inference import Jackknife
    from .rule import RuleFit

SCHEMA = "instructmining.rule/3"  # /3: what it was fitted on in fields; /2: the sources' constants
OLDER = ("instructmining.rule/1", "instructmining.rule/2")
RULES = Path(__file__).parent.parent / "rules"


def _in_order(bounds: list[float]) -> list[float]:
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise PydanticCustomError("bounds", "it must be [low, high], or null where not known")
    return bounds


Bounds = Annotated[list[float], AfterValidator(_in_order)]
Word = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Coefficient(_Part):
    """One indicator of a rule. Where the card does not know, it says null.

    estimate : change of log loss per sd of the pool's rows, or per unit for a rule in raw units;
    range, row_range : of the fitted set means, and 1 to 99 % of the pool's rows, raw units;
    role : of the model that scores it; pool_relative : do its values depend on a reference set?
    """

    name: Word
    estimate: float
    interval_these_sources: Bounds | None
    interval_new_sources: Bounds | None
    vif: float | None
    range: Bounds | None
    label: str | None = None
    raw: float | None = None
    row_range: Bounds | None = None
    role: str | None = None
    version: str | None = None
    pool_relative: bool = False

    @property
    def indicator(self) -> Indicator | None:
        """The registry's entry; None for a column that no known indicator makes."""
        return _indicator_of(self.name)

    @property
    def model_role(self) -> str | None:
        """Which model's values the rule was fitted on, by the registry; the card's own word for a
        column that is not in it. None without a model, also by the stated version."""
        if self.indicator is None:
            return self.role
        without = self.indicator.role_optional and self.version == self.indicator.version_without
        return None if without else self.indicator.role


class Scale(_Part):
    """Mean and sd of an indicator over the rows of the fitting pool, in its units."""

    mean: float
    sd: float


class HeldOut(_Part):
    """How the rule did in a source it was fitted without (`inference.held_out`)."""

    source: Word
    r2: float | None
    slope: float | None
    slope_interval: Bounds | None = None
    n_sets: int | None = None


class ModelEntry(_Part):
    """A model of the study. revision : commit, or hash of all that makes it; more as it comes."""

    model_config = ConfigDict(extra="allow")

    role: Word
    id: Word
    revision: Word | None
    stand_in: bool


class ReferenceRows(_Part):
    """The rows that neighbours were looked for in."""

    hash: Word
    size: Annotated[int, Field(ge=1)]


class FittedDesign(_Part):
    """Where the fitted set means lie, in sd of the pool's rows, and how far out they reach."""

    mean: list[float]
    covariance: list[list[float]]
    largest_distance: float
    sets: int


class SourceConstant(_Part):
    """A fitted source's own constant, with its covariances with the slopes (all HC3)."""

    source: Word
    estimate: float
    variance: float
    covariance_with_slopes: list[float]


class Uncertainty(_Part):
    """What prediction intervals need: covariances of (intercept, slopes), noise, source spread."""

    sigma: float
    df: int
    covariance: list[list[float]]
    new_sources_covariance: list[list[float]] | None
    source_sd: float | None
    sources: int
    constants: list[SourceConstant] = []


class FittedOn(_Part):
    """The runs of a rule. note : what no field holds, such as a paper's own words.

    sources : names; profile : of the study; sets : how many; set_size : rows of each
    """

    sources: list[str] = []
    profile: str | None = None
    sets: int | None = None
    set_size: int | None = None
    note: str = ""


class RuleCard(_Part):
    """A rule; built by `from_dict`, `make_card` or `load_rule`.

    Predictions are log losses (nats per token, natural log); lower is better. Without `intercept`
    they are differences from the pool's mean row. content_hash : first 32 hex of sha256 over the
    content in the schema it was published in; the time of making is left out.
    """

    schema_name: Literal["instructmining.rule/3"] = Field(alias="schema")
    kind: Literal["within", "between", "pooled"]
    outcome: str = "log_loss"
    intercept: float | None = None
    coefficients: Annotated[list[Coefficient], Field(min_length=1)]
    standardisation: dict[str, Scale] | None
    held_out: list[HeldOut]
    permutation_p: Annotated[float, Field(ge=0, le=1)] | None
    models: list[ModelEntry]
    knn_reference: ReferenceRows | None
    design: FittedDesign | None = None
    uncertainty: Uncertainty | None = None
    fitted_on: FittedOn
    not_for: str
    auto_size: Annotated[int, Field(ge=1)] | None = None
    made_at: str | None = None
    content_hash: str = ""

    @model_validator(mode="after")
    def _parts_fit(self) -> RuleCard:
        scales = self.standardisation
        for name in self.columns if scales else []:
            if name not in scales or not scales[name].sd > 0:
                raise ValueError(f"standardisation.{name} needs a mean and an sd above 0")
        roles = [model.role for model in self.models]
        twice = sorted({role for role in roles if roles.count(role) > 1})
        if twice:
            raise ValueError(f"models names the role {twice[0]!r} more than once")
        for i, one in enumerate(self.coefficients):
            optional = one.indicator is not None and one.indicator.role_optional
            if one.model_role and one.model_role not in roles and not optional:
                raise ValueError(f"models has no entry of role {one.model_role!r}, whose model "
                                 f"scores coefficients[{i}] {one.name!r}")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the rule card") -> RuleCard:
        """A card from the content of a rule.json of any schema; `where` : how errors name it."""
        if not isinstance(data, Mapping):
            raise InstructMiningError(f"{where} is no JSON object")
        if data.get("schema") not in (SCHEMA, *OLDER):
            raise InstructMiningError(f"{where} has the schema {data.get('schema')!r}; this "
                                      f"version reads {', '.join((*OLDER, SCHEMA))}")
        try:
            card = cls.model_validate(migrate(data))
        except ValidationError as error:
            raise InstructMiningError(f"{where}: {in_plain_words(error, cls)}") from error
        try:
            own = _digest(card.content() if data["schema"] == SCHEMA else data)
        except ValueError as error:  # NaN, or text that is no Unicode
            raise InstructMiningError(f"{where} holds what JSON has not: {error}") from error
        if card.content_hash not in ("", own):
            raise InstructMiningError(f"{where} was changed by hand: its content_hash is "
                                      f"{card.content_hash} but its content gives {own}; fit it "
                                      "again or remove the hash")
        return card.model_copy(update={"content_hash": own})

    @property
    def columns(self) -> list[str]:
        """The indicators of the rule, in order."""
        return [c.name for c in self.coefficients]

    @property
    def constant(self) -> float:
        """Predicted log loss of the pool's mean row; 0 where the card gives no intercept."""
        return self.intercept or 0.0

    def content(self) -> dict[str, Any]:
        """What rule.json holds, but the hash."""
        return self.model_dump(by_alias=True, exclude={"content_hash"})

    def standardise(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Indicators in the card's units: (value − mean)/sd, or as they are for a raw rule."""
        missing = [c for c in self.columns if c not in scores]
        if missing:
            raise InstructMiningError(f"the table has no column {missing}, which this rule needs: "
                                      f"score it with --indicators {','.join(self.columns)}")
        values = scores[self.columns].astype(float)
        if not self.standardisation:
            return values
        scales = pd.DataFrame({c: dict(self.standardisation[c]) for c in self.columns})
        return (values - scales.loc["mean"]) / scales.loc["sd"]

    def contributions(self, scores: pd.DataFrame) -> pd.DataFrame:
        """What each indicator adds to a row's predicted log loss; sums to predict − constant."""
        slopes = pd.Series({c.name: c.estimate for c in self.coefficients})
        return self.standardise(scores) * slopes

    def predict(self, scores: pd.DataFrame) -> pd.Series:
        """Predicted log loss of each row, lower is better; NaN where an indicator is missing."""
        total = self.contributions(scores).sum(axis=1, skipna=False) + self.constant
        return total.rename("predicted_log_loss")

    def check(self, attrs: Mapping[str, Any], *, sources: Sequence[str] | None = None,
              allow_mismatch: bool = False) -> list[str]:
        """Is the table scored as the card's fitting table was?

        attrs : `.attrs` of a score table (`indicators`: column -> version, model, revision,
        stand_in, reference); sources : names in the pool, to hold a rule that is not "within"
        off a pool of one source. Which model and reference an indicator needs is known from the
        registry; what the card leaves open (null) is not compared. Raises InstructMiningError
        naming every difference, or returns them with allow_mismatch=True ([] where all agree).
        """
        known = attrs.get("indicators") or {}
        found = [f"{one.name}: {line}" for one in self.coefficients
                 for line in self._differences(one, known.get(one.name))]
        if sources is not None and len(set(sources)) < 2 and self.kind != "within":
            found.append(f"a pool of one source may only use a 'within' rule, this card is "
                         f"{self.kind!r}")
        if found and not allow_mismatch:
            raise InstructMiningError(
                "this table was not scored as the rule's own data were:\n  - "
                + "\n  - ".join(found) + "\nScore it again with the card's models and reference, "
                "or pass --allow-mismatch to rank without any claim")
        return found

    def _differences(self, one: Coefficient, here: Mapping[str, Any] | None) -> list[str]:
        if here is None:
            return ["the table does not say how it was scored"]
        pairs, found = [("version", one.version, here.get("version"))], []
        model = next((m for m in self.models if m.role == one.model_role), None)
        if model:
            # a folder is known by the hash of its weights: it may lie elsewhere on this machine
            moved = all(str(one).startswith("sha256:")
                        for one in (model.revision, here.get("revision")))
            pairs += [] if moved else [("model", model.id, here.get("model"))]
            pairs += [("revision", model.revision, here.get("revision")),
                      ("stand-in", model.stand_in, here.get("stand_in"))]
        elif one.model_role:  # an indicator that also works without a model, and a card without one
            pairs.append(("model", "", here.get("model") or ""))
        if one.indicator.pool_relative if one.indicator else one.pool_relative:
            theirs = here.get("reference") or {}
            mine = self.knn_reference.model_dump() if self.knn_reference else {}
            pairs += [(f"reference {k}", mine[k], theirs.get(k)) for k in mine]
            if not mine:
                found.append("the card names no reference set, so that its distances can't be "
                             "told to be on the same scale")
        return found + [f"{what} is {theirs!r} in the table, {mine!r} in the card"
                        for what, mine, theirs in pairs if mine is not None and mine != theirs]

    def to_json(self) -> str:
        """rule.json: keys sorted, two spaces, the content hash inside; same rule, same text."""
        content = self.content()
        return _dump({**content, "content_hash": _digest(content)}, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write rule.json whole or not at all."""
        write_atomic(path, self.to_json())


def _indicator_of(column: str) -> Indicator | None:
    return next((i for i in INDICATORS.values() if column in i.columns), None)


def _digest(content: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in content.items() if k not in ("made_at", "content_hash")}
    return hashlib.sha256(_dump(kept).encode()).hexdigest()[:32]


def _dump(content: Mapping, indent: int | None = None) -> str:
    return json.dumps(content, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False)


def migrate(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a card of an older schema in the present one; its hash stays as it was.

    Schemas 1 and 2 told in one sentence what a rule was fitted on: it becomes the note.
    """
    if data["schema"] == SCHEMA or not isinstance(data.get("fitted_on"), str):
        return dict(data)
    held = data.get("held_out")
    tested = [one for one in held if isinstance(one, Mapping)] if isinstance(held, list) else []
    fitted_on = {"sources": [one.get("source", "") for one in tested], "note": data["fitted_on"]}
    return {**data, "schema": SCHEMA, "fitted_on": fitted_on}


def presets() -> list[str]:
    """Names of the published rules."""
    return sorted(p.stem for p in RULES.glob("*.json"))


def shipped_reference(name: str) -> Path | None:
    """The reference rows of `knn_6` that came with a published rule; None where none did."""
    path = RULES / f"{name}.npz"
    return path if path.is_file() else None


def load_rule(name_or_path: str | Path) -> RuleCard:
    """A published rule by name ("v1", "v3"), or a rule.json.

    Errors: InstructMiningError with file and field, also for a card that was changed by hand.
    """
    path = Path(name_or_path)
    if str(name_or_path) in presets():
        path = RULES / f"{name_or_path}.json"
    if not path.is_file():
        raise InstructMiningError(f"{name_or_path!s} is neither a published rule "
                                  f"({', '.join(presets())}) nor a file: name one of them or the "
                                  "path of a rule.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, too deep
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        told = f"{path} is not JSON ({where}{getattr(error, 'msg', error)})"
        raise InstructMiningError(told) from error
    return RuleCard.from_dict(data, str(path))


def make_card(fit: RuleFit, scores: pd.DataFrame, *, not_for: str, profile: str | None = None,
              set_size: int | None = None, note: str = "", new_sources: Jackknife | None = None,
              held_out: pd.DataFrame | None = None, permutation_p: float | None = None,
              base: Mapping[str, Any] | None = None, auto_size: int | None = None) -> RuleCard:
    """The card of a fitted rule.

    fit : from fit_rule (or fit_pooled); scores : the rows of the fitting pool with
    `.attrs["indicators"]`, which give models, versions, reference and the rows' ranges;
    profile, set_size, note : see FittedOn; base : {"id", "revision", "stand_in"} of the finetuned
    base where no indicator names it; auto_size : number of rows that a search found best.
    A pool of one source may only make a "within" card (RunsError).
    """
    if fit.kind != "within" and scores["source"].nunique() < 2:
        raise RunsError(f"a pool of one source may only make a 'within' card, not {fit.kind!r}")
    known = scores.attrs.get("indicators", {})
    references = [known[c]["reference"] for c in fit.columns if known.get(c, {}).get("reference")]
    scales = pd.DataFrame({"mean": fit.standardizer.mean, "sd": fit.standardizer.sd})
    return RuleCard.from_dict({
        "schema": SCHEMA,
        "kind": fit.kind,
        "intercept": fit.intercept,
        "coefficients": _coefficients(fit, scores, known, new_sources),
        "standardisation": scales.loc[list(fit.columns)].to_dict("index"),
        "held_out": [] if held_out is None else _held_out(held_out),
        "permutation_p": permutation_p,
        "models": _models(fit.columns, known, base),
        "knn_reference": ({k: references[0][k] for k in ReferenceRows.model_fields}
                          if references else None),
        "design": _design(fit),
        "uncertainty": _uncertainty(fit, new_sources),
        "fitted_on": {"sources": list(fit.sources or share_matrix(fit.runs)[1]),
                      "profile": profile, "sets": len(fit.runs), "set_size": set_size,
                      "note": note},
        "not_for": not_for,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "auto_size": auto_size,
    })


def _coefficients(fit: RuleFit, scores: pd.DataFrame, known: Mapping,
                  new: Jackknife | None) -> list[dict]:
    table = fit.table()
    raw = fit.runs[list(fit.columns)]
    rows = scores[list(fit.columns)].astype(float).quantile([0.01, 0.99])
    found = []
    for c in fit.columns:
        here, entry = known.get(c, {}), _indicator_of(c)
        found.append({
            "name": c, "label": table.at[c, "label"], "estimate": float(table.at[c, "estimate"]),
            "raw": float(table.at[c, "raw"]),
            "interval_these_sources": [float(table.at[c, b]) for b in ("low", "high")],
            "interval_new_sources": (None if new is None else
                                     [float(new.table.at[c, b]) for b in ("low", "high")]),
            "vif": _or_none(table.at[c, "vif"]),
            "range": [float(raw[c].min()), float(raw[c].max())],
            "row_range": rows[c].tolist(),
            "role": entry.role if entry and here.get("model") else None,
            "version": here.get("version"),
            "pool_relative": bool(entry and entry.pool_relative),
        })  # fmt: skip
    return found


def _models(columns: Sequence[str], known: Mapping, base: Mapping | None) -> list[dict]:
    found: dict[str, dict] = {}
    if base:
        found["base"] = {"role": "base", **base}
    for c in columns:
        here, entry = known.get(c, {}), _indicator_of(c)
        if entry and entry.role and here.get("model"):
            found[entry.role] = {"role": entry.role, "id": here["model"],
                                 "revision": here.get("revision") or None,
                                 "stand_in": bool(here.get("stand_in", False))}
            if here.get("note", "").startswith("trained here"):
                found[entry.role]["note"] = here["note"]
    return [found[role] for role in sorted(found)]


def _held_out(frame: pd.DataFrame) -> list[dict]:
    return [{"source": str(r.source), "n_sets": int(r.n_sets), "r2": _or_none(r.r2),
             "slope": _or_none(r.slope),
             "slope_interval": ([float(r.slope_low), float(r.slope_high)]
                                if np.isfinite([r.slope_low, r.slope_high]).all() else None)}
            for r in frame.itertuples()]  # fmt: skip


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _design(fit: RuleFit) -> dict[str, Any]:
    X = fit.indicators
    mean, cov = X.mean(axis=0), np.atleast_2d(np.cov(X, rowvar=False))
    gaps = X - mean
    distance = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", gaps, np.linalg.pinv(cov), gaps), 0))
    return {"mean": mean.tolist(), "covariance": cov.tolist(),
            "largest_distance": float(distance.max()), "sets": len(X)}


def _uncertainty(fit: RuleFit, new: Jackknife | None) -> dict[str, Any]:
    from .rule import hc3  # late: reading a card needs no scipy

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
