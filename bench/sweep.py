"""The sweep in runs an hour against Hugging Face `Trainer` + peft (`trainer`), both ways of it.

Ours is `run_sweep` with everything that belongs to it: ledger, records, per-example losses, and the
start of its worker process. Both sides do the same steps from the same base and first adapter on
the same token ids; `Trainer` shuffles by its own seed. Each side runs three times in turn, after a
run of one step that is thrown away. The study's loss on the first evaluation set must agree
within 0.5 % in every pair, and training must have lowered it on both sides. On these small
bases 24 steps lower it by less than 1 %, so that agreement alone says little: the note tells both
falls. That an adapter is trained exactly as peft would is held by the package's own tests.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from .pairs import row
from .trainer import WAYS, Peer, computed_in
from .world import World, sweep

LIMIT_LOSS = 0.005  # relative difference of final losses, in every pair
RUNS = {"1m": 30, "5m": 12}  # of ours in each repetition: a minute and more, a tenth of a sweep
BENCH = {"defaults": "sweep_vs_trainer", "tuned": "sweep_vs_trainer_tuned"}


def vs_trainer() -> list[dict]:
    """Both benches at about 1 and 5 M parameters."""
    return [one for size, runs in RUNS.items() for one in against_trainer(World(size), runs)]


def against_trainer(world: World, runs: int, repeats: int = 3, **how) -> list[dict]:
    """A row for each way of the peer.

    runs : of ours in each repetition, at least `repeats`; how : options of `run_sweep`
    """
    before = base_loss(world)
    seconds: dict[str, list[float]] = {side: [] for side in ("ours", *WAYS)}
    losses: dict[str, list[float]] = {side: [] for side in ("ours", *WAYS)}
    with Peer(world) as peer:
        for way in WAYS:
            peer.warm(tuned=way == "tuned")
        for k in range(repeats):
            for way in WAYS:
                taken, loss = peer.run(k, tuned=way == "tuned")
                seconds[way].append(taken)
                losses[way].append(loss)
            taken, found = sweep(world, runs, **how)
            seconds["ours"].append(taken / runs)
            losses["ours"].append(found[k])
    rate = {side: 3600 / statistics.median(taken) for side, taken in seconds.items()}
    ours = computed_in(world.device)
    half = "bfloat16 autocast" if ours == "bfloat16" else "float32"
    return [
        row(
            BENCH[way], WAYS[way], rate["ours"], rate[way], "runs/h", **world.told(),
            dtype=f"{ours} against {'float32' if way == 'defaults' else half}",
            note=f"medians of {repeats} in turn, {runs} runs of ours each; loss before training "
                 f"{before:.4f}, after {listed(losses['ours'])} (ours), {listed(losses[way])}: "
                 f"median falls {fall(before, losses['ours']):.4f} (ours), "
                 f"{fall(before, losses[way]):.4f}",
        ) | disagreement(before, losses["ours"], losses[way])
        for way in WAYS
    ]  # fmt: skip


def disagreement(before: float, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, str]:
    """{"failed": why} where a pair's final losses differ, or training gained nothing; else {}."""
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    if not worst <= LIMIT_LOSS:
        return {"failed": f"final losses differ by up to {worst:.2%}, more than {LIMIT_LOSS:.1%}"}
    one, other = (fall(before, losses) for losses in (ours, theirs))
    if not min(one, other) > 0:
        return {"failed": f"training lowered the loss by {one:.4f} (ours) and {other:.4f}"}
    return {}


def fall(before: float, losses: Sequence[float]) -> float:
    """How much training lowered the loss, nats per token; the median of the runs."""
    return before - statistics.median(losses)


def base_loss(world: World) -> float:
    """The study's loss of the untrained base on the first evaluation set, in float32."""
    from instructmining_core.finetuning.ledger import over_prompts
    from instructmining_core.models.causal_lm import evaluate

    return over_prompts(evaluate(world.load("float32"), world.evals["eval_1"])[0])


def listed(losses: Sequence[float]) -> str:
    """The losses in words."""
    return " / ".join(f"{loss:.4f}" for loss in losses)


BENCHES: dict[str, Callable[[], list[dict]]] = {name: vs_trainer for name in BENCH.values()}

