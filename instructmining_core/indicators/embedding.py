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
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..config import ModelRef
from ..models import hub
from ..models.batching import Failed, keep_freed_memory, map_batches, pad
from ..models.loading import UNLIMITED, LoadedModel
from .surface import count_tokens
from .turns import CheckedConversation, cut_note, first_kept


def load_encoder(
    ref: ModelRef, *, device: str | None = None, standins: Path | None = None
) -> LoadedModel:
    """Open a sentence-transformers model; its own `max_seq_length` is kept."""
    keep_freed_memory()
    device = device or hub.pick_device()
    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    model = SentenceTransformer(
        str(resolved.folder), device=device, trust_remote_code=False, local_files_only=True,
    )  # fmt: skip
    dtype = hub.pick_dtype(ref.dtype, device)
    most = int(min(model.max_seq_length or UNLIMITED, UNLIMITED))
    tokenizer = model.tokenizer
    if isinstance(tokenizer, Tokenizer):  # of a table of word vectors: it can't be called
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return LoadedModel(model.eval(), tokenizer, resolved, device, dtype, most)


def text_of(conversation: CheckedConversation, first: int = 0) -> str:
    """What of a row is embedded: all messages from number `first` on, one a line (our choice; the
    paper's: unknown).
    """
    return "\n".join(m["content"] for m in conversation.messages[first:])


def encoder_texts(
    model: LoadedModel, conversations: Sequence[CheckedConversation]
) -> tuple[list[str], list[str]]:
    """The text of each readable row that the encoder is given, and a note on what was cut of it.

    A model reads its first `max_seq_length` tokens. Of a longer conversation whole messages go from
    the left, the last question and answer never; what is still too long loses its end.
    """
    cuts = _first_messages(model, conversations)
    texts = [text_of(c, cut) for c, cut in zip(conversations, cuts, strict=True)]
    longest = 64 * model.max_tokens
    counts = count_tokens([text[:longest] for text in texts], model.tokenizer)
    return texts, [
        cut_note(cut, count > model.max_tokens or len(text) > longest)
        for text, cut, count in zip(texts, cuts, counts, strict=True)
    ]


def _first_messages(model: LoadedModel, conversations: Sequence[CheckedConversation]) -> list[int]:
    """How many leading messages of each row are left out so that the rest fits."""
    several = [i for i, c in enumerate(conversations) if len(c.messages) > 2]
    longest = 64 * model.max_tokens  # characters: as good as all of them where a message has more
    parts = [[m["content"][:longest] + "\n" for m in conversations[i].messages] for i in several]
    counts = iter(count_tokens([part for row in parts for part in row], model.tokenizer,
                               add_special_tokens=False))  # fmt: skip
    room = model.max_tokens - model.tokenizer.num_special_tokens_to_add(pair=False)
    cuts = [0] * len(conversations)
    for i, row in zip(several, parts, strict=True):
        last = (conversations[i].ends or (0,))[-1] - 1
        cuts[i] = first_kept([next(counts) for _ in row], room, last)
    return cuts


@torch.inference_mode()
def embed(
    model: LoadedModel, texts: Sequence[str], *, batch_tokens: int | None = None,
    progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Embeddings of texts.

    batch_tokens : padded tokens of a batch, None for what memory holds (`LoadedModel.first_batch`)
    returns : float32, shape (len(texts), dim), rows of length 1; NaN for a row that did not fit
        into memory
    """
    longest = 64 * model.max_tokens  # characters; what comes later never reaches the model
    texts = [text[:longest] for text in texts]
    read = _read_once(model, texts)
    lengths = np.minimum(count_tokens(texts, model.tokenizer), model.max_tokens) \
        if read is None else [len(row["input_ids"]) for row in read]

    def batch(rows: np.ndarray) -> list[np.ndarray]:
        if read is None:
            return list(_forward(model, model.model.preprocess([texts[i] for i in rows])))
        return list(_forward(model, _padded(model, [read[i] for i in rows])))

    budget = model.first_batch(batch_tokens, getattr(model.model[0], "config", None))
    found = map_batches(batch, lengths, budget, progress, "embeddings", on_halved=model.halved)
    dim = model.model.get_embedding_dimension()
    out = np.full((len(texts), dim), np.nan, dtype=np.float32)
    for row, vector in enumerate(found):
        if not isinstance(vector, Failed):
            out[row] = vector
    return out


def _read_once(model: LoadedModel, texts: Sequence[str]) -> list[dict[str, np.ndarray]] | None:
    """What the model's own preprocessing makes of each text, without padding; None where that is
    more than a row of numbers a text, as for a table of word vectors.
    """
    rows: list[dict[str, np.ndarray]] = []
    for start in range(0, len(texts), 1024):
        found = model.model.preprocess(list(texts[start : start + 1024]))
        tensors = {name: value for name, value in found.items() if torch.is_tensor(value)}
        mask = tensors.get("attention_mask")
        if mask is None or any(value.shape != mask.shape for value in tensors.values()):
            return None
        real = mask.bool().numpy()
        arrays = {name: value.numpy().astype(np.int32) for name, value in tensors.items()}
        rows += [{name: array[i][real[i]] for name, array in arrays.items()}
                 for i in range(len(real))]  # fmt: skip
    return rows


def _padded(model: LoadedModel, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows of `_read_once` as the features of one batch."""
    side = getattr(model.tokenizer, "padding_side", "right")
    fill = {"input_ids": model.pad_id}
    return {
        name: torch.from_numpy(pad([row[name] for row in rows], fill.get(name, 0), side)[0])
        for name in rows[0]
    }


def _forward(model: LoadedModel, features: dict) -> np.ndarray:
    features = {
        name: value.to(model.device) if torch.is_tensor(value) else value
        for name, value in features.items()
    }
    with torch.autocast(
        torch.device(model.device).type, dtype=model.dtype, enabled=model.dtype != torch.float32
    ):
        vectors = model.model(features)["sentence_embedding"]
    return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
