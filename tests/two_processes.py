"""What `test_distributed` starts in two processes, and does in one, to compare the numbers."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from finetuning.test_finetune import CONFIG, rows_of

from instructmining_core.config import ModelRef
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.finetuning.multi_lora import MultiLoRA
from instructmining_core.finetuning.packing import PackedModel
from instructmining_core.finetuning.trainer import TrainingJob, train
from instructmining_core.models.causal_lm import LM, load_lm, response_nll
from instructmining_core.models.distributed import join, own_device

# 11 rows in steps of 5, 5 and 1: in the last one process has nothing to do
ROWS = rows_of(11)
METHODS = {
    "stack": {}, "peft": {"engine": "peft"},
    "dora": {"method": "dora"}, "full": {"method": "full", "learning_rate": 2e-3},
}


def run(lm: LM, name: str, shard: bool = False, save: Path | None = None) -> dict[str, list]:
    """Losses of the steps, after each epoch, and at the end."""
    options = dict(METHODS[name])
    engine = "auto" if shard else options.pop("engine", "auto")
    options.pop("engine", None)
    # 40 tokens: the processes need different numbers of micro-batches
    config, epochs = replace(CONFIG, micro_tokens=40, **options), []
    tuned = finetune(
        lm, ROWS, config, init_seed=1, order_seed=2, engine=engine, shard=shard,
        on_epoch=lambda model, _: epochs.append(response_nll(model, ROWS[:3])["nll"].sum()))
    after = response_nll(tuned.lm, ROWS)["nll"].tolist()
    if save is not None:
        tuned.save(save)
    tuned.close()
    return {"steps": tuned.curve["loss"].tolist(), "epochs": epochs, "after": after}


def together(lm: LM) -> list[list[float]]:
    """Three adapters in one pass."""
    jobs = [TrainingJob(rows_of(9 + 2 * k, seed=k), k, 5) for k in range(3)]
    stack = MultiLoRA(lm.model, CONFIG, [job.init_seed for job in jobs])
    stack.attach()
    trained = train(stack, PackedModel(lm), jobs, group=join())
    stack.detach()
    return [trained.curve(k)["loss"].tolist() for k in range(3)]


def failing(lm: LM, where: int, error: Exception, times: int) -> str | list[float]:
    """A run in which one process's loss raises: what the run raises here, or its losses."""
    real, left = PackedModel.loss, [times if join().rank == where else 0]

    def broken(self, *arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return real(self, *arguments)

    PackedModel.loss = broken
    try:
        return run(lm, "stack")["steps"]
    except Exception as caught:
        return type(caught).__name__
    finally:
        PackedModel.loss = real


def main(folder: str, out: str, job: str) -> None:
    torch.set_num_threads(1)
    lm, out = load_lm(ModelRef(folder, dtype="float32"), "cpu"), Path(out)
    group = join()
    found = {name: run(lm, name) for name in METHODS}
    found["together"] = together(lm)
    for name in ("peft", "dora", "full"):
        found[f"{name} cut"] = run(lm, name, shard=True, save=out / name)
    found["memory"] = failing(lm, 1, MemoryError(), 1)
    found["error"] = failing(lm, 1, ValueError("bad row"), 10**6)
    found["numbers"] = [group.least(3 + group.rank), group.most(3 + group.rank),
                        group.tell(group.rank), own_device("cuda"), own_device("cpu")]
    (out / f"found{group.rank}.json").write_text(json.dumps(found))
    sys.argv = ["launched", job]
    runpy.run_module("instructmining_core.finetuning.sweep", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
