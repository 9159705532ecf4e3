"""The sweep's peer: Hugging Face `Trainer` + peft, one run after the other, as people write it.

Each run loads the base, wraps it by `get_peft_model`, trains, and evaluates both sets by
`Trainer.evaluate` (batches of 8, its default). Collator: `DataCollatorForSeq2Seq`, which pads to
the batch's longest. Its settings are its defaults but for those that define the run (rank, rate,
schedule, epochs, batch size, clipping) and for saving and logging, which are switched off in its
favour, as is the progress bar. Imports, the process's start and tokenising are not counted, in its
favour too. `tuned` adds what its manual advises: `bf16=True` and batches grouped by length.

It runs in a process of its own, as it would on anybody's machine: what this package tells the
allocator of its process (`memory.keep_freed_memory`) would otherwise speed up the peer too.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .world import World

WAYS = {
    "defaults": "Trainer + peft, padding collator, its defaults, float32, runs one after the other",
    "tuned": "Trainer + peft, padding collator, bf16=True, group_by_length, one after the other",
}


class Peer:
    """The peer's process, for one world; a context."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> Peer:
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=spawn)
        return self

    def __exit__(self, *_) -> None:
        self._process.shutdown()

    def run(self, number: int, *, tuned: bool, steps: int = -1) -> tuple[float, float]:
        """Seconds of one run with both evaluations, and its loss on the first set.

        steps : -1 for the whole run; 1 warms the peer up
        The loss is `response_nll`'s, taken here of the adapter that the peer has saved.
        """
        with tempfile.TemporaryDirectory() as folder:
            seconds = self._process.submit(
                train, self._job(number, tuned=tuned, steps=steps), folder
            ).result()
            return seconds, self._loss(folder)

    def _job(self, number: int, *, tuned: bool, steps: int) -> dict[str, Any]:
        """All that `train` needs, as plain values."""
        world, config = self.world, self.world.config
        more = dict(bf16=True, train_sampling_strategy="group_by_length") if tuned else {}
        return {
            "folder": str(world.folder), "device": world.device, "config": config,
            "rows": _features([world.rows[name] for name in world.set(number)]),
            "evals": [_features(part) for part in world.evals.values()],
            "arguments": dict(
                per_device_train_batch_size=config.batch_size, max_steps=steps,
                num_train_epochs=config.epochs, learning_rate=config.learning_rate,
                use_cpu=world.device == "cpu", lr_scheduler_type=config.schedule,
                max_grad_norm=config.clip, report_to=[], save_strategy="no",
                logging_strategy="no", disable_tqdm=True, **more,
            ),
        }  # fmt: skip

    def _loss(self, folder: str) -> float:
        from peft import PeftModel

        from instructmining_core.models.causal_lm import LM
        from instructmining_core.models.loss import evaluate

        base = self.world.load("float32")
        model = PeftModel.from_pretrained(base.model, folder).eval()
        tuned = LM(model, base.tokenizer, base.resolved, base.device, base.dtype)
        return evaluate(tuned, self.world.evals["eval_1"])[0]["prompt_mean"]


def train(job: dict[str, Any], folder: str) -> float:
    """Seconds of a run with its evaluations; the adapter is saved into `folder` after them.

    job : of `Peer`; called in its process
    """
    import torch
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    from instructmining_core.finetuning.lora import peft_config, set_first_values

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="float32")
    model = get_peft_model(model, peft_config(job["config"], model))
    set_first_values(model, 0)  # the same first adapter on both sides
    trainer = Trainer(
        model=model, data_collator=DataCollatorForSeq2Seq(tokenizer), train_dataset=job["rows"],
        args=TrainingArguments(output_dir=str(Path(folder) / "trainer"), **job["arguments"]),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for part in job["evals"]:
        trainer.evaluate(part)
    if job["device"] != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    if job["device"] != "cpu":
        del trainer, model
        torch.cuda.empty_cache()  # the other side shares the GPU
    return seconds


def _features(rows) -> list[dict]:
    return [{"input_ids": list(row.ids), "attention_mask": [1] * len(row.ids),
             "labels": [i if t else -100 for i, t in zip(row.ids, row.targets, strict=True)]}
            for row in rows]
