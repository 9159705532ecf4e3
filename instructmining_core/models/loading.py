"""A model opened for scoring, and how one is pinned, loaded and named in keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import ModelRef
    from .hub import Resolved

UNLIMITED = 1_000_000  # tokenizers without a limit say 10^30
BATCH_TOKENS = {"cpu": 16_384, "cuda": 65_536}  # padded tokens of a batch at most


@dataclass
class LoadedModel:
    """What an indicator needs of a model.

    model : the Hugging Face model, None where only the tokenizer is used
    tokenizer : its tokenizer
    resolved : id, revision, folder and whether it is a stand-in
    device : "cpu" or "cuda"
    dtype : torch dtype of the computation, "" for a tokenizer alone
    max_tokens : longest row, in tokens
    note : what a reader of the scores must know, "" for nothing
    form : input form of a reward model (`reward.FORMS`), "" for other models
    batch_limit : padded tokens of a batch that memory was found to hold; 0 before it ran out
    """

    model: Any
    tokenizer: Any
    resolved: Resolved
    device: str = "cpu"
    dtype: Any = ""
    max_tokens: int = 0
    note: str = ""
    form: str = ""
    batch_limit: int = 0

    def first_batch(self, asked: int | None = None, config: Any = None) -> int:
        """Padded tokens of the first batch: those asked for, else what memory holds up to a cap.

        config : of the model, where it is not `model.config`

        No logits are counted: a scorer's head is a number or two a row.
        """
        from .memory import SHARE, fitting_tokens, free_bytes

        if asked is None:
            kind = self.device.split(":")[0]
            config = config or getattr(self.model, "config", None)
            asked = BATCH_TOKENS[kind]
            if config is not None:  # a table of word vectors has none, and needs no memory
                free = SHARE[kind] * free_bytes(self.device)
                asked = min(asked, fitting_tokens(config, self.dtype.itemsize, free, 0))
        return min(asked, self.batch_limit or asked)

    def halved(self, tokens: int) -> None:
        """Remember, for later calls, the budget to which memory cut a batch."""
        self.batch_limit = tokens

    @property
    def pad_id(self) -> int:
        """Id that fills rows; it is masked, so any id does where there is no pad token."""
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return getattr(self.tokenizer, name)
        return 0


def open_model(
    ref: ModelRef, auto_class, *, device: str | None = None, standins: Path | None = None
) -> LoadedModel:
    """Load weights and tokenizer by an Auto class: pinned, safetensors, no remote code.

    ref, standins : as in `hub.resolve`; `ref.dtype` as in `hub.pick_dtype`
    auto_class : `AutoModelForSequenceClassification`, `AutoModelForSeq2SeqLM`, ...
    """
    from transformers import AutoTokenizer

    from . import hub
    from .memory import keep_freed_memory

    keep_freed_memory()
    device = device or hub.pick_device()
    dtype = hub.pick_dtype(ref.dtype, device)
    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder, trust_remote_code=False)
    model = auto_class.from_pretrained(
        resolved.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return LoadedModel(
        model.to(device).eval(), tokenizer, resolved, device, dtype, token_limit(model, tokenizer)
    )


def open_tokenizer(ref: ModelRef, *, standins: Path | None = None) -> LoadedModel:
    """The tokenizer of a model, without its weights in memory."""
    from transformers import AutoTokenizer

    from . import hub

    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder, trust_remote_code=False)
    return LoadedModel(None, tokenizer, resolved)


def token_limit(model, tokenizer, most: int = 4096) -> int:
    """Longest row that model and tokenizer take, in tokens; `most` where neither names a limit."""
    named = (
        getattr(tokenizer, "model_max_length", None),
        getattr(model.config, "max_position_embeddings", None),
    )
    return min([most, *(int(n) for n in named if n and 0 < n < UNLIMITED)])


def identity(model) -> dict:
    """Id, revision, dtype and stand-in flag of an opened model (or an LM), for keys and cards."""
    if model is None:
        return {"model": "", "revision": "", "dtype": "", "stand_in": False, "note": ""}
    resolved = model.resolved
    return {
        "model": resolved.id,
        "revision": resolved.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "stand_in": bool(resolved.stand_in),
        "note": getattr(model, "note", ""),
    }
