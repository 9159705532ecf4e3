"""A GGUF file as an ordinary model folder: unpacked once into the cache, in float32.

llama.cpp's format holds weights, configuration, tokenizer and chat template in one file, mostly
with weights of four or five bits. transformers reads it; what is saved here is what it read.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from .. import files
from ..config import InstructMiningError

UNPACKED = "GGUF.json"  # what a folder was unpacked from
_LAYOUT = 1  # of the folders made here; raise it to have them made anew


def unpacked(file: Path, revision: str) -> Path:
    """The folder with the model of a GGUF file: safetensors, configuration, tokenizer, template.

    revision : "sha256:<16 hex>" of the file, under which the cache keeps the folder. It is made
        beside its place and renamed, under a lock: there whole or not at all.
    Raises InstructMiningError for a file that is broken or cut, or of a kind that transformers
    does not read.
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
    try:
        quantisation = _quantisation(file)
        model, tokenizer = _read(file)
    except Exception as error:  # each reader has its own for bytes that are not what they should be
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InstructMiningError(
            f"{file} is broken, cut, or not a GGUF file that transformers can read: {why}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {"file": file.name, "quantisation": quantisation}
    (folder / UNPACKED).write_text(json.dumps(note), encoding="utf-8")


def _quantisation(file: Path) -> str:
    """The type that most weights have, such as "Q4_1"; "F32" where all are whole."""
    from gguf import GGUFReader

    weights: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return weights.most_common(1)[0][0]


def _read(file: Path):
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
