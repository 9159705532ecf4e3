"""A model opened for scoring or finetuning: pinned, tensors only, no remote code."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

from ..config import ModelRef
from . import batching, hub

UNLIMITED = 1_000_000  # tokenizers without a limit say 10^30
BATCH_TOKENS = {"cpu": 16_384, "cuda": 65_536}  # padded tokens of a batch at most
_LONGEST = 4096  # tokens of a row, where neither model nor tokenizer names a limit


@dataclass
class LoadedModel:
    """What an indicator needs of a model.

    model : the Hugging Face model, None where only the tokenizer is used
    dtype : torch dtype of the computation, "" for a tokenizer alone
    max_tokens : longest row, in tokens
    note : what a reader of the scores must know, "" for nothing
    form : input form of a reward model (`reward.FORMS`), "" for other models
    batch_limit : padded tokens of a batch that memory was found to hold; 0 before it ran out
    """

    batch_tokens: ClassVar[dict[str, int]] = BATCH_TOKENS

    model: Any
    tokenizer: Any
    resolved: hub.Resolved
    device: str = "cpu"
    dtype: Any = ""
    max_tokens: int = 0
    note: str = ""
    form: str = ""
    batch_limit: int = 0

    def first_batch(self, asked: int | None = None, config: Any = None) -> int:
        """Padded tokens of the first batch: those asked for, else what memory holds up to a cap.

        config : of the model, where it is not `model.config`
        """
        if asked is None:
            kind = self.device.split(":")[0]
            config = config or getattr(self.model, "config", None)
            asked = self.batch_tokens[kind]
            if config is not None:  # a table of word vectors has none, and needs no memory
                free = batching.SHARE[kind] * batching.free_bytes(self.device)
                rows = self.logit_rows()
                fits = batching.fitting_tokens(config, self.dtype.itemsize, free, rows)
                asked = min(asked, fits)
        return min(asked, self.batch_limit or asked)

    def logit_rows(self) -> float:
        """Tokens whose logits are made at once: a scorer has none, but a number or two a row."""
        return 0

    def halved(self, tokens: int) -> None:
        """Remember, for later calls, the budget to which memory cut a batch."""
        self.batch_limit = tokens

    @property
    def pad_id(self) -> int:
        """Id that fills rows; it is masked, so any id does where there is no pad token."""
        named = [getattr(self.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos")]
        return next((one for one in named if one is not None), 0)


def open_model(
    ref: ModelRef, auto_class, *, device: str | None = None, standins: Path | None = None
) -> LoadedModel:
    """Load weights and tokenizer by an Auto class.

    ref, standins : as in `hub.resolve`; `ref.dtype` as in `hub.pick_dtype`
    auto_class : `AutoModelForSequenceClassification`, `AutoModelForCausalLM`, ...
    device : "cpu", "cuda", "cuda:1"; None takes a GPU where there is one

    An adapter is laid over its base and merged into it, in float32. Attention is sdpa where the
    model has it. Raises HubError for weights that hold more than tensors, and for a model that
    wants to run code of its own.
    """
    batching.keep_freed_memory()
    device = device or hub.pick_device()
    dtype = hub.pick_dtype(ref.dtype, device)
    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    try:
        model = _weights(resolved.folder, auto_class, dtype, standins)
        tokenizer = _tokenizer(resolved.folder, standins)
    except pickle.UnpicklingError as error:
        raise hub.HubError(f"The weights of {ref.id} hold more than tensors, and are not loaded: "
                           f"{str(error).splitlines()[0]}") from error
    except hub.HubError:
        raise
    except (ValueError, RuntimeError, ImportError, OSError, KeyError, AttributeError,
            SafetensorError) as error:  # fmt: skip
        if "trust_remote_code" in str(error) or "model type" in str(error):
            raise hub.HubError(
                f"{ref.id} needs its own code, which is never run here, or its model type is not "
                "known to the installed transformers. Choose a model that transformers has."
            ) from error
        why = next(iter(str(error).splitlines()), "")
        if isinstance(error, SafetensorError):
            why += " (its weights are cut, or a Git LFS pointer: fetch them again)"
        raise hub.HubError(f"{ref.id} cannot be loaded: {type(error).__name__}: {why}") from error
    _check_ids(ref.id, model, tokenizer)
    longest = token_limit(model, tokenizer)
    return LoadedModel(model.to(device).eval(), tokenizer, resolved, device, dtype, longest)


def _check_ids(name: str, model, tokenizer) -> None:
    """Raise HubError where a token that texts can give lies outside the model's embeddings.

    A pad token outside is replaced (padding is masked), a missing eos by the token that ends a
    text: perplexities leave it out.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", tokenizer.vocab_size)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token or tokenizer.pad_token
    for what, last in (("vocabulary", tokenizer.vocab_size - 1), ("eos", tokenizer.eos_token_id)):
        if last is not None and last >= rows:
            raise hub.HubError(f"{name}: token {last} of the tokenizer ({what}) is outside the "
                               f"model's {rows} embeddings")  # fmt: skip
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def open_tokenizer(ref: ModelRef, *, standins: Path | None = None) -> LoadedModel:
    """The tokenizer of a model, without its weights in memory."""
    resolved = hub.fetch(hub.resolve(ref, standins=standins))
    return LoadedModel(None, _tokenizer(resolved.folder, standins), resolved)


def _weights(folder: Path, auto_class, dtype, standins: Path | None):
    # An adapter is found by transformers too, but its base only by a name that transformers knows.
    base = hub.adapter_base(folder)
    if base is None:
        model, told = auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False,
                                                 output_loading_info=True)  # fmt: skip
        if lacking := sorted(told["missing_keys"]):
            raise hub.HubError(
                f"{folder} lacks {len(lacking)} weights of a {type(model).__name__}, the first is "
                f"{lacking[0]}: they would be random. It is cut, or a model of another kind"
            )
        return model
    import torch
    from peft import PeftModel

    under = hub.fetch(hub.resolve(base, standins=standins)).folder
    model = _weights(under, auto_class, torch.float32, standins)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().to(dtype)


def _tokenizer(folder: Path, standins: Path | None):
    """The tokenizer in a folder; for an adapter without one its base's."""
    from transformers import AutoTokenizer

    base = hub.adapter_base(folder)
    if base is not None and not list(folder.glob("tokenizer*")):
        folder = hub.fetch(hub.resolve(base, standins=standins)).folder
        return _tokenizer(folder, standins)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # what transformers raises, by kind of file
        raise hub.HubError(
            f"{folder}: the tokenizer is not there or cannot be opened: put the model's own "
            "(tokenizer.json and tokenizer_config.json) beside its weights; transformers says: "
            f"{str(error).splitlines()[0]}"
        ) from None


def token_limit(model, tokenizer) -> int:
    """Longest row that model and tokenizer take, in tokens, and never more than 4,096."""
    named = (getattr(tokenizer, "model_max_length", None),
             getattr(model.config, "max_position_embeddings", None))  # fmt: skip
    return min([_LONGEST, *(int(n) for n in named if n and 0 < n < UNLIMITED)])


def identity(model: LoadedModel | None) -> dict:
    """Id, revision, dtype and stand-in flag of an opened model, for keys and cards."""
    if model is None:
        return {"model": "", "revision": "", "dtype": "", "stand_in": False, "note": ""}
    return {
        "model": model.resolved.id, "revision": model.resolved.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "stand_in": bool(model.resolved.stand_in), "note": model.note,
    }  # fmt: skip
