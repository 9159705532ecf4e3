"""Who is at work on a run: a claim file that its living owner keeps touching.

On one machine a dead owner is seen at once, by its process id and start time. A process of another
host (a container started again has a new host name too) cannot be looked at, so there the file's
age decides: an owner touches its claims every few seconds, and one not touched for minutes is free.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from .atomic import write_json

BEAT = 15.0  # seconds between an owner's touches
EXPIRES = 180.0  # seconds without a touch after which another host's claim is free


class Holders:
    """The `<run_id>.claim` files of a folder, and the heart of those that this process owns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[str] = set()
        self._guard, self._heart = threading.Lock(), None

    @contextmanager
    def lock(self):
        """Be the only process that looks at claims and changes them."""
        with FileLock(self.folder / ".claims.lock").acquire(poll_interval=0.005):
            yield

    def read(self, run_id: str) -> dict[str, Any] | None:
        """pid, host, since (UTC) and started (of the process) of a claim; None if there is none."""
        return read_holder(self.path(run_id))

    def take(self, run_id: str) -> None:
        """Claim for this process, and keep the claim warm until `drop`. Call it under `lock`."""
        write_json(self.path(run_id), this_process())
        with self._guard:
            self._held.add(run_id)
            if self._heart is None or not self._heart.is_alive():
                self._heart = threading.Thread(target=self._beat, daemon=True)
                self._heart.start()

    def drop(self, run_id: str) -> None:
        """Remove a claim, whoever's it is. Call it under `lock`, having looked."""
        with self._guard:
            self._held.discard(run_id)
        self.path(run_id).unlink(missing_ok=True)

    def mine(self, run_id: str) -> bool:
        """Whether the claim is this process's: another may have taken it for dead."""
        holder = self.read(run_id)
        return holder is not None and (holder["pid"], holder["host"]) == (
            os.getpid(), socket.gethostname()) and _process_lives(holder)

    def alive(self, run_id: str) -> bool:
        """Whether a living process has claimed the run."""
        holder = self.read(run_id)
        if holder is None:
            return False
        if holder["host"] == socket.gethostname():
            return _process_lives(holder)
        try:
            return self._clock() - self.path(run_id).stat().st_mtime <= EXPIRES
        except FileNotFoundError:
            return False

    def path(self, run_id: str) -> Path:
        """Where a run's claim lies."""
        return self.folder / f"{run_id}.claim"

    def _clock(self) -> float:
        """Now, by the clock that stamps this folder's files: on a shared folder not this host's."""
        path = self.folder / ".clock"
        path.touch()
        return path.stat().st_mtime

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._guard:
                held = list(self._held)
                if not held:
                    self._heart = None
                    return
            for run_id in held:
                with suppress(FileNotFoundError):
                    if self.mine(run_id):
                        os.utime(self.path(run_id))


def this_process() -> dict[str, Any]:
    """What a claim says of its owner."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "started": psutil.Process().create_time(),
    }


def read_holder(path: Path) -> dict[str, Any] | None:
    """The owner that a file names, None where there is no such file or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def tell(holder: Mapping[str, Any] | None) -> str:
    """A holder in words."""
    if holder is None:
        return "a process unknown"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _process_lives(holder: Mapping[str, Any]) -> bool:
    """Its start time tells a process from a later one with the same id."""
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["started"]) < 2 and (
            process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False
