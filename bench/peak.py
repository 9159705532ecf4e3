"""Seconds and peak memory of a command as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BETWEEN = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(*arguments: object, tree: Path = ROOT) -> tuple[float, float]:
    """Seconds and peak GiB of `python ARGUMENTS`, in the repository's root or another `tree`.

    A small process between starts it and waits: on Linux a process's peak begins at that of the one
    that started it, and this one may have held gigabytes. Raises RuntimeError with what it said.
    """
    command: Sequence[str] = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", _BETWEEN, *command], capture_output=True, text=True,
        cwd=tree,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)[:80]}` failed: {done.stderr[-800:]}")
    seconds, kib = json.loads(done.stdout.splitlines()[-1])
    return seconds, kib / 2**20
