"""What a run is: a YAML file, read into the settings and checked field by field.

`smoke`, `laptop`, `thorough`, `colab`, `paper` and `replication` lie in `presets/`; any other YAML
file is a profile too, and may start from one of them with `extends: laptop`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from .settings import (
    INDICATORS,
    DataConfig,
    DesignConfig,
    FinetuneConfig,
    InferenceConfig,
    JudgeConfig,
    ModelRef,
    ModelsConfig,
    Profile,
    ProfileError,
    RobustnessConfig,
    SelectionConfig,
    SizeConfig,
    SourceConfig,
)

__all__ = [
    "INDICATORS",
    "DataConfig",
    "DesignConfig",
    "FinetuneConfig",
    "InferenceConfig",
    "JudgeConfig",
    "ModelRef",
    "ModelsConfig",
    "Profile",
    "ProfileError",
    "RobustnessConfig",
    "SelectionConfig",
    "SizeConfig",
    "SourceConfig",
    "load_profile",
    "preset_names",
    "profile_path",
]

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def profile_path(name_or_yaml: str | Path) -> Path:
    """The YAML file behind a preset's name or a path. Raises ProfileError if there is none."""
    path = Path(name_or_yaml)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ProfileError(f"There is no profile file {path} (looked from {Path.cwd()}).")
        return path
    preset = PRESETS / f"{name_or_yaml}.yaml"
    if not preset.is_file():
        raise ProfileError(
            f"There is no profile {str(name_or_yaml)!r}; give a .yaml file or one of "
            f"{', '.join(preset_names())}."
        )
    return preset


def load_profile(name_or_yaml: str | Path) -> Profile:
    """Read a profile by preset name or YAML path. Raises ProfileError naming file and field."""
    path = profile_path(name_or_yaml)
    values = _read(path)
    values.setdefault("name", path.stem)
    try:
        return _build(Profile, values, "")
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: a profile is a mapping, not a {type(values).__name__}.")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    inherited = _read(beside if beside.is_file() else profile_path(parent))
    inherited.pop("name", None)
    return _merge(inherited, values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else (
            value
        )
    return merged


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ProfileError(f"{where or 'profile'} must be a mapping, not {values!r}.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ProfileError(
            f"{where or 'profile'} has no field {unknown[0]!r}; its fields: {', '.join(hints)}."
        )
    inside = {
        name: _convert(hints[name], value, f"{where}.{name}".lstrip("."))
        for name, value in values.items()
    }
    try:
        return kind(**inside)
    except TypeError as error:
        raise ProfileError(f"{where or 'profile'}: {error}.") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        choices = [part for part in parts if part is not type(None)]
        if len(choices) > 1:
            is_list = isinstance(value, list)
            choices = [c for c in choices if (typing.get_origin(c) is tuple) == is_list]
        return _convert(choices[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ProfileError(f"{where} must be a list, not {value!r}.")
        return tuple(_convert(parts[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and hint in (ModelRef, SourceConfig):
            value = {"id": value} if hint is ModelRef else {"name": _stem(value), "where": value}
        return _build(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        raise ProfileError(f"{where} is the text {value!r}; YAML wants 2.0e-5, with the point.")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ProfileError(f"{where} must be {hint.__name__}, not {value!r}.")
    return value


def _stem(where: str) -> str:
    return Path(where).name.split(".")[0]
