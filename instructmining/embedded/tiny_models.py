"""The three stand-in models: a LLaMA-shaped base, a reward model and an evaluator, all tiny.

Reward model and evaluator learn from libraries that give no candidate, pool or evaluation row, and
from the kinds of defect in `defects.SEEN_KINDS` only. The evaluator is a T5 asked UniEval's three
questions, taught as UniEval was (Zhong et al. 2022, section 3.2): clean answers are "Yes",
rule-made bad ones "No". UniEval started from a pre-trained T5 and took each answer alone; ours
starts from nothing, and learns word order only when an answer and its defective twin stand in one
batch and are also compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from instructmining_core.config import InstructMiningError
from instructmining_core.data.tokenization import segments
from instructmining_core.indicators.turns import Turn
from instructmining_core.indicators.unieval import QUESTIONS, prompt
from instructmining_core.models.batching import pad
from instructmining_core.models.reward_model import GPTNeoXRewardConfig, GPTNeoXRewardModel

from .defects import SEEN_KINDS, twins
from .training import (
    OnProgress,
    TrainingConfig,
    at_most,
    epochs_of,
    last,
    save,
    token_ids,
    train_tiny,
    train_tokenizer,
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # of the base; the evaluator has the last two
PROMPTER, ASSISTANT = "<|prompter|>", "<|assistant|>"  # as OASST's reward models write them
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
ASKED_SHARE = 0.3  # of the base's functions: written as questions and answers in the template
NEGATIVES = {
    "naturalness": ("scrambled", "cut_short"),
    "coherence": ("other_answer",),
    "understandability": ("scrambled",),
}


@dataclass(frozen=True)
class BaseConfig:
    """A LLaMA shape and how long it is trained."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 352  # width of the feed-forward layers
    vocab: int = 4096  # tokens
    context: int = 256  # tokens of one packed training row
    rows: int = 8  # packed rows of one step
    steps: int = 750
    max_positions: int = 1024  # tokens
    seed: int = 0
    training: TrainingConfig = TrainingConfig(learning_rate=4e-3)


@dataclass(frozen=True)
class RewardConfig:
    """A GPT-NeoX shape and how long it is trained."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    inner: int = 256
    vocab: int = 4096  # tokens
    pairs: int = 24  # of one step
    steps: int = 500
    max_tokens: int = 160  # of one training row
    max_positions: int = 1024  # tokens
    seed: int = 1
    training: TrainingConfig = TrainingConfig(learning_rate=2e-3)


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


def documents(rows: pd.DataFrame) -> list[str]:
    """The base model's text: what is said about one function is one document.

    rows : the split `base_text` (symbol, prompt, response, messages)
    Some functions are written as questions and answers in the study's template, the others as
    plain text under the function's name.
    """
    asked_rng = np.random.default_rng(0)
    texts = []
    for symbol, part in rows.groupby("symbol", sort=True):
        if asked_rng.random() < ASKED_SHARE:
            texts += ["".join(text for text, _ in segments(m, "")) for m in part["messages"]]
        else:
            texts.append("\n\n".join([symbol, *part["response"]]))
    return texts


def build_base(
    folder: Path, texts: Sequence[str], config: BaseConfig, on_progress: OnProgress
) -> dict:
    """Train tokenizer and model on `texts` and save both in Hugging Face layout.

    folder : exists; receives config.json, model.safetensors and the tokenizer's files
    returns : parameters, tokens of the text, tokens trained, first and last loss (nats per token,
        mean of 20 steps)
    Raises InstructMiningError where the text is shorter than one step of packed rows.
    """
    tokenizer = train_tokenizer(
        texts, config.vocab, f"{BOS} $A", bos_token=BOS, eos_token=EOS, pad_token=PAD)
    packed = pack_documents(token_ids(tokenizer, texts), config.context, tokenizer.bos_token_id,
                            tokenizer.eos_token_id, config.seed)
    if len(packed) < config.rows:
        raise InstructMiningError(
            f"The base model's text gives {len(packed)} rows of {config.context} tokens, fewer "
            f"than the {config.rows} of one step; give more text or lower `rows`.")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(_llama(config, tokenizer))
        losses = train_tiny(
            model, _steps(packed, config),
            lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
            config.steps, config.training, on_progress,
        )  # fmt: skip
    return {
        "parameters": save(folder, model, tokenizer),
        "text_tokens": int(packed.size),
        "trained_tokens": config.steps * config.rows * config.context,
        "loss_first": last(losses[:20]),
        "loss_last": last(losses),
    }


def pack_documents(
    ids: Sequence[Sequence[int]], context: int, bos: int, eos: int, seed: int
) -> np.ndarray:
    """Documents in random order, each between bos and eos, cut into rows of `context` tokens.

    returns : int64, shape (rows, context); the last, incomplete row is left out
    """
    order = np.random.default_rng(seed).permutation(len(ids))
    flat = [token for i in order for token in (bos, *ids[i], eos)]
    rows = len(flat) // context
    return np.array(flat[: rows * context], dtype=np.int64).reshape(rows, context)


def _steps(packed: np.ndarray, config: BaseConfig) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(config.seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        if len(order) < config.rows:
            order = np.concatenate([order, rng.permutation(len(packed))])
        taken, order = order[: config.rows], order[config.rows :]
        yield torch.from_numpy(packed[taken])


def _llama(config: BaseConfig, tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.inner,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.heads, max_position_embeddings=config.max_positions,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )  # fmt: skip


def oasst_text(prompt: str, response: str) -> str:
    """The input form of OASST's reward models."""
    return f"{PROMPTER}{prompt}{END_OF_TEXT}{ASSISTANT}{response}{END_OF_TEXT}"


def pair_rows(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Clean answer and defective twin, one row a pair: source, kind, clean, defective (texts)."""
    frames = []
    for kind in SEEN_KINDS:
        made = twins(rows, kind, seed)
        clean = rows.set_index("id").loc[made["twin"]]
        frames.append(pd.DataFrame({
            "source": made["source"].to_numpy(),
            "kind": kind,
            "clean": [oasst_text(*p) for p in zip(clean["prompt"], clean["response"], strict=True)],
            "defective": [
                oasst_text(*p) for p in zip(made["prompt"], made["response"], strict=True)],
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def build_reward(
    folder: Path,
    learn: pd.DataFrame,
    check: pd.DataFrame,
    config: RewardConfig,
    on_progress: OnProgress,
) -> dict:
    """Train on pairs of the rows `learn`, check on pairs of the rows `check`, save both.

    returns : parameters, pairs seen, last loss (mean of 20 steps), and `accuracy`: kind -> share
        of held-out pairs in which the clean answer has the larger reward
    """
    learn, check = at_most(learn, config.steps * config.pairs), at_most(check, 400)
    pairs, held = pair_rows(learn, config.seed), pair_rows(check, config.seed)
    tokenizer = train_tokenizer(
        [*learn["prompt"], *learn["response"]], config.vocab, "$A",
        eos_token=END_OF_TEXT, pad_token=PADDING, additional=f"{PROMPTER} {ASSISTANT}")
    clean, defective = (
        [ids[: config.max_tokens] for ids in token_ids(tokenizer, pairs[side])]
        for side in ("clean", "defective")
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = GPTNeoXRewardModel(_neox(config, tokenizer))
        lengths = np.maximum([len(r) for r in clean], [len(r) for r in defective])

        def loss_of(batch: np.ndarray) -> torch.Tensor:
            rows = [clean[i] for i in batch] + [defective[i] for i in batch]
            better, worse = _rewards(model, rows).chunk(2)
            return -functional.logsigmoid(better.float() - worse.float()).mean()

        losses = train_tiny(
            model, epochs_of(lengths, config.pairs, config.steps, config.seed), loss_of,
            config.steps, config.training, on_progress,
        )  # fmt: skip
    return {
        "parameters": save(folder, model, tokenizer),
        "trained_pairs": config.steps * config.pairs,
        "loss_last": last(losses),
        "accuracy": _pairs_won(model, tokenizer, held, config),
    }


def _rewards(model: GPTNeoXRewardModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids, mask = pad(rows, model.config.pad_token_id)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return model(**inputs).logits[:, 0]


@torch.inference_mode()
def _pairs_won(model, tokenizer, held: pd.DataFrame, config: RewardConfig) -> dict[str, float]:
    def rewards(texts: Sequence[str]) -> np.ndarray:
        rows = [ids[: config.max_positions] for ids in token_ids(tokenizer, texts)]
        parts = [_rewards(model, rows[i : i + 64]) for i in range(0, len(rows), 64)]
        return torch.cat(parts).numpy()

    wins = rewards(held["clean"]) > rewards(held["defective"])
    return pd.Series(wins).groupby(held["kind"].to_numpy()).mean().round(4).to_dict()


def _neox(config: RewardConfig, tokenizer) -> GPTNeoXRewardConfig:
    return GPTNeoXRewardConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.inner,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        max_position_embeddings=config.max_positions, tie_word_embeddings=False, pooling="last",
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


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
    on_progress: OnProgress,
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
        losses = train_tiny(
            model, epochs_of(lengths, config.pairs, config.steps, config.seed), loss_of,
            config.steps, config.training, on_progress,
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
