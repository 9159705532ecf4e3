"""Perplexity: `lm.response_nll` against the two ways it is done elsewhere, tokenising included.

Peers, both plain transformers in the same dtype and with the same template and token ids:
- `file order, 32`: batches of 32 in file order, tokenised and right-padded batch by batch, one
  forward with full logits, float32 cross-entropy over all positions with the prompt ignored.
- `one row per call`: the same with one row (no padding, no mask), as most public scorers do.
Models are randomly initialised LLaMAs: the time does not depend on the weights' values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from . import data

LIMIT_PADDING = 1.05  # padded tokens per real token
MAX_TOKENS = 512  # of a row, as both sides cut it
SHAPES = {  # name -> vocabulary, hidden size, MLP size, layers, heads
    "1m": (4096, 96, 256, 5, 4),
    "15m": (8192, 320, 864, 9, 5),
    "60m": (16384, 576, 1536, 12, 9),
}


def build_lm(size: str, texts: list[str], dtype: str = "auto"):
    """A randomly initialised LLaMA of about `size` parameters with a BPE tokenizer of `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from instructmining_core import hub
    from instructmining_core.lm import LM

    vocabulary, hidden, mlp, layers, heads = SHAPES[size]
    tokenizer = data.train_tokenizer(texts, vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    chosen = hub.pick_dtype(dtype, "cpu")
    model = LlamaForCausalLM(config).to(chosen).eval()
    return LM(model, tokenizer, hub.Resolved(f"random-{size}", "seed 0", None, True, None), "cpu",
              chosen)


def ours(lm, conversations) -> np.ndarray:
    """Mean negative log-likelihood of each response, in nats per token."""
    from instructmining_core.lm import response_nll
    from instructmining_core.templates import encode_many

    frame = response_nll(lm, encode_many(lm.tokenizer, conversations, max_tokens=MAX_TOKENS))
    return (frame["nll"] / frame["tokens"]).to_numpy()


def theirs(lm, conversations, rows_a_call: int) -> np.ndarray:
    """The same numbers, by batches in file order with full logits."""
    import torch

    from instructmining_core.templates import encode_many

    found = []
    with torch.inference_mode():
        for start in range(0, len(conversations), rows_a_call):
            part = conversations[start : start + rows_a_call]
            encoded = encode_many(lm.tokenizer, part, max_tokens=MAX_TOKENS)
            found += _full_logits(lm.model, encoded)
    return np.array(found)


def _full_logits(model, encoded) -> list[float]:
    import torch

    width = max(len(e.ids) for e in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(encoded):
        n = len(row.ids)
        ids[i, :n], mask[i, :n] = torch.tensor(row.ids), 1
        labels[i, :n] = torch.where(torch.tensor(row.targets), ids[i, :n], -100)
    padded = {"attention_mask": mask} if len(encoded) > 1 else {}
    logits = model(input_ids=ids, use_cache=False, **padded).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    ).view(len(encoded), -1)
    return (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()


def versus(lm, conversations, rows_a_call: int, repeats: int) -> dict[str, float]:
    """Rows a second of both, medians of alternating repetitions, and their largest difference."""
    sides: dict[str, Callable] = {
        "ours": lambda: ours(lm, conversations),
        "theirs": lambda: theirs(lm, conversations, rows_a_call),
    }
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    values = {}
    ours(lm, conversations[:64])
    for _ in range(repeats):
        for side, run_side in sides.items():
            start = time.perf_counter()
            values[side] = run_side()
            seconds[side].append(time.perf_counter() - start)
    worst = float(np.nanmax(np.abs(values["ours"] - values["theirs"])))
    if not worst < 0.05:
        raise RuntimeError(f"The two sides differ by {worst} nats per token: not the same thing.")
    rate = {side: len(conversations) / statistics.median(s) for side, s in seconds.items()}
    return {**rate, "difference": worst}


def _compare(bench: str, size: str, rows: int, rows_a_call: int, repeats: int) -> dict:
    conversations, origin = data.conversations(rows)
    lm = build_lm(size, data.texts(conversations))
    found = versus(lm, conversations, rows_a_call, repeats)
    count = sum(p.numel() for p in lm.model.parameters())
    way = f"batches of {rows_a_call} in file order" if rows_a_call > 1 else "one row per call"
    return {
        "bench": bench,
        "peer": f"transformers, {way}, full logits; LLaMA {count / 1e6:.1f} M, {lm.dtype}",
        "ours": round(found["ours"], 1),
        "theirs": round(found["theirs"], 1),
        "ratio": round(found["ours"] / found["theirs"], 2),
        "unit": "rows/s",
        "data": f"{len(conversations)} contiguous rows of {origin}, template plain-1",
        "note": f"largest difference {found['difference']:.1e} nats per token",
    }


def file_order() -> list[dict]:
    """`ppl_vs_file_order` at about 1 and 15 M parameters."""
    return [_compare("ppl_vs_file_order", "1m", 2048, 32, 3),
            _compare("ppl_vs_file_order", "15m", 2048, 32, 3)]


def one_row() -> list[dict]:
    """`ppl_vs_row` at about 1 and 15 M parameters."""
    return [_compare("ppl_vs_row", "1m", 2048, 1, 3), _compare("ppl_vs_row", "15m", 2048, 1, 3)]


def file_order_60m() -> list[dict]:
    """`ppl_vs_file_order_60m`, on 256 rows."""
    return [_compare("ppl_vs_file_order_60m", "60m", 256, 32, 3)]


def one_row_60m() -> list[dict]:
    """`ppl_vs_row_60m`, on 256 rows."""
    return [_compare("ppl_vs_row_60m", "60m", 256, 1, 3)]


def padding() -> list[dict]:
    """`ppl_padding`: padded tokens per real token of our batches, against the limit."""
    from instructmining_core.batching import padded_share, token_budget_batches
    from instructmining_core.lm import BATCH_TOKENS
    from instructmining_core.templates import encode_many

    conversations, origin = data.conversations(2048)
    tokenizer = data.train_tokenizer(data.texts(conversations), 8192)
    encoded = encode_many(tokenizer, conversations, max_tokens=MAX_TOKENS)
    lengths = [len(e.ids) for e in encoded]
    share = padded_share(lengths, token_budget_batches(lengths, BATCH_TOKENS["cpu"]))
    in_order = padded_share(lengths, np.array_split(np.arange(len(lengths)), len(lengths) // 32))
    return [{
        "bench": "ppl_padding", "peer": f"limit (file order, 32 rows: {in_order:.2f})",
        "ours": round(share, 4), "theirs": LIMIT_PADDING,
        "ratio": round(LIMIT_PADDING / share, 3), "unit": "padded tokens per real token",
        "data": f"{len(conversations)} contiguous rows of {origin}, template plain-1",
    }]


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "ppl_vs_file_order": file_order,
    "ppl_vs_row": one_row,
    "ppl_vs_file_order_60m": file_order_60m,
    "ppl_vs_row_60m": one_row_60m,
    "ppl_padding": padding,
}


def run() -> list[dict]:
    """All rows of this file."""
    return [row for bench in BENCHES.values() for row in bench()]
