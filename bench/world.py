"""A base model in a folder, encoded training sets and evaluation sets, for sweeps.

One run is what the study does: LoRA on 128 rows for 3 epochs at batch 16 (24 steps), then the loss
on two evaluation sets of 100 rows. The base is a LLaMA with random weights and 40 steps of full
finetuning, so that its losses are not those of noise.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import data
from .models import random_llama


@dataclass(frozen=True)
class Extent:
    """How large a world is; the benches' by default, tests make it small.

    rows : of the source; warm : of them that train the base; evals : of each evaluation set
    set_rows : of a training set; epochs : over it; longest : tokens of a row
    """

    rows: int = 3000
    warm: int = 640
    evals: int = 100
    set_rows: int = 128
    epochs: int = 3
    longest: int = 256


class World:
    """All that both sides train on; the folder goes with the object."""

    def __init__(self, size: str, extent: Extent = Extent(), device: str = "cpu") -> None:
        from instructmining_core.config import FinetuneConfig
        from instructmining_core.data.tokenization import encode_many
        from instructmining_core.finetuning.run_spec import EvalSets

        self.size, self.extent, self.device = size, extent, device
        self._kept = tempfile.TemporaryDirectory(prefix="bench-sweep-")
        self.folder = Path(self._kept.name)
        found, self.source = data.conversations(extent.rows)
        model, tokenizer = random_llama(size, data.texts(found))
        model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        rows = encode_many(tokenizer, found, max_tokens=extent.longest)
        rows = [row for row in rows if any(row.targets[1:])]
        self._warm(rows[-extent.warm :])
        self.evals = EvalSets(eval_1=rows[: extent.evals],
                              eval_2=rows[extent.evals : 2 * extent.evals])
        self.rows = {f"{i}": row for i, row in enumerate(rows[2 * extent.evals : -extent.warm])}
        self.config = FinetuneConfig(epochs=extent.epochs, warmup_share=0.0)

    def _warm(self, rows) -> None:
        """Train the base a little, so that losses to be compared are not those of noise."""
        from instructmining_core.config import FinetuneConfig
        from instructmining_core.finetuning.finetune import finetune

        # large models diverge at the rate that small ones need
        rate = 5e-3 if self.size in ("tiny", "1m", "5m", "15m") else 3e-4
        config = FinetuneConfig(method="full", learning_rate=rate, epochs=1)
        tuned = finetune(self.load("auto"), rows, config, init_seed=0, order_seed=0)
        tuned.save(self.folder)

    def load(self, dtype: str = "auto"):
        """The base as an LM."""
        from instructmining_core.config import ModelRef
        from instructmining_core.models.causal_lm import load_lm

        return load_lm(ModelRef(str(self.folder), dtype=dtype), self.device)

    def set(self, number: int) -> list[str]:
        """Names of the rows of one training set."""
        names = list(self.rows)
        return [names[(37 * number + 7 * i) % len(names)] for i in range(self.extent.set_rows)]

    def specs(self, lm, count: int) -> list:
        """Specifications of the first `count` sets."""
        from instructmining_core.finetuning.run_spec import RunSpec

        return [RunSpec.of("bench", lm, self.config, self.set(k), self.evals,
                           label={"set_id": f"s{k}"}) for k in range(count)]

    def told(self) -> dict[str, str]:
        """What a row of results says of it."""
        from instructmining_core.data.tokenization import PLAIN

        size = self.extent
        return {
            "on": self.size, "template": PLAIN,
            "data": f"{self.source}: {size.set_rows} rows a set for {size.epochs} epochs, two "
                    f"evaluation sets of {size.evals}, rows cut at {size.longest} tokens",
        }  # fmt: skip


def sweep(world: World, count: int, dtype: str = "auto", **how) -> tuple[float, list[float]]:
    """Seconds of a whole sweep in a new ledger, and each run's loss on the first evaluation set.

    dtype : of the base; how : options of `run_sweep`
    """
    from instructmining_core.finetuning.ledger import Ledger
    from instructmining_core.finetuning.sweep import run_sweep

    lm = world.load(dtype)
    specs = world.specs(lm, count)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        frame = run_sweep(specs, lm, world.rows, world.evals, Ledger(folder), **how)
        seconds = time.perf_counter() - start
    if not (frame["status"] == "done").all():
        raise RuntimeError(f"runs failed: {frame['error'].dropna().unique()[:1]}")
    return seconds, frame["loss_eval_1"].tolist()


def train_seconds(lm, config, rows) -> tuple[float, object]:
    """Seconds of one training, and its adapters."""
    from instructmining_core.finetuning.lora import MultiLoRA
    from instructmining_core.finetuning.packing import PackedModel
    from instructmining_core.finetuning.trainer import TrainingJob, train

    adapters = MultiLoRA(lm.model, config, [0])
    with adapters.attached():
        model = PackedModel(lm)
        start = time.perf_counter()
        train(adapters, model, [TrainingJob(rows, 0, 0)])
        return time.perf_counter() - start, adapters
