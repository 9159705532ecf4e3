"""The stand-in reward model: of the paper's own type, taught that a clean answer beats a defect.

It learns from libraries that give no candidate, pool or evaluation row, and from the kinds of
defect in `defects.SEEN_KINDS` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from instructmining_core.models.batching import pad
from instructmining_core.models.reward_model import GPTNeoXRewardConfig, GPTNeoXRewardModel

from .defects import SEEN_KINDS, twins
from .training import (
    Progress,
    TrainingConfig,
    at_most,
    epochs_of,
    last,
    save,
    token_ids,
    train,
    train_tokenizer,
)

PROMPTER, ASSISTANT, END, PAD = "<|prompter|>", "<|assistant|>", "<|endoftext|>", "<|padding|>"


@dataclass(frozen=True)
class RewardConfig:
    """A GPT-NeoX shape and how long it is trained."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    inner: int = 256
    vocab: int = 4096  # tokens
    pairs: int = 24  # of one step
    steps: int = 500
    max_tokens: int = 160  # of one training row
    max_positions: int = 1024  # tokens
    seed: int = 1
    training: TrainingConfig = TrainingConfig(learning_rate=2e-3)


def oasst_text(prompt: str, response: str) -> str:
    """The input form of OASST's reward models."""
    return f"{PROMPTER}{prompt}{END}{ASSISTANT}{response}{END}"


def pair_rows(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Clean answer and defective twin, one row a pair: source, kind, clean, defective (texts)."""
    frames = []
    for kind in SEEN_KINDS:
        made = twins(rows, kind, seed)
        clean = rows.set_index("id").loc[made["twin"]]
        frames.append(pd.DataFrame({
            "source": made["source"].to_numpy(),
            "kind": kind,
            "clean": [oasst_text(*p) for p in zip(clean["prompt"], clean["response"], strict=True)],
            "defective": [
                oasst_text(*p) for p in zip(made["prompt"], made["response"], strict=True)],
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def build_reward(
    folder: Path,
    learn: pd.DataFrame,
    check: pd.DataFrame,
    config: RewardConfig,
    *,
    progress: Progress = False,
) -> dict:
    """Train on pairs of the rows `learn`, check on pairs of the rows `check`, save both.

    returns : parameters, pairs seen, last loss (mean of 20 steps), and `accuracy`: kind -> share
        of held-out pairs in which the clean answer has the larger reward
    """
    learn, check = at_most(learn, config.steps * config.pairs), at_most(check, 400)
    pairs, held = pair_rows(learn, config.seed), pair_rows(check, config.seed)
    tokenizer = train_tokenizer(
        [*learn["prompt"], *learn["response"]], config.vocab, "$A",
        eos_token=END, pad_token=PAD, additional=f"{PROMPTER} {ASSISTANT}")
    clean, defective = (
        [ids[: config.max_tokens] for ids in token_ids(tokenizer, pairs[side])]
        for side in ("clean", "defective")
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = GPTNeoXRewardModel(_neox(config, tokenizer))
        lengths = np.maximum([len(r) for r in clean], [len(r) for r in defective])

        def loss_of(batch: np.ndarray) -> torch.Tensor:
            rows = [clean[i] for i in batch] + [defective[i] for i in batch]
            better, worse = _rewards(model, rows).chunk(2)
            return -functional.logsigmoid(better.float() - worse.float()).mean()

        losses = train(
            model, epochs_of(lengths, config.pairs, config.steps, config.seed), loss_of,
            config.steps, config.training, desc="stand-in reward", progress=progress,
        )  # fmt: skip
    return {
        "parameters": save(folder, model, tokenizer),
        "trained_pairs": config.steps * config.pairs,
        "loss_last": last(losses),
        "accuracy": _accuracy(model, tokenizer, held, config),
    }


def _rewards(model: GPTNeoXRewardModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids, mask = pad(rows, model.config.pad_token_id)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return model(**inputs).logits[:, 0]


@torch.inference_mode()
def _accuracy(model, tokenizer, held: pd.DataFrame, config: RewardConfig) -> dict[str, float]:
    def rewards(texts: Sequence[str]) -> np.ndarray:
        rows = [ids[: config.max_positions] for ids in token_ids(tokenizer, texts)]
        parts = [_rewards(model, rows[i : i + 64]) for i in range(0, len(rows), 64)]
        return torch.cat(parts).numpy()

    wins = rewards(held["clean"]) > rewards(held["defective"])
    return pd.Series(wins).groupby(held["kind"].to_numpy()).mean().round(4).to_dict()


def _neox(config: RewardConfig, tokenizer) -> GPTNeoXRewardConfig:
    return GPTNeoXRewardConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.inner,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        max_position_embeddings=config.max_positions, tie_word_embeddings=False, pooling="last",
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
