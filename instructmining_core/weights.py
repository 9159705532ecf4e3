"""Weights that are only tensors: safetensors, or an older file converted once into the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from . import paths

MODULES = "modules.json"  # sentence-transformers: which subfolders the model is made of
_SMALL = (".json", ".txt", ".model", ".jinja")


class HubError(RuntimeError):
    """A model that cannot be found, fetched or loaded safely."""


def load_weights_safely(folder: Path) -> Path:
    """A folder with the same model whose weights are safetensors.

    `folder` itself where it has them; else a converted copy in the cache, made once under a file
    lock through `torch.load(weights_only=True)`, which refuses anything but tensors.
    Raises HubError where there are no weights, or they hold more than tensors.
    """
    if all(file.suffix == ".safetensors" for file in weight_files(folder)):
        return folder
    from filelock import FileLock

    # "-2": copies made before modules were known lack their subfolders.
    target = paths.cache() / "converted-2" / weights_sha256(folder)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "CONVERTED.json").exists():
            _convert(folder, target)
    return target


def weight_files(folder: Path) -> list[Path]:
    """A model's weight files: its own, and those of its sentence-transformers modules.

    Safetensors of a folder where there are any, else its pytorch_model*.bin. Raises HubError where
    there is neither in any of them.
    """
    files = [file for name in module_folders(folder) for file in _weights_of(folder / name)]
    if not files:
        raise HubError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).")
    return files


def module_folders(folder: Path) -> list[str]:
    """Where the parts of a model lie in its folder: "" for itself, then what modules.json names."""
    listed = folder / MODULES
    named = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    return list(dict.fromkeys(["", *(_inside(str(one.get("path", ""))) for one in named)]))


def _inside(path: str) -> str:
    """A module's path, if it stays inside its model's folder; HubError if not."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise HubError(f"{MODULES} names {path!r}, which is outside the model's folder.")
    return path


def weights_sha256(folder: Path) -> str:
    """sha256 over a model's weight files in order (one file: that file's own sha256)."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _convert(folder: Path, target: Path) -> None:
    for name in module_folders(folder):
        if not (folder / name).is_dir():  # a module without settings of its own
            continue
        (target / name).mkdir(parents=True, exist_ok=True)
        files = _weights_of(folder / name)
        old = [file for file in files if file.suffix == ".bin"]
        if old:
            _as_safetensors(old, target / name)
        kept = [
            file for file in (folder / name).iterdir()
            if file.is_file() and file.suffix in _SMALL and not (old and "index" in file.name)
        ]  # fmt: skip
        for file in [*kept, *(file for file in files if file not in old)]:
            shutil.copy2(file, target / name / file.name)
    made_of = [str(file.relative_to(folder)) for file in weight_files(folder)]
    (target / "CONVERTED.json").write_text(json.dumps({"from": made_of}))


def _as_safetensors(files: Sequence[Path], target: Path) -> None:
    import torch
    from safetensors.torch import save_file

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
