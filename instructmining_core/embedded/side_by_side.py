"""Stand-ins that are not there yet, built side by side: one process and one thread each.

Their matrix products are too short to be worth two threads each, so two processes of one thread
build nearly twice as fast as one process of two, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from tqdm.auto import tqdm

_LOOK = 0.5  # seconds between looks at the processes


class BuildError(RuntimeError):
    """A process that built a stand-in ended before it was done."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_each(
    build: Callable[[str, Callable[[int, int], None]], None],
    parts: Sequence[str],
    *,
    progress: bool = False,
) -> None:
    """Call `build(part, told)` for each part, as many at a time as there are cores.

    build : a function of a module (it travels to the other processes by name), which calls
        `told(done, steps)` after each of its steps
    Raises BuildError naming the part and the exit status; what the process said is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(parts), {}
    done = {part: context.Array("q", [0, 0], lock=False) for part in parts}
    with tqdm(total=1.0, desc=f"stand-ins {', '.join(parts)}", disable=not progress,
              bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:  # fmt: skip
        try:
            while waiting or running:
                while waiting and len(running) < cores():
                    part = waiting.pop(0)
                    running[part] = context.Process(target=_work, args=(build, part, done[part]))
                    running[part].start()
                time.sleep(_LOOK)
                for part in [p for p, process in running.items() if process.exitcode is not None]:
                    status = running.pop(part).exitcode
                    if status:
                        raise BuildError(f"building the stand-in {part!r} ended with {status}")
                    done[part][:] = [1, 1]
                share = sum(made / steps if steps else 0 for made, steps in done.values())
                bar.update(share / len(parts) - bar.n)
        finally:
            for process in running.values():
                process.terminate()
                process.join()


def _work(build: Callable, part: str, done) -> None:
    with suppress(ImportError):
        import torch

        torch.set_num_threads(1)

    def told(made: int, steps: int) -> None:
        done[:] = [made, steps]

    build(part, told)
