"""Stand-in models of the profile `smoke`: tiny, made on the spot, kept in the cache.

They take the place of a language model, OASST's reward model and UniEval where every line of the
study is only to be tried, and go through the same loading code. Each folder holds `STAND_IN.json`,
so every output says that it came from a stand-in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from instructmining_core import files
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import PLAIN
from instructmining_core.models.hub import MARKER

from .corpus import Corpus, build_corpus

# Part of the folder's name: the number is raised when code changes what is built, and the base
# learns conversations in the plain template.
VERSION = f"2, {PLAIN}"
PARTS = ("base", "base_small", "reward", "unieval")
PREFIX = "standin:"


def build_standins(refs: Iterable[ModelRef]) -> Path | None:
    """The folder that holds the stand-ins among `refs`, built in seconds if they are not there.

    None where `refs` names real models only; InstructMiningError for a stand-in that does not
    exist. Two processes that ask at once build once: the second waits.
    """
    parts = dict.fromkeys(r.id.removeprefix(PREFIX) for r in refs if r.id.startswith(PREFIX))
    if not parts:
        return None
    if unknown := [part for part in parts if part not in PARTS]:
        raise InstructMiningError(f"Stand-in {unknown[0]!r} is unknown; known: {', '.join(PARTS)}.")
    corpus = build_corpus("smoke")
    key = hashlib.sha256(f"{VERSION} {corpus.key}".encode()).hexdigest()[:16]
    root = files.cache() / "standins" / key
    root.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with FileLock(str(root / f"{part}.lock")):
            if not (root / part / MARKER).exists():
                write_standin(root, part, corpus)
    return root


def write_standin(root: Path, part: str, corpus: Corpus) -> None:
    """Make one of PARTS into `root/<part>/`, Hugging Face layout, whole or not at all."""
    from .tiny_models import build_tiny  # torch and transformers

    unfinished = root / f".{part}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model, tokenizer = build_tiny(part, corpus)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / MARKER).write_text(json.dumps({"stand_in": part, "corpus": corpus.key}))
    shutil.rmtree(root / part, ignore_errors=True)
    unfinished.replace(root / part)
