"""What is measured where a GPU is to be had; skipped elsewhere.

- `ppl_gpu_matmul_share`: perplexity of a randomly initialised LLaMA of 1 B parameters, FLOP/s of
  its real tokens over the GPU's own rate of the same bfloat16 products. Counted: 2 x the frozen
  weights a real token, causal attention, logits of targets.
- `sweep_gpu`: SmolLM2 at full depth, 96 rows x 2 a run with evaluation, K = 1, 8 and 32 adapters in
  one pass, in runs an hour against `Trainer` + peft (bf16, grouped by length), one run after the
  other; `sweep_gpu_width`: the training's tokens a second and memory for each K;
  `sweep_gpu_matmul_share`: its FLOP/s over those of nothing but the same products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from . import data
from .models import build_lm, told
from .pairs import Skipped, four, row
from .real import RealWorld
from .world import Extent, World, sweep, train_seconds

SHARE_GOAL = 0.45  # of the products' rate, perplexity at 1 B
SWEEP_GOAL = 8.0  # times Trainer + peft, at the largest K
STUDY_RUNS = 129  # of the paper's sweep
COUNTS = (1, 8, 32)  # adapters in one pass
EXTENT = Extent(rows=1400, warm=0, evals=200, set_rows=96, epochs=2, longest=384)


def _needs_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device, and this machine has none")


def ppl_on_gpu() -> list[dict]:
    """`ppl_gpu_matmul_share`."""
    _needs_gpu()
    return [ppl_share("1b", 8192, "cuda")]


def sweep_on_gpu() -> list[dict]:
    """`sweep_gpu`, `sweep_gpu_width` and `sweep_gpu_matmul_share` of SmolLM2."""
    _needs_gpu()
    return sweep_rows(RealWorld(0, EXTENT, "cuda"), COUNTS)


def ppl_share(size: str, rows: int, device: str, repeats: int = 3) -> dict:
    """The row of one model, on any device."""
    from instructmining_core.data.tokenization import PLAIN
    from instructmining_core.indicators import perplexity
    from instructmining_core.indicators.turns import each_turn, read
    from instructmining_core.models.causal_lm import LM

    found, origin = data.conversations(rows)
    talks = [read(messages) for messages in found]
    lm = build_lm(size, data.texts(found), device=device)
    encoded = perplexity.encode_turns(list(each_turn(talks)), lm)
    perplexity.compute_perplexity(talks, lm)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        perplexity.compute_perplexity(talks, lm)  # its values are on the CPU, so the GPU is done
        taken.append(time.perf_counter() - start)
    achieved = forward_flop(lm, encoded) / statistics.median(taken)
    tokens = min(LM.batch_tokens[device.partition(":")[0]], sum(map(len, encoded)))
    rate = forward_rate(lm, tokens)
    a_second = sum(map(len, encoded)) / statistics.median(taken)
    return {
        "bench": "ppl_gpu_matmul_share", "peer": "nothing but the same products",
        "ours": four(achieved / 1e12), "theirs": four(rate / 1e12),
        "ratio": four(achieved / rate / SHARE_GOAL), "unit": "TFLOP/s", "on": size,
        "data": f"{len(talks)} contiguous rows of {origin}", "template": PLAIN,
        "dtype": str(lm.dtype).removeprefix("torch."), "share": four(achieved / rate),
        "note": f"{told(lm)}; share {achieved / rate:.3f}, goal {SHARE_GOAL}; {a_second:,.0f} real "
                f"tokens/s, tokenising included; median of {repeats}",
    }  # fmt: skip


def _weights(lm) -> list:
    """The matrices of the decoder's layers."""
    return [p for name, p in lm.model.named_parameters() if ".layers." in name and p.dim() == 2]


def forward_flop(lm, encoded: Sequence) -> float:
    """FLOP of the losses of rows; the module tells what is counted."""
    model = lm.model.config
    frozen = sum(weight.numel() for weight in _weights(lm))
    pairs = sum(len(one) * (len(one) + 1) / 2 for one in encoded)
    targets = sum(sum(one.targets[1:]) for one in encoded)
    return (2 * frozen * sum(map(len, encoded))
            + 4 * pairs * model.hidden_size * model.num_hidden_layers
            + 2 * targets * model.hidden_size * model.vocab_size)


def forward_rate(lm, tokens: int, repeats: int = 3) -> float:
    """FLOP/s of the layers' products on a batch of so many tokens; the median."""
    import torch

    weights = _weights(lm)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device).to(w) for w in weights}
    rates = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for weight in weights:
                inputs[weight.shape[1]] @ weight.t()
            if weights[0].is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            rates.append(2 * tokens * sum(w.numel() for w in weights) / seconds)
    return statistics.median(rates[1:])


def sweep_rows(world: World, counts: Sequence[int], repeats: int = 3) -> list[dict]:
    """All rows of one base, on any device."""
    from .matmul import products, training_flop
    from .width import widths

    made = [*against_trainer(world, counts, repeats),
            *widths(world, counts, repeats, "sweep_gpu_width")]
    lm, rows = world.load(), [world.rows[name] for name in world.set(0)]
    _, adapters = train_seconds(lm, world.config, rows)
    flop, seconds = products(adapters, lm, rows, world.config)
    tokens = world.config.epochs * sum(map(len, rows))
    each = training_flop(adapters, lm, rows, world.config) / tokens
    best = max(one["ours"] for one in made if one["bench"] == "sweep_gpu_width")
    return [*made, row(
        "sweep_gpu_matmul_share", "nothing but the same products of one adapter's steps",
        best * each / 1e12, flop / seconds / 1e12, "TFLOP/s", **world.told(),
        dtype=str(lm.dtype).removeprefix("torch."), note="the best K; the ratio is the share",
    )]  # fmt: skip


def against_trainer(world: World, counts: Sequence[int], repeats: int) -> list[dict]:
    """`sweep_gpu` for each K; the peer's runs first, the median of `repeats`.

    Ours are one pass of K runs, and four of one, after a pass that is thrown away.
    """
    from .sweep import base_loss, disagreement, listed
    from .trainer import WAYS, Peer, computed_in

    with Peer(world) as peer:
        peer.warm(tuned=True)
        found = [peer.run(k, tuned=True) for k in range(repeats)]
    taken = statistics.median(seconds for seconds, _ in found)
    theirs, before = [loss for _, loss in found], base_loss(world)
    sweep(world, counts[0], together=counts[0], workers=0)
    made = []
    for count in counts:
        runs = max(4, count)
        seconds, losses = sweep(world, runs, together=count, workers=0)
        made.append(row(
            "sweep_gpu", WAYS["tuned"], 3600 * runs / seconds, 3600 / taken, "runs/h",
            **world.told() | {"on": f"{world.told()['on']}, K = {count}"},
            dtype=f"{computed_in(world.device)} against autocast",
            goal=SWEEP_GOAL if count == counts[-1] else None,
            note=f"{runs} runs of ours in {seconds:.1f} s, so {STUDY_RUNS} in "
                 f"{STUDY_RUNS * seconds / runs:.0f} s; one of theirs in {taken:.1f} s; loss "
                 f"before training {before:.4f}, after {listed(losses[:repeats])} (ours), "
                 f"{listed(theirs)}",
        ) | disagreement(before, losses[:repeats], theirs))  # fmt: skip
    return made


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "ppl_gpu_matmul_share": ppl_on_gpu,
    "sweep_gpu": sweep_on_gpu,
    "sweep_gpu_width": sweep_on_gpu,
    "sweep_gpu_matmul_share": sweep_on_gpu,
}
