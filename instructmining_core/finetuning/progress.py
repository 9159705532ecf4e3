"""How far a sweep is, in a small file of its ledger; and a bar in the terminal from that file.

The sweep runs in a notebook's kernel, whose output papermill keeps for the page. Who waits at the
terminal sees this bar instead.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import write_json

FILE = ".sweep.progress"
EVERY = 1.0  # seconds between two writes, and between two looks


class ProgressFile:
    """The writing side, at most once a second.

    A file holds sweep (when it began, its name), done, total (runs), left (seconds, None unknown),
    best, worst (losses so far, or None) and note (what it waits for, or "").
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.sweep, self._last = Path(folder) / FILE, time.time(), 0.0

    def write(self, *, now: bool = False, **state: Any) -> None:
        """Write the state; now : also within the second."""
        if now or time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            write_json(self.path, {"sweep": self.sweep} | state)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The state of the latest sweep on a ledger's folder; None where there was none."""
    try:
        return json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def sweep_bar(folder: Path, *, shown: bool | None = None):
    """Draw, meanwhile, a bar for every sweep that begins on the ledger in `folder`.

    shown : None draws where stderr is a terminal
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=_draw, args=(folder, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _draw(folder: Path, end: threading.Event) -> None:
    begun, bar, sweep, over = time.time(), None, None, False
    while not over:
        over = end.wait(EVERY)  # a last look after the end: a short sweep shows too
        state = read_progress(folder)
        if state is None or state["sweep"] < begun:
            continue  # of an earlier sweep
        if state["sweep"] != sweep:
            if bar is not None:
                bar.close()
            bar, sweep = tqdm(total=state["total"], initial=state["done"], desc="runs",
                              unit="run", file=sys.stderr), state["sweep"]
        bar.n = state["done"]
        bar.set_description(f"runs {state['note']}".strip(), refresh=False)
        bar.set_postfix(best_and_worst(state["best"], state["worst"]))
    if bar is not None:
        bar.close()


def best_and_worst(best: float | None, worst: float | None) -> dict[str, str]:
    """The losses beside a bar; nothing where there is none yet."""
    return {} if best is None else {"best": f"{best:.4f}", "worst": f"{worst:.4f}"}
