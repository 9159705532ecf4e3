"""How many adapters in one pass pay: tokens a second and memory for K = 1, 2, 4, 8.

The rows justify the 1 of `trainer.adapters_per_pass`: each K is held against K = 1. One thread, as
each process of a sweep has; one epoch of each adapter's own set of 64 rows, so that what a pass
needs before its first step weighs more than in a whole run.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence

from .pairs import row
from .world import Extent, World


def on_this_processor() -> list[dict]:
    """`sweep_width` at about 1 and 5 M parameters."""
    from instructmining_core.finetuning.workers import one_thread

    short = Extent(epochs=1, set_rows=64)
    with one_thread():
        return [one for size in ("1m", "5m") for one in widths(World(size, short))]


def widths(
    world: World, counts: Sequence[int] = (1, 2, 4, 8), repeats: int = 3,
    bench: str = "sweep_width",
) -> list[dict]:  # fmt: skip
    """A row for each K, the repetitions in turn; `counts` begins with the K that others are held
    against."""
    lm = world.load()
    train_once(world, lm, counts[0])
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            taken[count].append(train_once(world, lm, count))
    rate = {count: statistics.median(r for r, _ in found) for count, found in taken.items()}
    peak = {count: max(m for _, m in found) for count, found in taken.items()}
    where = "of the GPU" if world.device != "cpu" else "above the process before it"
    about = world.told()
    return [
        row(bench, f"K = {counts[0]}", rate[count], rate[counts[0]], "tokens/s",
            **about | {"on": f"{world.size}, K = {count}"},
            dtype=str(lm.dtype).removeprefix("torch."),
            note=f"medians of {repeats} in turn; peak memory {peak[count]:.0f} MiB {where}")
        for count in counts
    ]  # fmt: skip


def train_once(world: World, lm, count: int) -> tuple[float, float]:
    """Real tokens a second of `count` adapters trained in one pass, and peak MiB."""
    from instructmining_core.finetuning.finetune import Meter
    from instructmining_core.finetuning.lora import MultiLoRA
    from instructmining_core.finetuning.packing import PackedModel
    from instructmining_core.finetuning.trainer import TrainingJob, train

    jobs = [TrainingJob([world.rows[name] for name in world.set(k)], 0, 0) for k in range(count)]
    held = 0 if world.device != "cpu" else _held()
    meter = Meter(world.device)
    adapters = MultiLoRA(lm.model, world.config, [0] * count)
    with adapters.attached():
        train(adapters, PackedModel(lm), jobs)
        seconds, peak = meter.read()
    tokens = world.config.epochs * sum(len(one) for job in jobs for one in job.rows)
    return tokens / seconds, (peak - held) / 2**20


def _held() -> int:
    """Bytes of this process, what it has freed given back first (glibc keeps it otherwise)."""
    import psutil

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


BENCHES: dict[str, Callable[[], list[dict]]] = {"sweep_width": on_this_processor}
