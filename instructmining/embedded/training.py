"""What the three stand-ins share: a tokenizer of their own, batches, one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from instructmining_core.models import hub
from instructmining_core.models.memory import keep_freed_memory

OnProgress = Callable[[int, int], None]  # told (steps done, all steps) after each step


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with warm-up and a cosine to a tenth of the peak."""

    learning_rate: float = 3e-3  # peak
    warmup_share: float = 0.06  # of all steps
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0  # largest gradient norm


def train_tokenizer(
    texts: Iterable[str], vocab: int, template: str, words: Sequence[str] = (), **special: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be written, and no token is unknown.

    vocab : number of tokens, special ones and the 256 bytes counted
    template : what a single text becomes, in the words of `TemplateProcessing` ("<s> $A")
    words : words that must be one token each
    special : `eos_token="</s>"`, ...; each becomes a special token, "</s>" in a text is parsed as
        one. `additional` : further special tokens, space separated
    """
    more = special.pop("additional", "").split()
    marks = list(dict.fromkeys([*special.values(), *more]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=marks, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    repeated = (word for word in words for _ in range(5000))
    backend.train_from_iterator((t for part in (texts, repeated) for t in part), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(mark, backend.token_to_id(mark)) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        additional_special_tokens=more, **special,
    )  # fmt: skip


def save(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> int:
    """Both in Hugging Face layout, weights as safetensors; returns the number of parameters."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file: nothing to wait for
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def last(losses: Sequence[float], steps: int = 20) -> float | None:
    """Mean loss of the last steps; None for a model that made none."""
    return float(np.mean(losses[-steps:])) if losses else None


def at_most(rows: pd.DataFrame, wanted: int) -> pd.DataFrame:
    """A fixed random part of the rows, in their order; never fewer than 256, if they are there."""
    wanted = max(wanted, 256)
    return rows if len(rows) <= wanted else rows.sample(wanted, random_state=0).sort_index()


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special token added."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def bucketed(lengths: Sequence[int], rows: int, seed: int) -> list[np.ndarray]:
    """One epoch of batches of `rows` positions, alike in length, in random order.

    Lengths are sorted within random chunks of 40 batches only, so batches differ between seeds.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    lengths = np.asarray(lengths)
    batches = []
    for start in range(0, len(order), 40 * rows):
        chunk = order[start : start + 40 * rows]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + rows] for i in range(0, len(chunk), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def epochs_of(lengths: Sequence[int], rows: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches, epoch after epoch."""
    done, epoch = 0, 0
    while done < steps:
        for batch in bucketed(lengths, rows, seed + epoch)[: steps - done]:
            yield batch
            done += 1
        epoch += 1


def train_tiny(
    model: nn.Module,
    batches: Iterable,
    loss_of: Callable[[object], torch.Tensor],
    steps: int,
    config: TrainingConfig,
    on_progress: OnProgress,
) -> list[float]:
    """Train a model in place; the loss of every step.

    loss_of : batch -> scalar loss. It runs under bfloat16 autocast where the processor computes in
        it; the weights stay float32.
    """
    keep_freed_memory()
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=config.betas, foreach=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps, config))
    half = hub.pick_dtype("auto", "cpu") is torch.bfloat16
    losses = []
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        on_progress(len(losses), steps)
    model.eval()
    return losses


def _rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at a step (from 0)."""
    warm = max(1, round(config.warmup_share * steps))
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
