"""The sweep against Hugging Face `Trainer` + peft, and against the machine's own matrix products.

One run is what the study does: LoRA on 128 rows for 3 epochs at batch 16 (24 steps), then the loss
on two evaluation sets of 100 rows. Peers do the same steps from the same first adapter and the same
tokens, one run after the other:
- `trainer`: as people write it: padding collator, defaults, float32.
- `tuned`: bfloat16 and batches grouped by length.
Ours is `run_sweep` with everything that belongs to it: ledger, records, per-example losses, and the
start of its helper process. The final losses of both are computed by `response_nll` and must agree
within 0.5 %. Models are LLaMAs with 40 steps of training.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from . import data

LIMIT_SHARE = 0.30  # of the matrix-product rate, at 5 M parameters
LIMIT_SECONDS = 360.0  # of the laptop sweep
LIMIT_LOSS = 0.005  # relative difference of final losses
SHAPES = {"1m": (4096, 96, 256, 5, 4), "5m": (4096, 224, 608, 6, 4)}
RUNS = {"1m": 32, "5m": 10}  # of ours; one of theirs before, one after


class World:
    """A base in a folder, encoded training sets and evaluation sets."""

    def __init__(self, size: str, longest: int = 256) -> None:
        from instructmining_core.profiles import FinetuneConfig
        from instructmining_core.templates import encode_many

        self.folder = Path(tempfile.mkdtemp(prefix="bench-sweep-"))
        found, self.source = data.conversations(3000)
        self._build(size, data.texts(found))
        lm = self.load("bfloat16")
        rows = encode_many(lm.tokenizer, found, max_tokens=longest)
        rows = [row for row in rows if any(row.targets[1:])]
        self._warm(rows[-640:])
        self.evals = {"eval_1": rows[:100], "eval_2": rows[100:200]}
        self.rows = {f"{i}": row for i, row in enumerate(rows[200:-640])}
        self.config = FinetuneConfig(warmup_share=0.0)
        self.size = size

    def _build(self, size: str, texts: list[str]) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary, hidden, mlp, layers, heads = SHAPES[size]
        tokenizer = data.train_tokenizer(texts, vocabulary)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp,
            num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(self.folder / "base")
        tokenizer.save_pretrained(self.folder / "base")

    def _warm(self, rows) -> None:
        """Train the base a little, so that losses to be compared are not those of noise."""
        from instructmining_core.finetune import finetune
        from instructmining_core.profiles import FinetuneConfig

        config = FinetuneConfig(method="full", learning_rate=5e-3, epochs=1)
        tuned = finetune(self.load("bfloat16"), rows, config, init_seed=0, order_seed=0)
        tuned.save(self.folder / "base")

    def load(self, dtype: str):
        from instructmining_core.lm import load_lm
        from instructmining_core.profiles import ModelRef

        return load_lm(ModelRef(str(self.folder / "base"), dtype=dtype), "cpu")

    def set(self, number: int) -> list[str]:
        """Hashes of the 128 rows of one training set."""
        names = list(self.rows)
        return [names[(37 * number + 7 * i) % len(names)] for i in range(128)]

    def specs(self, lm, count: int) -> list:
        from instructmining_core.ledger import RunSpec

        return [RunSpec.of("bench", lm, self.config, self.set(k), self.evals,
                           label={"set_id": f"s{k}"}) for k in range(count)]


def sweep_seconds(world: World, count: int) -> tuple[float, list[float]]:
    """Seconds of a whole sweep, and each run's loss on the first evaluation set."""
    from instructmining_core.ledger import Ledger
    from instructmining_core.sweep import run_sweep

    lm = world.load("auto")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        frame = run_sweep(world.specs(lm, count), lm, world.rows, world.evals, Ledger(folder))
        return time.perf_counter() - start, frame["loss_eval_1"].tolist()


def trainer_seconds(world: World, number: int, *, tuned: bool) -> tuple[float, float]:
    """Seconds of one `Trainer` run with both evaluations, and its loss by `response_nll`."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    from instructmining_core.adapters import peft_config, set_first_values
    from instructmining_core.evaluate import evaluate
    from instructmining_core.lm import LM

    judge = world.load("float32")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(world.folder / "base", dtype="float32")
    model = get_peft_model(model, peft_config(world.config))
    set_first_values(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model, args=_arguments(world, folder, tuned), data_collator=_collate,
            train_dataset=_features([world.rows[h] for h in world.set(number)]),
        )
        trainer.train()
        for part in world.evals.values():
            trainer.evaluate(_features(part))
        seconds = time.perf_counter() - start
    trained = LM(model.eval(), judge.tokenizer, judge.resolved, "cpu", judge.dtype)
    return seconds, evaluate(trained, world.evals["eval_1"])[0]["prompt_mean"]


def _arguments(world: World, folder: str, tuned: bool):
    from transformers import TrainingArguments

    config = world.config
    more = dict(bf16=True, train_sampling_strategy="group_by_length") if tuned else {}
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs, learning_rate=config.learning_rate, use_cpu=True,
        lr_scheduler_type="cosine", max_grad_norm=config.clip, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, **more,
    )


def _features(rows) -> list[dict]:
    return [{"input_ids": list(row.ids),
             "labels": [i if t else -100 for i, t in zip(row.ids, row.targets, strict=True)]}
            for row in rows]


def _collate(features: list[dict]) -> dict:
    import torch

    from instructmining_core.batching import pad

    ids, mask = pad([f["input_ids"] for f in features], 0)
    labels, _ = pad([f["labels"] for f in features], -100)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels)}


def against_trainer(name: str, size: str, *, tuned: bool) -> dict:
    """Runs an hour, ours and theirs, theirs before and after ours so that drift shows."""
    world = World(size)
    before, loss = trainer_seconds(world, 0, tuned=tuned)
    seconds, losses = sweep_seconds(world, RUNS[size])
    after, _ = trainer_seconds(world, 1, tuned=tuned)
    ours, theirs = 3600 * RUNS[size] / seconds, 3600 / statistics.mean([before, after])
    kind = "Trainer bf16, grouped by length" if tuned else "Trainer, defaults, float32"
    return {
        "bench": name, "peer": f"{kind}, {size}, {world.source}", "ours": round(ours),
        "theirs": round(theirs), "ratio": round(ours / theirs, 2), "unit": "runs/h",
        "loss_difference": round(losses[0] / loss - 1, 5),
        "losses_agree": abs(losses[0] / loss - 1) <= LIMIT_LOSS,
    }


def vs_trainer() -> list[dict]:
    """Against `Trainer` as people write it, at about 1 and 5 M parameters."""
    return [against_trainer("sweep_vs_trainer", size, tuned=False) for size in SHAPES]


def vs_trainer_tuned() -> list[dict]:
    """Against `Trainer` with bfloat16 and batches grouped by length."""
    return [against_trainer("sweep_vs_trainer_tuned", size, tuned=True) for size in SHAPES]


def laptop() -> list[dict]:
    """The laptop sweep: 129 runs with both evaluations, against its limit of 6 minutes."""
    world = World("1m", longest=120)
    seconds, _ = sweep_seconds(world, 129)
    return [{"bench": "sweep_laptop", "peer": f"limit for 129 runs, 1m, {world.source}",
             "ours": round(seconds, 1), "theirs": LIMIT_SECONDS,
             "ratio": round(LIMIT_SECONDS / seconds, 2), "unit": "s"}]


def matmul_share() -> list[dict]:
    """Achieved FLOP/s of training over the rate of the same matrix products, one thread each."""
    import torch

    from instructmining_core.helpers import one_thread

    rows = []
    with one_thread(), torch.random.fork_rng():
        for size in SHAPES:
            world = World(size)
            seconds, flop, rate = _train_seconds(world)
            share = flop / seconds / rate
            rows.append({
                "bench": "sweep_matmul_share" + ("" if size == "5m" else f"_{size}"),
                "peer": f"bf16 products of the same shapes, {size}, one thread",
                "ours": round(flop / seconds / 1e12, 4), "theirs": round(rate / 1e12, 4),
                "ratio": round(share / LIMIT_SHARE, 2), "unit": "TFLOP/s",
                "share": round(share, 3),
            })
    return rows


def _train_seconds(world: World) -> tuple[float, float, float]:
    """Best seconds of one training, its FLOP, and the machine's FLOP/s at its shapes."""
    from instructmining_core.packed import Body
    from instructmining_core.stacked import AdapterStack
    from instructmining_core.training import Job, train

    lm = world.load("bfloat16")
    job = Job([world.rows[h] for h in world.set(0)], 0, 0)
    times, rates = [], []
    for _ in range(3):
        stack = AdapterStack(lm.model, world.config, [0])
        stack.attach()
        body = Body(lm)
        start = time.perf_counter()
        train(stack, body, [job])
        times.append(time.perf_counter() - start)
        stack.detach()
        rates.append(_product_rate(stack, sum(map(len, job.rows)) // 8))
    return min(times), world.config.epochs * _flop(stack, lm, job.rows), max(rates)


def _flop(stack, lm, rows) -> float:
    """FLOP of one epoch: 4 x frozen weights + 6 x LoRA a token, causal attention, used logits."""
    tokens = sum(map(len, rows))
    targets = sum(sum(row.targets[1:]) for row in rows)
    frozen = sum(layer.weight.numel() for layer in stack.layers.values())
    config = lm.model.config
    pairs = sum(len(row) * (len(row) + 1) / 2 for row in rows)
    attention = 3 * 4 * pairs * config.hidden_size * config.num_hidden_layers
    head = 4 * targets * config.hidden_size * config.vocab_size
    return tokens * (4 * frozen + 6 * stack.values.shape[1]) + attention + head


def _product_rate(stack, tokens: int) -> float:
    """FLOP/s of the frozen products, forward and to the input, of one step's tokens."""
    import torch

    shapes = {tuple(layer.weight.shape) for layer in stack.layers.values()}
    pieces = [(torch.randn(tokens, i).bfloat16(), torch.randn(o, i).bfloat16()) for o, i in shapes]
    flop, start = 0.0, time.perf_counter()
    for x, weight in pieces * 20:
        (x @ weight.t()) @ weight
        flop += 4 * tokens * weight.numel()
    return flop / (time.perf_counter() - start)


BENCHES = {
    "sweep_vs_trainer": vs_trainer,
    "sweep_vs_trainer_tuned": vs_trainer_tuned,
    "sweep_matmul_share": matmul_share,
    "sweep_laptop": laptop,
}
