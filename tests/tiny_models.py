"""Small randomly initialised checkpoints of exactly the real architectures, and rows to score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from instructmining_core.indicators.turns import CheckedConversation, read
from instructmining_core.models.reward_model import GPTNeoXRewardConfig, GPTNeoXRewardModel

WORDS = (
    "sort the list of items and give it back in order please write a short poem about rain "
    "question Is this a natural coherent response in the dialogue history Yes No value of sum"
).split()

# Two kernels (one row or a batch, AVX2 or AVX512, one thread or several) add the same n float32
# terms in other orders and may part by 2 n 2^-24 of the sum of the terms' sizes (Higham 2002,
# Accuracy and Stability of Numerical Algorithms, eq. 3.5). The products of the models here have
# n <= 64 terms, and about a dozen follow each other behind norms: 12 x 2 x 64 x 6e-8 = 1e-4 of the
# largest value. What the tests look for (padding that is seen, a wrong token) is far above that.
FLOAT32 = 1e-4


def assert_rounded(ours, other, share: float = FLOAT32) -> None:
    """Equal but for rounding: nowhere further apart than this share of the largest value."""
    other = np.asarray(other, dtype=np.float64)
    np.testing.assert_allclose(ours, other, rtol=0, atol=share * np.abs(other).max())


# MiniLM's products have up to 1,536 terms and 36 follow each other. Rounding errors add up like a
# random walk (Higham and Mary 2019, doi 10.1137/18M1226312): sqrt(36 x 1536) x 6e-8 = 1.4e-5 of
# a row's length, which is 1, and twice that between two computations.
MINILM = 3e-5


def within_minilm_rounding(ours: np.ndarray, other: np.ndarray) -> bool:
    """Whether rows of two computations are no further apart than float32 allows."""
    return bool(np.linalg.norm(ours - other, axis=1).max(initial=0) <= MINILM)


def single(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sample_messages(count: int, seed: int = 0, longest: int = 40) -> list[list[dict[str, str]]]:
    """Rows of very different lengths; every fifth has two turns."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        size = int(torch.randint(1, longest, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (size,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picks)

    rows = [single(text(), text()) for _ in range(count)]
    for i in range(0, count, 5):
        rows[i] += single(text(), text())
    return rows


def sample_rows(count: int, seed: int = 0, longest: int = 40) -> list[CheckedConversation]:
    return [read(messages) for messages in sample_messages(count, seed, longest)]


def byte_tokenizer(special: list[str], template: processors.TemplateProcessing | None = None,
                   **named: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    if template is not None:
        tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_oasst_reward(folder: Path, pooling: str = "last") -> Path:
    special = ["<|padding|>", "<|endoftext|>", "<|prompter|>", "<|assistant|>", "<|system|>"]
    tokenizer = byte_tokenizer(special, pad_token="<|padding|>", eos_token="<|endoftext|>")
    torch.manual_seed(1)
    config = GPTNeoXRewardConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=256, pooling=pooling, initializer_range=0.3,
    )
    GPTNeoXRewardModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_deberta_reward(folder: Path) -> Path:
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = byte_tokenizer(
        ["[PAD]", "[CLS]", "[SEP]"], template,
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
    )
    torch.manual_seed(2)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=192, type_vocab_size=0, num_labels=1,
        relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        pad_token_id=0, initializer_range=0.3, pooler_hidden_size=32,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path, tied: bool = True) -> Path:
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = byte_tokenizer(
        ["<pad>", "</s>"], template, pad_token="<pad>", eos_token="</s>"
    )
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
        initializer_factor=1.0, feed_forward_proj="relu" if tied else "gated-gelu",
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
