"""Where things are. Every module and notebook takes its absolute paths from here."""

from __future__ import annotations

import os
from pathlib import Path


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
