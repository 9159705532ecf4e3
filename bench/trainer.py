"""The sweep's peer: Hugging Face `Trainer` + peft, one run after the other, as people write it.

Each run loads the base, wraps it by `get_peft_model`, trains, and evaluates both sets by
`Trainer.evaluate` (batches of 8, its default). Collator: `DataCollatorForSeq2Seq`, which pads to
the batch's longest. Its settings are its defaults but for those that define the run (rank, rate,
schedule, epochs, batch size, clipping) and for saving and logging, which are switched off in its
favour, as is the progress bar. Imports, the process's start and tokenising are not counted, in its
favour too. `tuned` adds what its manual advises: batches grouped by length, and `bf16=True` where
the processor computes in it.

It runs in a process of its own, as it would on anybody's machine: what this package tells the
allocator of its process (`batching.keep_freed_memory`) would otherwise speed up the peer too.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .pairs import Disagreement
from .world import World

WAYS = {
    "defaults": "Trainer + peft, padding collator, its defaults, float32, runs one after the other",
    "tuned": "Trainer + peft, padding collator, group_by_length, bf16=True where there is any, "
             "runs one after the other",
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

    def warm(self, *, tuned: bool) -> None:
        """One step, without evaluation: nothing that happens once is in the first run's time."""
        with tempfile.TemporaryDirectory() as folder:
            job = self._job(0, tuned=tuned) | {"evals": []}
            job["arguments"]["max_steps"] = 1
            self._process.submit(train, job, folder).result()

    def run(self, number: int, *, tuned: bool) -> tuple[float, float]:
        """Seconds of one run with both evaluations, and its loss on the first set.

        The loss is the study's (mean over prompts, answers' body), taken here of the adapter that
        the peer has saved. Raises Disagreement where it took another number of steps than ours.
        """
        with tempfile.TemporaryDirectory() as folder:
            job = self._job(number, tuned=tuned)
            seconds, steps = self._process.submit(train, job, folder).result()
            wanted = self.world.config.steps(len(job["rows"]))
            if steps != wanted:
                raise Disagreement(f"the peer took {steps} steps, ours {wanted}")
            return seconds, self._loss(folder)

    def _job(self, number: int, *, tuned: bool) -> dict[str, Any]:
        """All that `train` needs, as plain values."""
        world, config = self.world, self.world.config
        half = computed_in(world.device) == "bfloat16"
        more = dict(bf16=half, train_sampling_strategy="group_by_length") if tuned else {}
        return {
            "folder": str(world.folder), "device": world.device, "config": config,
            "rows": _features([world.rows[name] for name in world.set(number)]),
            "evals": [_features(part) for part in world.evals.values()],
            "arguments": dict(
                per_device_train_batch_size=config.batch_size,
                num_train_epochs=config.epochs, learning_rate=config.learning_rate,
                use_cpu=world.device == "cpu", lr_scheduler_type=config.schedule,
                max_grad_norm=config.clip, report_to=[], save_strategy="no",
                logging_strategy="no", disable_tqdm=True, **more,
            ),
        }  # fmt: skip

    def _loss(self, folder: str) -> float:
        from peft import PeftModel

        from instructmining_core.finetuning.ledger import over_prompts
        from instructmining_core.models.causal_lm import LM, evaluate

        base = self.world.load("float32")
        model = PeftModel.from_pretrained(base.model, folder).eval()
        tuned = LM(model, base.tokenizer, base.resolved, base.device, base.dtype)
        return over_prompts(evaluate(tuned, self.world.evals["eval_1"])[0])


def train(job: dict[str, Any], folder: str) -> tuple[float, int]:
    """Seconds of a run with its evaluations, and its steps; the adapter is saved into `folder`.

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
    steps = trainer.state.global_step
    if job["device"] != "cpu":
        del trainer, model
        torch.cuda.empty_cache()  # the other side shares the GPU
    return seconds, steps


def computed_in(device: str) -> str:
    """The dtype that "auto" means on a device: "bfloat16" where its hardware has it."""
    from instructmining_core.models.hub import pick_dtype

    return str(pick_dtype("auto", device)).removeprefix("torch.")


def _features(rows) -> list[dict]:
    return [{"input_ids": list(row.ids), "attention_mask": [1] * len(row.ids),
             "labels": [i if t else -100 for i, t in zip(row.ids, row.targets, strict=True)]}
            for row in rows]
