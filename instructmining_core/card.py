"""The rule card: a fitted rule as one JSON file that says what it is and where it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .card_schema import SCHEMA, CardError, is_pool_relative, role_of, validate

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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(path)


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
