"""The stand-in evaluator: a small T5 asked UniEval's three questions.

Taught as UniEval was (Zhong et al. 2022, section 3.2): clean answers are "Yes", rule-made bad ones
"No". Ours come from `defects.SEEN_KINDS`, in libraries that give no other row. UniEval started from
a pre-trained T5 and took each answer alone; ours starts from nothing, and learns word order only
when an answer and its defective twin stand in one batch and are also compared with each other.
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

from instructmining_core.indicators.turns import Turn
from instructmining_core.indicators.unieval import QUESTIONS, prompt
from instructmining_core.models.batching import pad

from .defects import twins
from .training import (
    Progress,
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
    pairs: int = 16  # of a good and a bad answer to one question, in one step
    steps: int = 900
    max_tokens: int = 192  # of one training row
    seed: int = 2
    training: TrainingConfig = TrainingConfig(learning_rate=1e-3)


def questions(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Pseudo-data: for each question a good answer and its defective twin.

    returns : columns name (of the question), kind (of the defect), good, bad (texts as UniEval is
        asked them); a row of the table gives one pair a question
    """
    found = []
    for name, kinds in NEGATIVES.items():
        for position, kind in enumerate(kinds):
            part = rows.iloc[position :: len(kinds)]
            bad = twins(part, kind, seed, donors_from=rows)
            good = part[part["id"].isin(bad["twin"])]
            found.append(pd.DataFrame({
                "name": name, "kind": kind,
                "good": [prompt(name, _turn(row)) for row in good.itertuples(index=False)],
                "bad": [prompt(name, _turn(row)) for row in bad.itertuples(index=False)],
            }))  # fmt: skip
    return pd.concat(found, ignore_index=True)


def build_unieval(
    folder: Path,
    learn: pd.DataFrame,
    check: pd.DataFrame,
    config: UniEvalConfig,
    *,
    progress: Progress = False,
) -> dict:
    """Train on questions about the rows `learn`, check on the rows `check`, save both.

    returns : parameters, pairs seen, last loss (mean of 20 steps), `accuracy`: question -> share
        of held-out questions answered rightly (half of them are "Yes"), and `ranked`: question ->
        share of held-out pairs in which the good answer has the higher score
    """
    learn, check = at_most(learn, config.steps * config.pairs // 2), at_most(check, 400)
    asked, held = questions(learn, config.seed), questions(check, config.seed)
    texts = pd.concat([asked["good"], asked["bad"]])
    tokenizer = train_tokenizer(
        [*texts.str.replace(EOS, ""), *QUESTIONS.values()], config.vocab, f"$A {EOS}",
        words=("Yes", "No"), eos_token=EOS, pad_token=PAD)
    good, bad = (_encode(tokenizer, asked[side], config) for side in ("good", "bad"))
    answers = _answers(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = T5ForConditionalGeneration(_t5(config, tokenizer))

        def loss_of(batch: np.ndarray) -> torch.Tensor:
            rows = [good[i] for i in batch] + [bad[i] for i in batch]
            yes_minus_no = _differences(model, rows, answers).float()
            better, worse = yes_minus_no.chunk(2)
            alone = functional.softplus(-better).mean() + functional.softplus(worse).mean()
            return alone / 2 + functional.softplus(worse - better).mean()

        lengths = np.maximum([len(r) for r in good], [len(r) for r in bad])
        losses = train(
            model, epochs_of(lengths, config.pairs, config.steps, config.seed), loss_of,
            config.steps, config.training, desc="stand-in evaluator", progress=progress,
        )  # fmt: skip
    return {
        "parameters": save(folder, model, tokenizer),
        "trained_pairs": config.steps * config.pairs,
        "loss_last": last(losses),
        **_checked(model, tokenizer, held, config),
    }


def _turn(row) -> Turn:
    return Turn(0, 0, ({"role": "user", "content": row.prompt},), row.response)


def _encode(tokenizer, texts: Sequence[str], config: UniEvalConfig) -> list[list[int]]:
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return [ids[: config.max_tokens - 1] + ids[-1:] if len(ids) > config.max_tokens else ids
            for ids in rows]


def _answers(tokenizer) -> torch.Tensor:
    """Ids of "No" and "Yes", as UniEval looks them up."""
    return torch.tensor([tokenizer(word)["input_ids"][0] for word in ("No", "Yes")])


def _differences(
    model: T5ForConditionalGeneration, rows: Sequence[Sequence[int]], answers: torch.Tensor
) -> torch.Tensor:
    """Logit of "Yes" minus that of "No" after one decoder step: all that UniEval reads."""
    ids, mask = pad(rows, model.config.pad_token_id)
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    logits = model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
        decoder_input_ids=start, use_cache=False,
    ).logits[:, 0, answers]  # fmt: skip
    return logits[:, 1] - logits[:, 0]


@torch.inference_mode()
def _checked(model, tokenizer, held: pd.DataFrame, config: UniEvalConfig) -> dict:
    def score(texts: pd.Series) -> np.ndarray:
        rows, answers = _encode(tokenizer, texts, config), _answers(tokenizer)
        parts = [_differences(model, rows[i : i + 64], answers) for i in range(0, len(rows), 64)]
        return torch.cat(parts).numpy()

    good, bad = score(held["good"]), score(held["bad"])
    right = pd.DataFrame({
        "accuracy": ((good > 0).astype(float) + (bad < 0)) / 2, "ranked": good > bad,
        "name": held["name"],
    })  # fmt: skip
    return right.groupby("name").mean().round(4).to_dict()


def _t5(config: UniEvalConfig, tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer), d_model=config.hidden, d_kv=config.hidden // config.heads,
        d_ff=config.inner, num_layers=config.layers, num_decoder_layers=1,
        num_heads=config.heads, dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
