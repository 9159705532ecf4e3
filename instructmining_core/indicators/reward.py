"""Reward score of a response (InstructMining v3, Table 1: Rew).

The paper's model is OpenAssistant/oasst-rm-pythia-1.4b (arXiv 2304.07327). Which input form the
authors used is unknown; both are here, `form` chooses, and the one used is recorded:

oasst : `<|prompter|>I<|endoftext|><|assistant|>R<|endoftext|>`, the form that model was trained on
pair : the tokenizer's own form for two texts, what came before and the response
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from ..config import InstructMiningError, ModelRef
from ..models.batching import Failed, map_batches, pad
from ..models.heads import HEAD_PREFIX
from ..models.loading import LoadedModel, open_model
from ..models.pooled import OpenHead, open_head
from ..models.reward_model import GPTNeoXRewardConfig
from .perplexity import compute_by_head
from .turns import (
    EMPTY,
    CheckedConversation,
    Column,
    Turn,
    cut_note,
    each_turn,
    first_kept,
    mean_over_turns,
    values_and_reasons,
)

FORMS = ("oasst", "pair")
_OASST_MARKS = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}
_OASST_END = "<|endoftext|>"
NO_TOKEN = "no token to read: nothing was asked and nothing answered"
OTHER_SCALE = "another reward scale than the paper's: published coefficients do not carry over"


class CoefficientWarning(UserWarning):
    """Scores that must not meet published coefficients."""


def load_reward_model(
    ref: ModelRef, *, device: str | None = None, standins: Path | None = None, form: str = ""
) -> LoadedModel:
    """Open a reward model: any sequence classifier with one output, or a head.

    form : "oasst" or "pair"; "" takes the one that fits the model
    Warns (CoefficientWarning) for every model but a `gpt_neox_reward_model`, as the widely used
    DeBERTa one has another scale.
    """
    if form and form not in FORMS:
        raise InstructMiningError(f"input form {form!r}; known are {', '.join(FORMS)}")
    if ref.id.startswith(HEAD_PREFIX):
        warnings.warn(f"{ref.id}: {OTHER_SCALE}", CoefficientWarning, stacklevel=2)
        return open_head(ref, ("reward",), device=device)
    opened = open_model(ref, AutoModelForSequenceClassification, device=device, standins=standins)
    config = opened.model.config
    if config.num_labels != 1 and form_of(config) != "oasst":
        raise InstructMiningError(
            f"{ref.id} gives {config.num_labels} numbers a row; a reward model gives one"
        )
    if config.pad_token_id is None:
        config.pad_token_id = opened.pad_id
    opened.form, opened.note = form or form_of(config), note_of(config, form)
    if form_of(config) != "oasst":
        warnings.warn(f"{ref.id}: {OTHER_SCALE}", CoefficientWarning, stacklevel=2)
    return opened


def form_of(config) -> str:
    """The input form that fits: "oasst" for the model type trained on its marks, else "pair"."""
    oasst = config.model_type == GPTNeoXRewardConfig.model_type
    return "oasst" if oasst else "pair"


def note_of(config, form: str = "") -> str:
    """What a reader of the scores must know: the input form, and whether the scale is another."""
    note = f"input form {form or form_of(config)}"
    if form and form != form_of(config):
        note += f", not the model's own, which is {form_of(config)}"
    return note if form_of(config) == "oasst" else f"{note}; {OTHER_SCALE}"


def compute_reward(
    conversations: Sequence[CheckedConversation],
    model: LoadedModel,
    *,
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> dict[str, Column]:
    """Reward of each response given what was said before it; mean over the assistant's turns.

    model : opened by `load_reward_model`, which settles the input form
    batch_tokens : padded tokens of a batch, None for what memory holds (`LoadedModel.first_batch`)
    padding_side : "right" or "left"; the pair form keeps to the right, because classifiers like
        DeBERTa read their first position
    An empty response is scored too: the model has an opinion on silence. Over-long conversations
    lose whole messages from the left, then the response's end, and the reasons say so. A head
    (`models/heads.py`) reads its base's own template, and has no score for an empty response.
    """
    if isinstance(model, OpenHead):
        return compute_by_head(conversations, model)
    turns = list(each_turn(conversations))
    oasst = model.form == "oasst"
    side = padding_side if oasst else "right"
    rows = (_oasst_rows if oasst else _pair_rows)(turns, model) if turns else []
    filled = [row for row in rows if row["input_ids"]]
    lengths = [len(row["input_ids"]) for row in filled]
    scores = iter(map_batches(
        lambda numbers: _forward(model, [filled[i] for i in numbers], side),
        lengths, model.first_batch(batch_tokens), on_halved=model.halved,
    ))  # fmt: skip
    found = [(next(scores) if row["input_ids"] else Failed(NO_TOKEN), row["note"]) for row in rows]
    return {"reward": mean_over_turns(conversations, *values_and_reasons(found))}


@torch.inference_mode()
def _forward(model: LoadedModel, rows: Sequence[dict], side: str) -> list[float]:
    ids, mask = pad([row["input_ids"] for row in rows], model.pad_id, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if rows[0].get("token_type_ids") is not None:
        inputs["token_type_ids"] = pad([row["token_type_ids"] for row in rows], 0, side)[0]
    tensors = {name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()}
    return model.model(**tensors).logits[:, 0].double().cpu().tolist()


def _oasst_rows(turns: Sequence[Turn], model: LoadedModel) -> list[dict]:
    """Ids of each turn, message by message: every message is closed by marks of its own."""
    written = [
        [f"{_OASST_MARKS[m['role']]}{m['content']}{_OASST_END}"
         for m in (*turn.context, {"role": "assistant", "content": turn.response})]
        for turn in turns
    ]  # fmt: skip
    distinct = list(dict.fromkeys(text for texts in written for text in texts))
    ids = model.tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    known = dict(zip(distinct, ids, strict=True))
    rows = []
    for turn, texts in zip(turns, written, strict=True):
        parts = [known[text] for text in texts]
        cut = first_kept(list(map(len, parts)), model.max_tokens, len(parts) - 2)
        whole = [token for part in parts[cut:] for token in part]
        kept = whole[: model.max_tokens]
        rows.append({"input_ids": kept, "note": _note(turn, cut, len(whole) > len(kept))})
    return rows


def _pair_rows(turns: Sequence[Turn], model: LoadedModel) -> list[dict]:
    rows = []
    for turn, row in zip(turns, _pairs(turns, model), strict=True):
        cut = 0
        while len(row["input_ids"]) > model.max_tokens and cut < len(turn.context) - 1:
            cut += 1
            row = _pairs([turn], model, cut)[0]
        over = len(row["input_ids"]) > model.max_tokens
        if over:
            row = _pairs([turn], model, cut, truncation=True)[0]
        rows.append({**row, "note": _note(turn, cut, over)})
    return rows


def _pairs(turns: Sequence[Turn], model: LoadedModel, cut: int = 0, truncation: bool = False
           ) -> list[dict]:  # fmt: skip
    before = ["\n\n".join(m["content"] for m in turn.context[cut:]) for turn in turns]
    batch = model.tokenizer(
        before, [turn.response for turn in turns], verbose=False, return_attention_mask=False,
        truncation=truncation, max_length=model.max_tokens if truncation else None,
    )  # fmt: skip
    types = batch.get("token_type_ids") or [None] * len(turns)
    return [
        {"input_ids": ids, "token_type_ids": kinds}
        for ids, kinds in zip(batch["input_ids"], types, strict=True)
    ]


def _note(turn: Turn, cut: int, truncated: bool) -> str:
    empty = "" if turn.response else EMPTY
    return "; ".join(filter(None, [empty, cut_note(cut, truncated)]))
