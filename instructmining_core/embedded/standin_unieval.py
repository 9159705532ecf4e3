"""The stand-in evaluator: a small T5 asked UniEval's three questions.

Taught as UniEval was (Zhong et al. 2022, section 3.2): clean answers are "Yes", rule-made bad ones
"No". Ours come from `defects.SEEN_KINDS`, in libraries that give no other row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from ..batching import pad
from ..indicators.text import Turn
from ..indicators.unieval import QUESTIONS, prompt
from .defects import twins
from .tiny_training import (
    TrainingConfig,
    at_most,
    epochs_of,
    last,
    save,
    train,
    train_tokenizer,
)

NEGATIVES = {
    "naturalness": ("scrambled", "cut_short"),
    "coherence": ("other_answer",),
    "understandability": ("scrambled",),
}
EOS, PAD = "</s>", "<pad>"


@dataclass(frozen=True)
class UniEvalConfig:
    """A T5 shape and how long it is trained."""

    hidden: int = 96
    layers: int = 3  # of the encoder; the decoder has one
    heads: int = 4
    inner: int = 256
    vocab: int = 4096  # tokens
    rows: int = 48  # questions of one step
    steps: int = 700
    max_tokens: int = 192  # of one training row
    seed: int = 2
    training: TrainingConfig = TrainingConfig(learning_rate=2e-3)


def questions(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Pseudo-data: as many "Yes" as "No" for each question. Columns name, kind, text, yes."""
    found = []
    for name, kinds in NEGATIVES.items():
        for position, kind in enumerate(kinds):
            part = rows.iloc[position :: len(kinds)]
            bad = twins(part, kind, seed, donors_from=rows)
            good = part[part["id"].isin(bad["twin"])]
            for yes, frame in ((True, good), (False, bad)):
                found += [
                    (name, kind, prompt(name, _turn(row)), yes)
                    for row in frame.itertuples(index=False)
                ]
    return pd.DataFrame(found, columns=["name", "kind", "text", "yes"])


def build_unieval(
    folder: Path,
    learn: pd.DataFrame,
    check: pd.DataFrame,
    config: UniEvalConfig,
    *,
    progress: bool = False,
) -> dict:
    """Train on questions about the rows `learn`, check on the rows `check`, save both.

    returns : parameters, questions seen, last loss (nats, mean of 20 steps), and `accuracy`:
        question -> share of held-out questions answered rightly (half of them are "Yes")
    """
    learn, check = at_most(learn, config.steps * config.rows // 4), at_most(check, 400)
    asked, held = questions(learn, config.seed), questions(check, config.seed)
    tokenizer = train_tokenizer(
        [*asked["text"].str.replace(EOS, ""), *QUESTIONS.values()], config.vocab, f"$A {EOS}",
        words=("Yes", "No"), eos_token=EOS, pad_token=PAD)
    ids = _encode(tokenizer, asked["text"], config)
    answers = torch.tensor([tokenizer("No")["input_ids"][0], tokenizer("Yes")["input_ids"][0]])
    yes = torch.from_numpy(asked["yes"].to_numpy(dtype=np.int64))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = T5ForConditionalGeneration(_t5(config, tokenizer))

        def loss_of(batch: np.ndarray) -> torch.Tensor:
            logits = _first_step(model, [ids[i] for i in batch])
            return functional.cross_entropy(logits.float(), answers[yes[torch.from_numpy(batch)]])

        steps = epochs_of([len(row) for row in ids], config.rows, config.steps, config.seed)
        losses = train(model, steps, loss_of, config.steps, config.training,
                       desc="stand-in evaluator", progress=progress)
    return {
        "parameters": save(folder, model, tokenizer),
        "trained_questions": config.steps * config.rows,
        "loss_last": last(losses),
        "accuracy": _accuracy(model, _encode(tokenizer, held["text"], config), answers, held),
    }


def _turn(row) -> Turn:
    return Turn(0, 0, ({"role": "user", "content": row.prompt},), row.response)


def _encode(tokenizer, texts: Sequence[str], config: UniEvalConfig) -> list[list[int]]:
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return [ids[: config.max_tokens - 1] + ids[-1:] if len(ids) > config.max_tokens else ids
            for ids in rows]


def _first_step(model: T5ForConditionalGeneration, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after one decoder step, shape (rows, vocabulary): all that UniEval reads."""
    ids, mask = pad(rows, model.config.pad_token_id)
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    return model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
        decoder_input_ids=start, use_cache=False,
    ).logits[:, 0]  # fmt: skip


@torch.inference_mode()
def _accuracy(model, ids, answers: torch.Tensor, held: pd.DataFrame) -> dict[str, float]:
    parts = [
        _first_step(model, ids[i : i + 64])[:, answers].argmax(1) for i in range(0, len(ids), 64)]
    right = torch.cat(parts).numpy().astype(bool) == held["yes"].to_numpy()
    return pd.Series(right).groupby(held["name"].to_numpy()).mean().round(4).to_dict()


def _t5(config: UniEvalConfig, tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer), d_model=config.hidden, d_kv=config.hidden // config.heads,
        d_ff=config.inner, num_layers=config.layers, num_decoder_layers=1,
        num_heads=config.heads, dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
