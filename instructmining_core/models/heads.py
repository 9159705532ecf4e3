"""Head files: small linear heads on a frozen base, in place of models that no registry carries.

One safetensors file a head, with its card (JSON) beside it; both are shipped with the package.
`pooled.py` computes what a head reads. Reading a file loads no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..config import InstructMiningError
from ..files import write_atomic

HEAD_PREFIX = "head:"
FOLDER = Path(__file__).resolve().parent.parent / "heads"
_NAMES = ("weights", "bias", "mean", "scale", "rows")


@dataclass(frozen=True)
class HeadFile:
    """A linear head: `link((features - mean) / scale @ weights + bias)`.

    weights : shape (features, columns); bias : (columns,); mean, scale : (features,); float32
    rows : uint64, sorted; the first 16 hex digits of the row hashes that it was trained on
    columns : of the scores; layers : whose outputs are pooled, counted from 1
    pooling : "mean" over the answer's tokens
    readings : further features, of `pooled.READINGS`; `log_tokens` among them takes length out
    link : "identity" or "sigmoid"; base, base_revision : of the model that it reads, as in
        `hub.resolve`; dtype : of that model in training
    """

    weights: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    rows: np.ndarray
    columns: tuple[str, ...]
    layers: tuple[int, ...]
    pooling: str
    readings: tuple[str, ...]
    link: str
    base: str
    base_revision: str
    dtype: str

    @property
    def note(self) -> str:
        """What a reader of the scores must know."""
        return (f"trained here: a linear head on pooled states of {self.base}; another scale than "
                "the paper's model's, so published coefficients do not carry over")

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Scores of rows; features : shape (n, features); returns shape (n, columns), float64."""
        from scipy.special import expit  # late: rows without models need no scipy

        scaled = (features.astype(np.float64) - self.mean) / self.scale
        scores = scaled @ self.weights.astype(np.float64) + self.bias
        return expit(scores) if self.link == "sigmoid" else scores

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        told = {name: value for name, value in vars(self).items() if name not in _NAMES}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _NAMES}
        write_atomic(path, save(tensors, {"head": json.dumps(told)}))


def head_path(name: str) -> Path:
    """The file of `head:NAME`; NAME may be the path of a file elsewhere."""
    name = name.removeprefix(HEAD_PREFIX)
    path = Path(name) if name.endswith(".safetensors") else FOLDER / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(HEAD_PREFIX + file.stem for file in sorted(FOLDER.glob("*.safetensors")))
        raise InstructMiningError(f"there is no head {name!r}; known: {known}")
    return path


def read_head(path: Path) -> HeadFile:
    """Read a head file. Raises InstructMiningError, in one sentence, for a broken one."""
    try:
        with safe_open(path, framework="np") as file:
            told = json.loads((file.metadata() or {})["head"])
            tensors = {name: file.get_tensor(name) for name in _NAMES}
        told = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
        head = HeadFile(**tensors, **told)
        features, columns = head.weights.shape
        if head.mean.shape != (features,) or head.bias.shape != (columns,) \
                or head.scale.shape != (features,) or len(head.columns) != columns:
            raise ValueError("its parts do not fit each other")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise InstructMiningError(f"{path} is broken or no head file: {why}") from error
    return head


def head_card(name: str) -> dict[str, Any]:
    """What a head was trained on and what it is worth, as written beside its file."""
    return json.loads(head_path(name).with_suffix(".json").read_text(encoding="utf-8"))


@cache
def head_rows() -> frozenset[str]:
    """First 16 hex digits of the hashes of all rows that the shipped heads were trained on."""
    found = [read_head(path).rows for path in sorted(FOLDER.glob("*.safetensors"))]
    return frozenset(f"{row:016x}" for rows in found for row in rows.tolist())
