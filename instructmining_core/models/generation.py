"""Answers of a causal LM to many prompts: batched, greedy or drawn by each prompt's own seed.

An answer does not depend on which prompts share its batch, up to ties that rounding breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..data.tokenization import Message, encode_many
from .batching import Failed, map_batches, pad
from .causal_lm import LM, max_positions, unwrapped


class GenerationError(RuntimeError):
    """A prompt that cannot be answered on this machine."""


def generate(
    lm: LM,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_tokens: int = 8192,
    progress: bool = False,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_prompt_tokens: int = 1024,
) -> list[str]:
    """The model's answer to each prompt, in the study's template, until eos.

    prompts : messages without the answer, the last from the user.
    max_new_tokens : tokens of an answer at most.
    batch_tokens : padded tokens of a batch, prompts and answers; halved when memory runs out.
    temperature : 0 is greedy. Above, each token is drawn with Gumbel noise from a generator seeded
        by (`seed`, the prompt's number), so a draw does not depend on the batch.
    max_prompt_tokens : a longer prompt loses whole messages from the left; the model's own number
        of positions, less the answer's, limits it too.

    Raises GenerationError for a prompt whose last message is too long, or that alone does not fit
    into memory.
    """
    limit = int(min(max_prompt_tokens, max_positions(lm) - max_new_tokens))
    encoded = encode_many(lm.tokenizer, prompts, max_tokens=max(1, limit))
    for number, row in enumerate(encoded):
        if row.truncated:
            raise GenerationError(f"Prompt {number}'s last message has more than {limit} tokens.")
    lengths = np.array([len(row) + max_new_tokens for row in encoded], dtype=np.int64)

    def batch(numbers: np.ndarray) -> list[str]:
        noise = _Gumbel(numbers, seed, temperature) if temperature > 0 else None
        return _answers(lm, [encoded[i].ids for i in numbers], max_new_tokens, noise)

    answers = map_batches(
        batch, lengths, batch_tokens, progress, f"answers to {len(prompts)} prompts"
    )
    for number, answer in enumerate(answers):
        if isinstance(answer, Failed):
            raise GenerationError(f"Prompt {number}: {answer.reason}")
    return answers


@torch.inference_mode()
def _answers(lm: LM, rows: Sequence[Sequence[int]], max_new_tokens: int, noise) -> list[str]:
    lm.model.eval()
    device = next(lm.model.parameters()).device
    ids, mask = pad(rows, lm.pad_id, "left")  # at the left, so that all answers start together
    out = unwrapped(lm.model).generate(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=lm.tokenizer.eos_token_id,
        pad_token_id=lm.pad_id,
        logits_processor=LogitsProcessorList([noise] if noise else []),
    )
    new = [_until(row, lm.tokenizer.eos_token_id) for row in out[:, ids.shape[1] :].tolist()]
    return lm.tokenizer.batch_decode(new, skip_special_tokens=True)


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos)] if eos in row else row


class _Gumbel(LogitsProcessor):
    """Adds noise whose arg max is a draw from softmax(logits / temperature), by row.

    Gumbel-max: argmax(x / t + g) with g = -log(-log u) is a sample of softmax(x / t).
    """

    def __init__(self, numbers: Sequence[int], seed: int, temperature: float) -> None:
        self.temperature = temperature
        self.generators = [np.random.default_rng([seed, int(n)]) for n in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([g.gumbel(size=scores.shape[-1]) for g in self.generators])
        return scores.float() / self.temperature + torch.from_numpy(noise).to(scores.device).float()
