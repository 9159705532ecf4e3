"""What a run was made with: versions, commit, hardware. Nothing of the user: no names, no paths."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("instructmining", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")

_PATH = re.compile(r"(?:[A-Za-z]:\\|(?<![\w.:/])/)(?:[^\s'\",:;()<>]+[/\\])+")


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that compute, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """This checkout's commit, with "+changed" where files of the package differ; None elsewhere."""
    here = Path(__file__).resolve().parent.parent
    head = _git(here, "rev-parse", "HEAD")
    if head is None or _git(here, "ls-files", "--error-unmatch", "finetuning/run.py") is None:
        return None
    return head + ("+changed" if _git(here, "status", "--porcelain", "--", ".") else "")


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores in use, memory in bytes, and the GPU's name where one computes."""
    import psutil
    import torch

    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if str(device).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def without_paths(text: str) -> str:
    """`text` with each absolute path cut to its last part: a record names no user's folders."""
    return _PATH.sub("", text)


@functools.cache
def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
