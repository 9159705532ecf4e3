"""The sweep's peer: Hugging Face `Trainer` + peft, one run after the other, as people write it.

Each run loads the base, wraps it by `get_peft_model`, trains, and evaluates both sets by
`Trainer.evaluate` (batches of 8, its default). Collator: `DataCollatorForSeq2Seq`, which pads to
the batch's longest. Its settings are its defaults but for those that define the run (rank, rate,
schedule, epochs, batch size, clipping) and for saving and logging, which are switched off in its
favour, as is the progress bar. Imports and tokenising are not counted, in its favour too.
`tuned` adds what its manual advises: `bf16=True` and batches grouped by length.
"""

from __future__ import annotations

import tempfile
import time

from .world import World

WAYS = {
    "defaults": "Trainer + peft, padding collator, its defaults, float32, runs one after the other",
    "tuned": "Trainer + peft, padding collator, bf16=True, group_by_length, one after the other",
}


def trainer_run(world: World, number: int, *, tuned: bool, steps: int = -1) -> tuple[float, float]:
    """Seconds of one run with both evaluations, and its loss on the first set by `response_nll`.

    steps : -1 for the whole run; 1 warms the peer up
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PrinterCallback, Trainer

    from instructmining_core.adapters import peft_config, set_first_values
    from instructmining_core.evaluate import evaluate
    from instructmining_core.lm import LM

    judge = world.load("float32")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(world.folder, dtype="float32")
    model = get_peft_model(model, peft_config(world.config))
    set_first_values(model, 0)  # the same first adapter on both sides
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model, args=_arguments(world, folder, tuned, steps),
            data_collator=DataCollatorForSeq2Seq(judge.tokenizer),
            train_dataset=_features([world.rows[name] for name in world.set(number)]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for part in world.evals.values():
            trainer.evaluate(_features(part))
        if world.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    trained = LM(model.eval(), judge.tokenizer, judge.resolved, judge.device, judge.dtype)
    return seconds, evaluate(trained, world.evals["eval_1"])[0]["prompt_mean"]


def _arguments(world: World, folder: str, tuned: bool, steps: int):
    from transformers import TrainingArguments

    config = world.config
    more = dict(bf16=True, train_sampling_strategy="group_by_length") if tuned else {}
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=config.batch_size, max_steps=steps,
        num_train_epochs=config.epochs, learning_rate=config.learning_rate,
        use_cpu=world.device == "cpu", lr_scheduler_type=config.schedule,
        max_grad_norm=config.clip, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, **more,
    )


def _features(rows) -> list[dict]:
    return [{"input_ids": list(row.ids), "attention_mask": [1] * len(row.ids),
             "labels": [i if t else -100 for i, t in zip(row.ids, row.targets, strict=True)]}
            for row in rows]
