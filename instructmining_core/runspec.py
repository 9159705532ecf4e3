"""The specification of one run, and its hash: the run's name.

Two runs that differ in anything that can change a number have different names; where a model's
folder lies, or what a figure will call the run, changes no number and is not hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .profiles import FinetuneConfig, ModelRef
from .templates import TEMPLATE_VERSION, Encoded

if TYPE_CHECKING:
    from .lm import LM


RECORD = 1  # version of a record's layout


class SpecError(ValueError):
    """A specification that names no run."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change the numbers of one run, and a label that cannot.

    purpose : what the run is for ("fit", "verify", ...); part of the hash
    base : the resolved model: id, revision (commit or content hash), dtype it is computed in.
        A folder is named by its last part, so that the hash does not hang on where it lies.
    finetune : how the set becomes a model
    row_hashes : the training rows (`records.row_hash`), in the set's order
    init_seed, order_seed : of the adapter's first values; of the rows' order
    evals : name of an evaluation set -> hash of its rows (`hash_rows`)
    template : `templates.TEMPLATE_VERSION`
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
    label: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.row_hashes:
            raise SpecError(f"A run for {self.purpose!r} has no training rows.")
        object.__setattr__(self, "row_hashes", tuple(self.row_hashes))
        object.__setattr__(self, "evals", dict(sorted(self.evals.items())))
        if Path(self.base.id).is_absolute():
            base = dataclasses.replace(self.base, id=Path(self.base.id).name)
            object.__setattr__(self, "base", base)

    @classmethod
    def of(
        cls,
        purpose: str,
        lm: LM,
        finetune: FinetuneConfig,
        row_hashes: Sequence[str],
        evals: Mapping[str, Sequence[Encoded]],
        *,
        init_seed: int = 0,
        order_seed: int = 0,
        label: Mapping[str, Any] | None = None,
    ) -> RunSpec:
        """The specification of a run of a loaded model on encoded evaluation sets."""
        dtype = str(lm.dtype).removeprefix("torch.")
        return cls(
            purpose, ModelRef(lm.resolved.id, lm.resolved.revision, dtype), finetune,
            tuple(row_hashes), init_seed, order_seed,
            {name: hash_encoded(rows) for name, rows in evals.items()}, TEMPLATE_VERSION,
            dict(label or {}),
        )

    def content(self) -> dict[str, Any]:
        """What is hashed, as plain JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["label"]
        fields["base"] = dataclasses.asdict(self.base)
        fields["finetune"] = dataclasses.asdict(self.finetune)
        return json.loads(json.dumps(fields, default=plain))

    @property
    def sha256(self) -> str:
        """Hash of the whole specification."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """First 16 hex digits of the specification's hash."""
        return self.sha256[:16]

    def head(self) -> dict[str, Any]:
        """What every record of the run begins with, however the run ended."""
        return {
            "record": RECORD, "run_id": self.run_id, "spec": self.content(),
            "spec_sha256": self.sha256, "data_sha256": hash_rows(self.row_hashes),
            "label": dict(self.label), "rows": len(self.row_hashes),
        }


def spec_from(content: Mapping[str, Any], label: Mapping[str, Any] | None = None) -> RunSpec:
    """The specification of a record's `spec`: the inverse of `RunSpec.content`."""
    finetune = dict(content["finetune"])
    for name in ("betas", "target_modules"):
        if isinstance(finetune[name], list):
            finetune[name] = tuple(finetune[name])
    fields = dict(content)
    fields["base"] = ModelRef(**content["base"])
    fields["finetune"] = FinetuneConfig(**finetune)
    return RunSpec(**fields, label=dict(label or {}))


def hash_rows(hashes: Sequence[str]) -> str:
    """One hash for an ordered list of row hashes, 64 hex digits."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def hash_encoded(rows: Sequence[Encoded]) -> str:
    """One hash for encoded rows in their order: ids and targets, 64 hex digits."""
    return hash_rows([f"{row.ids}{[int(t) for t in row.targets]}" for row in rows])


def plain(value: Any) -> Any:
    """What json cannot write, as what it can: NumPy values and sets as lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")
