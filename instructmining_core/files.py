"""Where things are, and files that are there whole or not at all, whenever a process is killed.

Every module and notebook takes its absolute paths from here, and writes what others read through
`write_atomic`, or `being_written` where it streams.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .config import InstructMiningError

OLD = 600.0  # seconds without a write after which another host's writer counts as dead


def root() -> Path:
    """The repository's root (the folder that holds `notebooks/`), or the current folder elsewhere.

    papermill runs in the shell's folder, so nothing may depend on the current folder when a
    checkout is there; an installed package has no checkout and writes below the current folder.
    `INSTRUCTMINING_HOME` overrides both.
    """
    return _home() or Path.cwd()


def _home() -> Path | None:
    """The folder named by the environment, else the checkout, else None."""
    named = os.environ.get("INSTRUCTMINING_HOME")
    if named:
        return Path(named).resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else None


def results(profile: str) -> Path:
    """Everything a run of `profile` writes (git-ignored)."""
    return root() / "results" / profile


def evidence(profile: str) -> Path:
    """The committed numbers of a published run of `profile`."""
    return root() / "evidence" / profile


def cache() -> Path:
    """What can be computed again and is shared by profiles: corpus, stand-ins, conversions.

    `results/cache` of a checkout; for an installed package the user's cache folder.
    """
    home = _home()
    if home is not None:
        return home / "results" / "cache"
    import platformdirs

    return platformdirs.user_cache_path("instructmining", appauthor=False)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes as they lie on the disk (a gzip file is not unpacked), as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_overwrite(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise InstructMiningError where `out` is one of the files that are read to make it."""
    target = Path(out).resolve()  # its folder may not be there yet: `new/../data.parquet`
    for one in inputs:
        if target.exists() and Path(one).exists() and Path(one).samefile(target):
            raise InstructMiningError(
                f"{out} is read for this, and would be overwritten; name another file with -o"
            )


@contextmanager
def being_written(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` at the end, and goes after an error.

    The folder is made where it is absent. What was written is on the disk before the rename, for a
    power cut. The name tells the writer, so that `clear_leftovers` knows those of dead ones.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all; text as UTF-8, its line ends as they are."""
    with being_written(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object by `write_atomic`; NaN and infinities, which JSON lacks, as null."""
    text = json.dumps(content, default=lambda array: array.tolist())  # NumPy's
    write_atomic(path, json.dumps(json.loads(text, parse_constant=lambda name: None)))


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Remove what writers left that died, gone from this host or silent for long on another.

    name : of the one file whose leftovers go; "" for every file's
    """
    import psutil

    for path in folder.glob(f".{glob.escape(name) or '*'}.*.tmp"):
        rest, _, host = path.name.removesuffix(".tmp").rpartition("@")
        pid = rest.rpartition(".")[2]
        here = host == socket.gethostname() and pid.isdigit()
        with suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > OLD
            if (not psutil.pid_exists(int(pid))) if here else old:
                path.unlink()
