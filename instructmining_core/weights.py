"""Weights that are only tensors: safetensors, or an older file converted once into the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import paths


class HubError(RuntimeError):
    """A model that cannot be found, fetched or loaded safely."""


def load_weights_safely(folder: Path) -> Path:
    """A folder with the same model whose weights are safetensors.

    `folder` itself where it has them; else a converted copy in the cache, made once under a file
    lock through `torch.load(weights_only=True)`, which refuses anything but tensors.
    Raises HubError where there are no weights, or they hold more than tensors.
    """
    if any(folder.glob("*.safetensors")):
        return folder
    old = sorted(folder.glob("pytorch_model*.bin"))
    if not old:
        raise HubError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin.")
    from filelock import FileLock

    target = paths.cache() / "converted" / weights_sha256(folder)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "CONVERTED.json").exists():
            _convert(folder, old, target)
    return target


def weights_sha256(folder: Path) -> str:
    """sha256 over a folder's weight files in name order (one file: that file's own sha256)."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise HubError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _convert(folder: Path, files: Sequence[Path], target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, file in enumerate(files):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise HubError(f"{file} holds more than tensors, and is not loaded: {error}") from error
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        # Tied weights share storage, which safetensors refuses: each name gets its own copy.
        tensors = {k: v.clone().contiguous() for k, v in state.items()}
        save_file(tensors, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    if len(files) == 1:
        (target / name).rename(target / "model.safetensors")
    else:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (target / "model.safetensors.index.json").write_text(text)
    for file in folder.iterdir():
        kept = file.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in file.name
        if file.is_file() and kept:
            shutil.copy2(file, target / file.name)
    (target / "CONVERTED.json").write_text(json.dumps({"from": [f.name for f in files]}))
