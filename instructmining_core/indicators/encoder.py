"""Sentence embeddings, unit rows (Reimers & Gurevych 2019, arXiv 1908.10084).

Any sentence-transformers model. The paper does not name its encoder; ours is all-MiniLM-L6-v2, as
in both public re-implementations. Rows are sorted by tokens instead of characters and batched by a
token budget; where the hardware computes in bfloat16 the forward pass runs under autocast (cosine
to float32 >= 0.999, which a test holds). int8 is not offered: its error is as large as the distance
between neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from instructmining_core import hub
from instructmining_core.batching import Failed, map_batches
from instructmining_core.indicators.opened import Opened
from instructmining_core.indicators.text import Conversation


def load(ref, *, device: str | None = None, standins: Path | None = None) -> Opened:
    """Open a sentence-transformers model; its own `max_seq_length` is kept."""
    device = device or hub.pick_device()
    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    model = SentenceTransformer(
        str(resolved.folder), device=device, trust_remote_code=False, local_files_only=True,
        model_kwargs={"use_safetensors": True},
    )  # fmt: skip
    dtype = hub.pick_dtype(ref.dtype, device)
    return Opened(model.eval(), model.tokenizer, resolved, device, dtype, model.max_seq_length)


def text_of(conversation: Conversation) -> str:
    """What of a row is embedded: all messages, one a line (our choice; the paper's: unknown)."""
    return "\n".join(m["content"] for m in conversation.messages)


@torch.inference_mode()
def embed(
    model: Opened, texts: Sequence[str], *, batch_tokens: int = 16384, progress: bool = False
) -> np.ndarray:
    """Embeddings of texts.

    batch_tokens : padded tokens of a batch
    returns : float32, shape (len(texts), dim), rows of length 1; NaN for a row that did not fit
        into memory
    """
    longest = 64 * model.max_tokens  # characters; what comes later never reaches the model
    texts = [text[:longest] for text in texts]
    lengths = token_counts(model, texts)

    def batch(rows: np.ndarray) -> list[np.ndarray]:
        return list(_forward(model, [texts[i] for i in rows]))

    found = map_batches(batch, lengths, batch_tokens, progress, "embeddings")
    dim = model.model.get_embedding_dimension()
    out = np.full((len(texts), dim), np.nan, dtype=np.float32)
    for row, vector in enumerate(found):
        if not isinstance(vector, Failed):
            out[row] = vector
    return out


def token_counts(model: Opened, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text as the encoder sees it, at most its `max_seq_length`."""
    counts: list[int] = []
    for start in range(0, len(texts), 4096):
        ids = model.tokenizer(
            list(texts[start : start + 4096]), truncation=True, max_length=model.max_tokens,
            return_attention_mask=False, verbose=False,
        )["input_ids"]  # fmt: skip
        counts.extend(map(len, ids))
    return np.array(counts, dtype=np.int64)


def _forward(model: Opened, texts: list[str]) -> np.ndarray:
    features = model.model.preprocess(texts)
    features = {
        name: value.to(model.device) if torch.is_tensor(value) else value
        for name, value in features.items()
    }
    with torch.autocast(
        torch.device(model.device).type, dtype=model.dtype, enabled=model.dtype != torch.float32
    ):
        vectors = model.model(features)["sentence_embedding"]
    return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
