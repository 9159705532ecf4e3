"""Achieved FLOP/s of the sweep's training over the machine's own rate of the same products.

As many processes of one thread as the sweep has on this machine train at the same time, then do
nothing but the products of as many steps, again at the same time. The products are those the
training does, at its shapes: every layer's, forward and to the input, and the output matrix on the
target tokens, in its chunks. Counted are 4 x the frozen weights a real token (2 where nothing below
needs the gradient: the first layer's query, key and value), 6 x LoRA, causal attention, and the
output matrix on targets; products that the code does beyond that (places that fill a batch up,
padded attention) are not.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence

from .pairs import four
from .parts import told, where_time_goes
from .world import World, train_seconds

LIMIT_SHARE = 0.30  # of the products' rate, at 5 M parameters
NAMES = {"5m": "sweep_matmul_share", "1m": "sweep_matmul_share_1m"}


def matmul_share() -> list[dict]:
    """`sweep_matmul_share` at 5 M parameters, and at 1 M, which has no goal."""
    return [one_share(World(size), NAMES[size], _processes()) for size in NAMES]


def one_share(world: World, bench: str, processes: int, repeats: int = 3) -> dict:
    """The row of one model, with what eats the rest."""

    found = together(world, processes, repeats)
    achieved = sum(flop / statistics.median(seconds) for flop, seconds, *_ in found)
    rate = sum(flop / statistics.median(seconds) for *_, flop, seconds in found)
    parts, slower = where_time_goes(world)
    return {
        "bench": bench, "peer": "nothing but the same products, as many processes of one thread",
        "ours": four(achieved / 1e12), "theirs": four(rate / 1e12),
        "ratio": four(achieved / rate / LIMIT_SHARE), "unit": "TFLOP/s", **world.told(),
        "dtype": str(world.load().dtype).removeprefix("torch."),
        "share": four(achieved / rate), "parts": parts,
        "note": f"share {achieved / rate:.3f}, limit {LIMIT_SHARE}; {processes} processes, medians "
                f"of {repeats}; time by part: {told(parts)} (one process under torch's profiler, "
                f"which made it {slower:.2f} times as slow)",
    }  # fmt: skip


def together(world: World, processes: int, repeats: int) -> list[tuple]:
    """(FLOP, seconds of each training, FLOP of products, seconds of each) of each process.

    Raises RuntimeError where a process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    jobs = [[world.rows[name] for name in world.set(k)] for k in range(processes)]
    started = [
        context.Process(target=_work, args=(str(world.folder), world.config, rows, repeats,
                                            barrier, results))
        for rows in jobs
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"processes ended with {[p.exitcode for p in started]}")
    return [results.get() for _ in started]


def _work(folder: str, config, rows, repeats: int, barrier, results) -> None:
    """One process: a training thrown away, then trainings and products in turn."""
    import torch

    from instructmining_core.config import ModelRef
    from instructmining_core.models.causal_lm import load_lm

    torch.set_num_threads(1)
    lm = load_lm(ModelRef(folder, dtype="auto"), "cpu")
    train_seconds(lm, config, rows)
    trained, multiplied = [], []
    for _ in range(repeats):
        barrier.wait(timeout=600)
        seconds, adapters = train_seconds(lm, config, rows)
        trained.append(seconds)
        barrier.wait(timeout=600)
        flop, seconds = products(adapters, lm, rows, config)
        multiplied.append(seconds)
    results.put((training_flop(adapters, lm, rows, config), trained, flop, multiplied))


def training_flop(adapters, lm, rows, config) -> float:
    """FLOP of training on `rows`; the module tells what is counted."""
    from instructmining_core.finetuning.lora import shapes

    multiplied = sum(weight.numel() * (4 if below else 2) for weight, below in frozen(adapters))
    for name, layer in adapters.layers.items():
        d_in, d_out = shapes(layer.layer)
        multiplied += config.rank * (d_in * (6 if _below(name) else 4) + d_out * 6)
    model = lm.model.config
    pairs = sum(len(row) * (len(row) + 1) / 2 for row in rows)
    attention = 3 * 4 * pairs * model.hidden_size * model.num_hidden_layers
    head = 4 * _targets(rows) * model.hidden_size * model.vocab_size
    return config.epochs * (multiplied * sum(map(len, rows)) + attention + head)


def frozen(adapters) -> list[tuple]:
    """(weight, whether its input needs a gradient) of each layer with adapters."""
    return [(layer.weight, _below(name)) for name, layer in adapters.layers.items()]


def _below(name: str) -> bool:
    """Whether a gradient goes below the layer: not below what reads the embeddings."""
    readers = ("q_proj", "k_proj", "v_proj")
    return not (".layers.0." in f".{name}" and name.rsplit(".", 1)[-1] in readers)


def products(adapters, lm, rows, config) -> tuple[float, float]:
    """FLOP and seconds of the frozen products of a whole training, and of nothing else."""
    import torch

    from instructmining_core.finetuning.packing import CHUNK_LOGITS

    steps = -(-len(rows) // config.batch_size)
    tokens, targets = sum(map(len, rows)) // steps, _targets(rows) // steps
    head = lm.model.get_output_embeddings().weight
    chunk = max(16, CHUNK_LOGITS // head.shape[0])
    plan = [(tokens, weight, below) for weight, below in frozen(adapters)]
    plan += [(min(chunk, targets - at), head, True) for at in range(0, targets, chunk)]
    inputs = {(n, w.shape[1]): torch.randn(n, w.shape[1]).to(w) for n, w, _ in plan}

    def multiply(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            for n, weight, below in plan:
                out = inputs[n, weight.shape[1]] @ weight.t()
                if below:
                    out @ weight
        if head.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    flop = sum((4 if below else 2) * n * weight.numel() for n, weight, below in plan)
    with torch.no_grad():
        multiply(1)
        return steps * config.epochs * flop, multiply(steps * config.epochs)


def _targets(rows: Sequence) -> int:
    return sum(sum(row.targets[1:]) for row in rows)


def _processes() -> int:
    """As many as `worker_devices` would have the sweep run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


BENCHES: dict[str, Callable[[], list[dict]]] = {name: matmul_share for name in NAMES.values()}

