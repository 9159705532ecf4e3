from __future__ import annotations

import pytest
import torch

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import encode
from instructmining_core.models import causal_lm as generate_module
from instructmining_core.models.causal_lm import generate, load_lm


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), device="cpu")


def prompts():
    words = ["Sort.", "Open the file and read it", "Compute the mean of " + "values " * 20, "x"]
    return [[{"role": "user", "content": w}] for w in words]


def slow_greedy(lm, prompt, steps):
    """One token at a time, no cache, no batch."""
    ids = list(encode(lm.tokenizer, prompt, max_tokens=999).ids)
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_equals_the_slow_loop_at_any_batch_size(lm, monkeypatch):
    expected = [slow_greedy(lm, p, 12) for p in prompts()]
    assert generate(lm, prompts(), 12) == expected
    monkeypatch.setattr(generate_module, "_ANSWER_TOKENS", 1)
    assert generate(lm, prompts(), 12) == expected
    assert len(set(expected)) > 1


def test_a_prompt_that_does_not_fit_is_an_error(lm, monkeypatch):
    def full(*args):
        raise MemoryError("no")

    monkeypatch.setattr(generate_module, "_answers", full)
    with pytest.raises(InstructMiningError, match="Prompt 0: out of memory"):
        generate(lm, prompts(), 4)


def test_a_prompt_longer_than_the_limit_is_an_error_not_cut(lm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "_PROMPT_TOKENS", 40)
        with pytest.raises(InstructMiningError, match="Prompt 2's last message has more than 40"):
            generate(lm, prompts(), 4)
    with pytest.raises(InstructMiningError, match="more than 12 tokens"):
        generate(lm, prompts(), 500)  # the model has 512 positions
