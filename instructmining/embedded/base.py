"""The stand-in base model: LLaMA-shaped, about a million parameters, trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from instructmining_core.data.tokenization import segments

from .training import Progress, TrainingConfig, last, save, token_ids, train, train_tokenizer

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class BaseConfig:
    """A LLaMA shape and how long it is trained."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 352  # width of the feed-forward layers
    vocab: int = 4096  # tokens
    context: int = 256  # tokens of one packed training row
    rows: int = 8  # packed rows of one step
    steps: int = 750
    max_positions: int = 1024  # tokens
    seed: int = 0
    training: TrainingConfig = TrainingConfig(learning_rate=4e-3)


def documents(rows: pd.DataFrame, asked_share: float = 0.3, seed: int = 0) -> list[str]:
    """The base model's text: what is said about one function is one document.

    rows : the split `base_text` (symbol, prompt, response, messages)
    asked_share : share of functions written as questions and answers in the study's template, the
        others are plain text under the function's name
    """
    asked_rng = np.random.default_rng(seed)
    texts = []
    for symbol, part in rows.groupby("symbol", sort=True):
        if asked_rng.random() < asked_share:
            texts += ["".join(text for text, _ in segments(m, "")) for m in part["messages"]]
        else:
            texts.append("\n\n".join([symbol, *part["response"]]))
    return texts


def build_base(
    folder: Path, texts: Sequence[str], config: BaseConfig, *, progress: Progress = False
) -> dict:
    """Train tokenizer and model on `texts` and save both in Hugging Face layout.

    folder : exists; receives config.json, model.safetensors and the tokenizer's files
    returns : parameters, tokens of the text, tokens trained, first and last loss (nats per token,
        mean of 20 steps)
    Raises ValueError where the text is shorter than one step of packed rows.
    """
    tokenizer = train_tokenizer(
        texts, config.vocab, f"{BOS} $A", bos_token=BOS, eos_token=EOS, pad_token=PAD)
    packed = pack(token_ids(tokenizer, texts), config.context, tokenizer.bos_token_id,
                  tokenizer.eos_token_id, config.seed)
    if len(packed) < config.rows:
        raise ValueError(
            f"The base model's text gives {len(packed)} rows of {config.context} tokens, fewer "
            f"than the {config.rows} of one step; give more text or lower `rows`.")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(_llama(config, tokenizer))
        losses = train(
            model, _steps(packed, config),
            lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
            config.steps, config.training, desc="stand-in base", progress=progress,
        )  # fmt: skip
    return {
        "parameters": save(folder, model, tokenizer),
        "text_tokens": int(packed.size),
        "trained_tokens": config.steps * config.rows * config.context,
        "loss_first": last(losses[:20]),
        "loss_last": last(losses),
    }


def pack(
    ids: Sequence[Sequence[int]], context: int, bos: int, eos: int, seed: int
) -> np.ndarray:
    """Documents in random order, each between bos and eos, cut into rows of `context` tokens.

    returns : int64, shape (rows, context); the last, incomplete row is left out
    """
    order = np.random.default_rng(seed).permutation(len(ids))
    flat = [token for i in order for token in (bos, *ids[i], eos)]
    rows = len(flat) // context
    return np.array(flat[: rows * context], dtype=np.int64).reshape(rows, context)


def _steps(packed: np.ndarray, config: BaseConfig) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(config.seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        if len(order) < config.rows:
            order = np.concatenate([order, rng.permutation(len(packed))])
        taken, order = order[: config.rows], order[config.rows :]
        yield torch.from_numpy(packed[taken])


def _llama(config: BaseConfig, tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.inner,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.heads, max_position_embeddings=config.max_positions,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )  # fmt: skip
