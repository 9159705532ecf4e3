"""What a rule card must hold, down to its leaves: errors name the path of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .indicators import INDICATORS, Indicator

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
