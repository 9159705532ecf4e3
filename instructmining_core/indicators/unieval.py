"""Naturalness, coherence and understandability (UniEval, Zhong et al. 2022, arXiv 2210.07197).

UniEval asks a T5 a yes-or-no question; the score is P(Yes) / (P(Yes) + P(No)) at the first decoder
step, which is the sigmoid of the difference of two logits: one decoder step and two rows of the
vocabulary are enough. Prompts as in InstructMining v3 (model MingZhong/unieval-dialog, longest
input 1024 tokens). With several messages before the response the dialogue history is these, one a
line. The model was trained on English dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM

from ..config import InstructMiningError, ModelRef
from ..models.batching import Failed, map_batches, pad
from ..models.heads import HEAD_PREFIX
from ..models.loading import LoadedModel, open_model
from ..models.pooled import OpenHead, open_head
from .perplexity import compute_by_head
from .turns import (
    EMPTY,
    CheckedConversation,
    Column,
    Turn,
    cut_note,
    each_turn,
    mean_over_turns,
    values_and_reasons,
)

MAX_TOKENS = 1024
_LONGEST = 64 * MAX_TOKENS  # characters; what comes later never reaches the model
QUESTIONS = {
    "naturalness": "question: Is this a natural response in the dialogue? </s> "
    "response: {response}",
    "coherence": "question: Is this a coherent response given the dialogue history? </s> "
    "response: {response} </s> dialogue history: {history}",
    "understandability": "question: Is this an understandable response in the dialogue? </s> "
    "response: {response}",
}


def load_evaluator(
    ref: ModelRef, *, device: str | None = None, standins: Path | None = None
) -> LoadedModel:
    """Open an evaluator: an encoder-decoder whose tokenizer tells "Yes" from "No", or a head."""
    if ref.id.startswith(HEAD_PREFIX):
        return open_head(ref, tuple(QUESTIONS), device=device)
    opened = open_model(ref, AutoModelForSeq2SeqLM, device=device, standins=standins)
    opened.max_tokens = MAX_TOKENS
    answer_ids(opened.tokenizer)
    return opened


def answer_ids(tokenizer) -> tuple[int, int]:
    """First token of "Yes" and of "No", as UniEval takes them."""
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    if yes == no:
        raise InstructMiningError(
            "the tokenizer gives Yes and No the same first token; this is no UniEval model"
        )
    return yes, no


def compute_unieval(
    conversations: Sequence[CheckedConversation],
    model: LoadedModel,
    *,
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> dict[str, Column]:
    """The three scores of each response, 0 to 1; mean over the assistant's turns.

    All questions of all turns are pooled and sorted by length together. An empty response is NaN.
    A history that does not fit loses its first messages; what is still too long is cut at its end.

    batch_tokens : padded tokens of a batch, None for what memory holds (`LoadedModel.first_batch`)
    """
    if isinstance(model, OpenHead):
        return compute_by_head(conversations, model)
    asked = [(name, turn) for turn in each_turn(conversations) for name in QUESTIONS]
    ids, notes = _encode([(name, turn) for name, turn in asked if turn.response], model)
    scores = map_batches(
        lambda rows: yes_share(model, [ids[i] for i in rows], padding_side),
        [len(row) for row in ids], model.first_batch(batch_tokens), on_halved=model.halved,
    )  # fmt: skip
    found = zip(scores, notes, strict=True)
    told = [next(found) if turn.response else (Failed(EMPTY), "") for _, turn in asked]
    return {
        name: mean_over_turns(conversations, *values_and_reasons(told[i :: len(QUESTIONS)]))
        for i, name in enumerate(QUESTIONS)
    }


def prompt(name: str, turn: Turn, cut: int = 0) -> str:
    """The text of one question; `cut` first messages of the history are left out."""
    history = "\n".join(m["content"] for m in turn.context[cut:])
    return QUESTIONS[name].format(response=turn.response[:_LONGEST], history=history[:_LONGEST])


@torch.inference_mode()
def yes_share(model: LoadedModel, rows: Sequence[Sequence[int]], side: str) -> list[float]:
    """P(Yes) / (P(Yes) + P(No)) after one decoder step, for rows of token ids."""
    ids, mask = (torch.from_numpy(a).to(model.device) for a in pad(rows, model.pad_id, side))
    t5 = model.model
    encoded = t5.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    start = torch.full((len(rows), 1), t5.config.decoder_start_token_id, device=model.device)
    hidden = t5.get_decoder()(
        input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[:, 0].float()  # fmt: skip
    if _scaled(t5.config):
        hidden = hidden * t5.config.d_model**-0.5
    yes, no = answer_ids(model.tokenizer)
    weight = t5.get_output_embeddings().weight
    difference = hidden @ (weight[yes].float() - weight[no].float())
    return torch.sigmoid(difference.double()).cpu().tolist()


def _scaled(config) -> bool:
    """Whether decoder outputs are scaled before the head: T5 1.0 does, with tied embeddings."""
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))


def _encode(questions, model: LoadedModel) -> tuple[list[list[int]], list[str]]:
    ids = _tokens([prompt(name, turn) for name, turn in questions], model)
    notes = [""] * len(ids)
    for i, (name, turn) in enumerate(questions):
        cut = 0
        most = len(turn.context) - 1 if name == "coherence" else 0
        while len(ids[i]) > model.max_tokens and cut < most:
            cut += 1
            ids[i] = _tokens([prompt(name, turn, cut)], model)[0]
        notes[i] = cut_note(cut, len(ids[i]) > model.max_tokens)
        if len(ids[i]) > model.max_tokens:
            ids[i] = ids[i][: model.max_tokens - 1] + ids[i][-1:]  # the closing </s> stays
    return ids, notes


def _tokens(texts: list[str], model: LoadedModel) -> list[list[int]]:
    if not texts:
        return []
    return model.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
