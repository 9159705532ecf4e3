"""The specification of one run, and its hash: the run's name. Loads no torch.

Two runs that differ in anything that can change a number have different names; where a model's
folder lies, or what a figure will call the run, is not hashed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import FinetuneConfig, InstructMiningError, ModelRef
from ..data.choices import EncodedChoices
from ..data.tokenization import Encoded, template_version

if TYPE_CHECKING:
    from ..models.causal_lm import LM

Record = dict[str, Any]

CHOICES = "choices/"  # begins the name of a multiple-choice task among evaluation sets
RECORD = 1  # version of a record's layout
ALWAYS_HASHED = frozenset({  # settings of the first records; a later one at its default is left out
    "method", "rank", "alpha", "dropout", "target_modules", "learning_rate", "epochs", "batch_size",
    "schedule", "warmup_share", "betas", "weight_decay", "clip", "max_tokens", "micro_tokens",
})  # fmt: skip


class EvalSets(dict[str, Sequence[Encoded]]):
    """Evaluation sets by name, encoded; not changed any more, so hashed once, whoever asks.

    choices : multiple-choice tasks by name; in hashes and specifications they are `CHOICES` + name
    """

    def __init__(self, *sets, choices: Mapping[str, EncodedChoices] | None = None, **named) -> None:
        super().__init__(*sets, **named)
        self.choices = dict(choices or {})

    def rows(self) -> list[Encoded]:
        """Every row that an evaluation computes."""
        parts = [*self.values(), *(part.rows for part in self.choices.values())]
        return [row for part in parts for row in part]

    @functools.cached_property
    def of_base(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(A base's revision, dtype) -> its values before any finetuning, filled by `run`."""
        return {}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """One hash for the rows of each set in their order: ids and targets, 64 hex digits."""
        return {
            name: hash_rows([f"{row.ids}{[int(t) for t in row.targets]}" for row in rows])
            for name, rows in self.items()
        } | {CHOICES + name: hash_rows(part.lines()) for name, part in self.choices.items()}


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change the numbers of one run, and a label that cannot.

    purpose : what the run is for ("fit", "verify", ...); part of the hash
    base : the resolved model: id, revision (commit or content hash), dtype it is computed in.
        A folder is named by its last part, so that the hash does not hang on where it lies.
    finetune : how the set becomes a model
    row_hashes : the training rows (`records.row_hash`), in the set's order
    init_seed, order_seed : of the adapter's first values; of the rows' order
    evals : name of an evaluation set -> hash of its rows (`EvalSets.hashes`)
    template : version of the template that the rows are written in (`template_version`)
    label : set_id, arm, shares, tilt, source, anchor, ...: recorded as columns, not hashed
    """

    purpose: str
    base: ModelRef
    finetune: FinetuneConfig
    row_hashes: tuple[str, ...]
    init_seed: int
    order_seed: int
    evals: Mapping[str, str]
    template: str
    label: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.row_hashes:
            raise InstructMiningError(f"A run for {self.purpose!r} has no training rows.")
        object.__setattr__(self, "evals", dict(sorted(self.evals.items())))
        if Path(self.base.id).is_absolute():
            base = dataclasses.replace(self.base, id=Path(self.base.id).name)
            object.__setattr__(self, "base", base)

    @classmethod
    def of(
        cls, purpose: str, lm: LM, finetune: FinetuneConfig, row_hashes: Sequence[str],
        evals: EvalSets, *, init_seed: int = 0, order_seed: int = 0,
        label: Mapping[str, Any] | None = None,
    ) -> RunSpec:  # fmt: skip
        """The specification of a run of a loaded model on encoded evaluation sets."""
        dtype = str(lm.dtype).removeprefix("torch.")
        base = ModelRef(lm.resolved.id, lm.resolved.revision, dtype)
        template = template_version(lm.tokenizer, finetune.template)
        return cls(purpose, base, finetune, tuple(row_hashes), init_seed, order_seed, evals.hashes,
                   template, dict(label or {}))

    @classmethod
    def from_content(cls, content: Mapping[str, Any], label: Mapping[str, Any]) -> RunSpec:
        """The specification of a record's `spec`: the inverse of `content`."""
        parts = {"base": ModelRef(**content["base"]), "row_hashes": tuple(content["row_hashes"]),
                 "finetune": FinetuneConfig(**content["finetune"])}
        return cls(**{**content, **parts}, label=dict(label))

    def content(self) -> Record:
        """What is hashed, as plain JSON values."""
        fields, defaults = dataclasses.asdict(self), dataclasses.asdict(FinetuneConfig())
        del fields["label"]
        fields["finetune"] = {
            name: value for name, value in fields["finetune"].items()
            if name in ALWAYS_HASHED or value != defaults[name]
        }
        return json.loads(json.dumps(fields))

    @property
    def sha256(self) -> str:
        """Hash of the whole specification."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the specification's hash."""
        return self.sha256[:16]

    def head(self) -> Record:
        """What every record of the run begins with, however the run ended."""
        return {
            "record": RECORD, "run_id": self.run_id, "spec": self.content(),
            "spec_sha256": self.sha256, "data_sha256": hash_rows(self.row_hashes),
            "label": dict(self.label), "rows": len(self.row_hashes),
        }  # fmt: skip


def hash_rows(hashes: Sequence[str]) -> str:
    """One hash for an ordered list of row hashes, 64 hex digits."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def now() -> str:
    """UTC to the second, as records tell it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
