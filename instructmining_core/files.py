"""JSON files that are there whole or not at all, whenever the process is killed.

Where things are. Every module and notebook takes its absolute paths from here.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil


def root() -> Path:
    """The repository's root (the folder that holds `notebooks/`), or the current folder elsewhere.

    papermill runs in the shell's folder, so nothing may depend on the current folder when a
    checkout is there; an installed package has no checkout and writes below the current folder.
    `INSTRUCTMINING_HOME` overrides both.
    """
    named = os.environ.get("INSTRUCTMINING_HOME")
    if named:
        return Path(named).resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def results(profile: str) -> Path:
    """Everything a run of `profile` writes (git-ignored)."""
    return root() / "results" / profile


def evidence(profile: str) -> Path:
    """The committed numbers of a published run of `profile`."""
    return root() / "evidence" / profile


def cache() -> Path:
    """What can be computed again and is shared by profiles: corpus, stand-ins, conversions."""
    return root() / "results" / "cache"


def standins(key: str) -> Path:
    """The folder of stand-in models built under `key`: `base/`, `reward/`, `unieval/`."""
    return cache() / "standins" / key


def ledger(profile: str) -> Path:
    """One JSON a finetuning run."""
    return results(profile) / "ledger"


OLD = 600.0  # seconds: no write takes so long


def write_json(
    path: Path,
    content: Mapping[str, Any],
    *,
    default: Callable[[Any], Any] | None = None,
    durable: bool = True,
) -> None:
    """Write by a temporary file beside it and a rename. NaN and infinities become null.

    default : for `json.dumps`; durable : also on the disk before the rename, for a power cut
    """
    text = json.dumps(_finite(content), allow_nan=False, default=default)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that died: gone from this host, or long ago."""
    for path in folder.glob(".*.tmp"):
        rest, _, host = path.name.removesuffix(".tmp").rpartition("@")
        pid = rest.rpartition(".")[2]
        here = host == socket.gethostname() and pid.isdigit()
        with suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > OLD
            if old or (here and not psutil.pid_exists(int(pid))):
                path.unlink()


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has neither."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value
