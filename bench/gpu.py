"""What is measured where a GPU is to be had; on other machines these benches are skipped.

- `ppl_gpu_matmul_share`: perplexity of a randomly initialised LLaMA of 1 B parameters, FLOP/s of
  its real tokens over the GPU's own rate of the same bfloat16 products. Counted: 2 x the frozen
  weights a real token, causal attention, logits of targets.
- `sweep_gpu`: 64 adapters over bases of 60, 160 and 1,000 M parameters in runs an hour, against
  `Trainer` + peft with bf16 and grouped by length, one run after the other; `sweep_gpu_width`:
  tokens a second and memory for K adapters in one pass; `sweep_gpu_matmul_share`: the training's
  FLOP/s over the products'.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from . import data
from .models import build_lm, told
from .pairs import Skipped, four, row
from .world import World, train_seconds

SHARE_GOAL = 0.45  # of the products' rate, perplexity at 1 B
SWEEP_GOALS = {"60m": 10.0, "160m": 10.0, "1b": 4.0}  # times Trainer + peft
ADAPTERS = 64
WIDTHS = (1, 4, 16, 64)


def _needs_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device, and this machine has none")


def ppl_on_gpu() -> list[dict]:
    """`ppl_gpu_matmul_share`."""
    _needs_gpu()
    return [ppl_share("1b", 8192, "cuda")]


def sweep_on_gpu() -> list[dict]:
    """`sweep_gpu`, `sweep_gpu_width` and `sweep_gpu_matmul_share` of three bases."""
    _needs_gpu()
    return [one for size in SWEEP_GOALS
            for one in sweep_rows(World(size, device="cuda"), ADAPTERS, WIDTHS)]


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


def sweep_rows(world: World, adapters: int, counts: Sequence[int], repeats: int = 3) -> list[dict]:
    """All rows of one base, on any device."""
    from .matmul import products, training_flop
    from .sweep import against_trainer
    from .width import widths

    versus = [one for one in against_trainer(world, adapters, repeats)
              if one["bench"] == "sweep_vs_trainer_tuned"]
    made = [one | {"bench": "sweep_gpu", "goal": SWEEP_GOALS.get(world.size)} for one in versus]
    made += widths(world, counts, repeats, "sweep_gpu_width")
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


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "ppl_gpu_matmul_share": ppl_on_gpu,
    "sweep_gpu": sweep_on_gpu,
    "sweep_gpu_width": sweep_on_gpu,
    "sweep_gpu_matmul_share": sweep_on_gpu,
}
