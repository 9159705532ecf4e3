"""Where a training's time goes, by torch's profiler: products, attention, loss, the rest.

The functions that do a part are labelled for the profiler's while; an operation belongs to the
nearest label around it, except that a matrix product outside attention is a product. What lies
between operations is Python's and autograd's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from .world import World, train_seconds

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear"}
OTHER = "norms, rotary positions, activations, sums"
PYTHON = "Python and autograd between operations"
LABELS = {  # (module of the package, name there) -> part
    ("finetuning.packing", "attend_packed"): "attention",
    ("finetuning.lora", "_BlockLinear.forward"): "adapters beside their products",
    ("finetuning.lora", "_BlockLinear.backward"): "adapters beside their products",
    ("finetuning.packing", "weighted_nll"): "loss",
    ("finetuning.packing", "PackedModel.batch"): "laying out batches",
    ("finetuning.lora", "MultiLoRA.step"): "optimiser",
}


def where_time_goes(world: World) -> tuple[dict[str, float], float]:
    """Share of each part in the time of one training, one thread; how much the profiler slows it.

    returns : part -> share, largest first, summing to 1; seconds with the profiler over without
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from instructmining_core.finetuning.workers import one_thread

    lm, rows = world.load(), [world.rows[name] for name in world.set(0)]
    with one_thread():
        train_seconds(lm, world.config, rows)
        plain, _ = train_seconds(lm, world.config, rows)
        with labelled(), profile(activities=[ProfilerActivity.CPU]) as seen:
            start = time.perf_counter()
            with torch.profiler.record_function("whole"):
                train_seconds(lm, world.config, rows)
            slow = time.perf_counter() - start
    return shares(seen.events()), slow / plain


@contextmanager
def labelled() -> Iterator[None]:
    """Have the functions of `LABELS` name their part to the profiler, inside the block."""
    import importlib

    with ExitStack() as stack:
        for (module, name), part in LABELS.items():
            owner = importlib.import_module(f"instructmining_core.{module}")
            *path, last = name.split(".")
            for step in path:
                owner = getattr(owner, step)
            stack.enter_context(mock.patch.object(owner, last, _named(getattr(owner, last), part)))
        yield


def _named(function, part: str):
    from torch.profiler import record_function

    def call(*args, **kwargs):
        with record_function(f"part:{part}"):
            return function(*args, **kwargs)

    return call


def shares(events) -> dict[str, float]:
    """Part -> its share of the time inside "whole", by each event's own time.

    events : with name, cpu_parent and self_cpu_time_total, as the profiler gives them
    """
    taken: dict[str, float] = defaultdict(float)
    for event in events:
        above = _above(event)
        if "whole" in above:
            taken[_part(event.name, above)] += event.self_cpu_time_total
    whole = sum(taken.values())
    largest_first = sorted(taken.items(), key=lambda item: -item[1])
    return {part: round(t / whole, 4) for part, t in largest_first}


def _above(event) -> list[str]:
    """Its own name and those around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _part(name: str, above: list[str]) -> str:
    label = next((n.removeprefix("part:") for n in above if n.startswith("part:")), OTHER)
    if label == "laying out batches":
        return label  # NumPy's work lies between operations
    if not name.startswith("aten::"):
        return PYTHON
    if "attention" in name:  # its backward pass runs under no label
        return "attention"
    if label != "attention" and PRODUCTS & set(above):
        return "matrix products"
    return label


def told(parts: dict[str, float]) -> str:
    """The shares in words."""
    return ", ".join(f"{part} {share:.0%}" for part, share in parts.items())
