"""Randomly initialised LLaMAs of named sizes, with a tokenizer trained on the rows."""

from __future__ import annotations

from . import data

SHAPES = {  # name -> vocabulary, hidden size, MLP size, layers, heads
    "tiny": (512, 32, 64, 2, 2),
    "1m": (4096, 96, 256, 5, 4),
    "5m": (4096, 224, 608, 6, 4),
    "15m": (8192, 320, 864, 9, 5),
    "60m": (16384, 576, 1536, 12, 9),
    "160m": (32000, 768, 2048, 18, 12),
    "1b": (32000, 2048, 5632, 18, 32),
}


def random_llama(size: str, texts: list[str], positions: int = 512):
    """(model, tokenizer) of about `size` parameters; float32, output tied to the embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, mlp, layers, heads = SHAPES[size]
    tokenizer = data.train_tokenizer(texts, vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        # small corpora fill no large vocabulary; the matrix has its full size all the same
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=positions,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def build_lm(size: str, texts: list[str], dtype: str = "auto", device: str = "cpu"):
    """The same as an LM of this package, in the dtype that "auto" means on the device."""
    from instructmining_core.models import hub
    from instructmining_core.models.batching import keep_freed_memory
    from instructmining_core.models.causal_lm import LM

    keep_freed_memory()  # as `lm.load_lm` does; it serves both sides
    model, tokenizer = random_llama(size, texts)
    chosen = hub.pick_dtype(dtype, device)
    resolved = hub.Resolved(f"random-{size}", "seed 0", None, True)
    return LM(model.to(device, chosen).eval(), tokenizer, resolved, device, chosen)


def told(lm) -> str:
    """Its parameters in millions."""
    return f"LLaMA of {sum(p.numel() for p in lm.model.parameters()) / 1e6:.1f} M"
