"""Greedy answers of a causal LM to many prompts, in batches.

An answer does not depend on which prompts share its batch, up to ties that rounding breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from ..config import InstructMiningError
from ..data.tokenization import Message, encode_many, end_ids
from .batching import Failed, map_batches, pad
from .causal_lm import LM, unwrapped

_PROMPT_TOKENS = 1024  # of a prompt at most
_BATCH_TOKENS = 8192  # padded tokens of a batch, prompts and answers; halved when memory runs out


def generate(
    lm: LM, prompts: Sequence[Sequence[Message]], max_new_tokens: int, *, progress: bool = False
) -> list[str]:
    """The model's answer to each prompt, until the token that ends an answer.

    prompts : messages without the answer, the last from the user; a long one loses whole messages
        from the left.
    max_new_tokens : tokens of an answer at most.

    Raises InstructMiningError for a prompt whose last message has more than 1,024 tokens, or more
    than the model's positions less the answer's, or that alone does not fit into memory.
    """
    limit = int(min(_PROMPT_TOKENS, lm.max_positions() - max_new_tokens))
    encoded = encode_many(lm.tokenizer, prompts, max_tokens=max(1, limit), template=lm.template)
    for number, row in enumerate(encoded):
        if row.truncated:
            text = f"Prompt {number}'s last message has more than {limit} tokens."
            raise InstructMiningError(text)
    answers = map_batches(
        lambda rows: _answers(lm, [encoded[i].ids for i in rows], max_new_tokens),
        [len(row) + max_new_tokens for row in encoded], _BATCH_TOKENS, progress,
        f"answers to {len(prompts)} prompts",
    )  # fmt: skip
    for number, answer in enumerate(answers):
        if isinstance(answer, Failed):
            raise InstructMiningError(f"Prompt {number}: {answer.reason}")
    return answers


@torch.inference_mode()
def _answers(lm: LM, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    lm.model.eval()
    device, ends = next(lm.model.parameters()).device, end_ids(lm.tokenizer)
    ids, mask = pad(rows, lm.pad_id, "left")  # at the left, so that all answers start together
    out = unwrapped(lm.model).generate(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=lm.pad_id,
        do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    new = [list(takewhile(lambda token: token not in ends, row))
           for row in out[:, ids.shape[1] :].tolist()]
    return lm.tokenizer.batch_decode(new, skip_special_tokens=True)
