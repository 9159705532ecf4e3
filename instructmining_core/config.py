"""The settings that the core reads: which model, and how a set of rows finetunes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

COLUMNS = (
    "len_in", "len_out", "reward", "log_ppl", "mtld", "knn_6",
    "naturalness", "coherence", "understandability",
)  # fmt: skip

KNOWN_FIELDS = ConfigDict(extra="forbid")
KINDS = {  # what pydantic's kinds are called in an error
    "int": "a whole number", "float": "a number", "string": "text", "bool": "true or false",
    "tuple": "a list", "list": "a list", "dict": "a mapping", "dataclass": "a mapping",
    "model": "a mapping",
}  # fmt: skip
REFERENCE_ROWS = 2048  # default size of the sample that neighbours are looked for in


class InstructMiningError(ValueError):
    """What the project raises: the message says what is wrong, where, and what to do.

    A subclass is there only where somebody catches it.
    """


class ProfileError(InstructMiningError):
    """A profile that cannot be found, read or believed."""


def in_plain_words(error: ValidationError, kind: type) -> str:
    """The first error of a pydantic model or dataclass `kind` with its field, in plain words.

    For example "design.size must be a whole number, not 'x'"; an unknown field names the known.
    """
    first = error.errors()[0]
    where, section = "", kind
    for part in first["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part in _fields(section):  # else unknown, or the branch of a union
            where = f"{where}.{part}".lstrip(".")
            section = _section(_fields(section)[part].annotation)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return (f"{where or kind.__name__.lower()} has no field {first['loc'][-1]!r}; "
                f"its fields: {', '.join(_fields(section))}.")  # fmt: skip
    return _breach(first, where)


def _breach(error: Mapping[str, Any], where: str) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return f"{where} must be given."
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"{where} is {value!r}; it must be one of {allowed}."
    if kind in ("greater_than", "greater_than_equal"):
        bound = f"more than {context['gt']}" if "gt" in context else f">= {context['ge']}"
        return f"{where} is {value}; it must be {bound}."
    if kind == "float_type" and isinstance(value, str):
        return f"{where} is the text {value!r}; it must be a number (YAML: 2.0e-5, with the point)."
    wanted = KINDS.get(kind.split("_")[0])
    return f"{where} must be {wanted}, not {value!r}." if wanted else f"{where}: {error['msg']}."


def _fields(kind: Any) -> Mapping[str, Any]:
    return getattr(kind, "__pydantic_fields__", {})


def _section(annotation: Any) -> Any:
    """The model inside an annotation such as `tuple[SourceConfig, ...]`, else None."""
    if _fields(annotation):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


@dataclass(frozen=True, config=KNOWN_FIELDS)
class ModelRef:
    """Which model to load, not yet resolved to a commit."""

    id: str  # hub name, folder, .gguf file, "package:NAME", "head:NAME", "standin:NAME"
    revision: str = "main"  # branch, tag or commit; resolved and recorded at run time
    dtype: str = "auto"  # "auto": bfloat16 where the processor or GPU has it, else float32


@dataclass(frozen=True, config=KNOWN_FIELDS)
class FinetuneConfig:
    """How a set becomes a model. The paper: full, 3 epochs, batch 128, Adam, cosine 2e-5 -> 0."""

    method: Literal["lora", "dora", "rslora", "full"] = "lora"
    rank: PositiveInt = 8  # of the adapter
    alpha: float = 16.0  # adapter scale = alpha / rank
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    layers: NonNegativeInt = 0  # adapters on so many of the topmost decoder layers; 0 = all
    learning_rate: float = 2e-3  # peak
    epochs: PositiveInt = 3
    batch_size: PositiveInt = 16  # rows of one optimisation step
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # to zero at the last step
    warmup_share: float = 0.03  # of all steps
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 = off
    max_tokens: PositiveInt = 256  # tokens of one row, prompt and response
    micro_tokens: PositiveInt = 8192  # padded tokens of one micro-batch
    template: Literal["auto", "chat", "plain"] = "auto"  # "auto": the tokenizer's own, else plain

    def __post_init__(self) -> None:
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers and (pattern or self.method == "full"):
            raise ProfileError(
                "finetune.layers goes with an adapter on \"all-linear\" or on a list of names.")

    def steps(self, rows: int) -> int:
        """Optimisation steps of a set of `rows` rows."""
        return self.epochs * -(-rows // self.batch_size)
