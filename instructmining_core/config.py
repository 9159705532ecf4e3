"""The settings that the core reads: which model, and how a set of rows finetunes it."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = (
    "len_in", "len_out", "reward", "ppl", "mtld", "knn_6",
    "naturalness", "coherence", "understandability",
)  # fmt: skip

REFERENCE_ROWS = 2048  # default size of the sample that neighbours are looked for in


class InstructMiningError(ValueError):
    """What the project raises: the message says what is wrong, where, and what to do.

    A subclass is there only where somebody catches it.
    """


class ProfileError(InstructMiningError):
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
