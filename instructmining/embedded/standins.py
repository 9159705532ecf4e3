"""Stand-in models of the profile `smoke`: tiny, made on the spot, kept in the cache.

They take the place of a language model, OASST's reward model and UniEval where every line of the
study is only to be tried. Each folder holds `STAND_IN.json`, so every output says where it is from.

Reward model and evaluator learn from libraries that give no candidate, pool or evaluation row, and
from the kinds of defect in `defects.SEEN_KINDS` only. The evaluator is a T5 asked UniEval's three
questions, taught as UniEval was (Zhong et al. 2022, section 3.2): clean answers are "Yes",
rule-made bad ones "No". UniEval started from a pre-trained T5 and took each answer alone; ours
starts from nothing, and learns word order only when an answer and its defective twin stand in one
batch and are also compared with each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional

from instructmining_core import files
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.tokenization import PLAIN, plain_pieces
from instructmining_core.indicators.turns import Turn
from instructmining_core.indicators.unieval import QUESTIONS, prompt
from instructmining_core.models import hub
from instructmining_core.models.batching import pad
from instructmining_core.models.hub import MARKER
from instructmining_core.models.reward_model import GPTNeoXRewardConfig, GPTNeoXRewardModel

from .corpus import Corpus, build_corpus
from .defects import SEEN_KINDS, twins

# Part of the folder's name: the number is raised when code changes what is built, and the base
# learns conversations in the plain template.
VERSION = f"2, {PLAIN}"
PARTS = ("base", "base_small", "reward", "unieval")
PREFIX = "standin:"


def build_standins(refs: Iterable[ModelRef]) -> Path | None:
    """The folder that holds the stand-ins among `refs`, built in seconds if they are not there.

    None where `refs` names real models only; InstructMiningError for a stand-in that does not
    exist. Two processes that ask at once build once: the second waits.
    """
    parts = dict.fromkeys(r.id.removeprefix(PREFIX) for r in refs if r.id.startswith(PREFIX))
    if not parts:
        return None
    if unknown := [part for part in parts if part not in PARTS]:
        raise InstructMiningError(f"Stand-in {unknown[0]!r} is unknown; known: {', '.join(PARTS)}.")
    corpus = build_corpus("smoke")
    key = hashlib.sha256(f"{VERSION} {corpus.key}".encode()).hexdigest()[:16]
    root = files.cache() / "standins" / key
    root.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with FileLock(str(root / f"{part}.lock")):
            if not (root / part / MARKER).exists():
                write_standin(root, part, corpus)
    return root


def write_standin(root: Path, part: str, corpus: Corpus) -> None:
    """Make one of PARTS into `root/<part>/`, Hugging Face layout, whole or not at all."""
    unfinished = root / f".{part}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model, tokenizer = build_tiny(part, corpus)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / MARKER).write_text(json.dumps({"stand_in": part, "corpus": corpus.key}))
    shutil.rmtree(root / part, ignore_errors=True)
    unfinished.replace(root / part)


HIDDEN, INNER, HEADS = 32, 64, 2  # width of a layer, of its feed-forward part, attention heads
VOCAB = 1024  # tokens, special ones and the 256 bytes counted
CONTEXT = 128  # tokens of a base's packed training row
MAX_POSITIONS = 1024  # tokens
REWARD_TOKENS, UNIEVAL_TOKENS = 160, 192  # of one training row
ASKED_SHARE = 0.3  # of the base's functions: written as questions and answers in the template
HELD_SHARE = 0.06  # of the stand-ins' functions: never learnt from
BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # of the base; the evaluator has the last two
PROMPTER, ASSISTANT = "<|prompter|>", "<|assistant|>"  # as OASST's reward models write them
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
NEGATIVES = {
    "naturalness": ("scrambled", "cut_short"),
    "coherence": ("other_answer",),
    "understandability": ("scrambled",),
}
WARMUP_SHARE = 0.06  # of all steps; after it a cosine to a tenth of the peak
WEIGHT_DECAY, BETAS, CLIP = 0.05, (0.9, 0.95), 1.0  # of AdamW; largest gradient norm


@dataclass(frozen=True)
class Training:
    """How one stand-in is trained."""

    steps: int  # at most
    rows: int  # of one step: packed rows of a base, pairs of the others
    learning_rate: float  # peak
    seed: int


Made = tuple[nn.Module, transformers.PreTrainedTokenizerFast]
REWARD, UNIEVAL = Training(40, 16, 2e-3, seed=1), Training(40, 16, 1e-3, seed=2)
BASES = {  # layers and training
    "base": (2, Training(60, 8, 4e-3, seed=0)), "base_small": (1, Training(40, 8, 4e-3, seed=0)),
}  # fmt: skip


def build_tiny(part: str, corpus: Corpus) -> Made:
    """Model and tokenizer of one stand-in: "base", "base_small", "reward" or "unieval".

    One thread, so that the weights do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            if part in BASES:
                return _base(documents(corpus.split("base_text")), *BASES[part])
            rows = learnt_rows(corpus)
            return _reward(rows) if part == "reward" else _unieval(rows)
    finally:
        torch.set_num_threads(threads)


def learnt_rows(corpus: Corpus) -> pd.DataFrame:
    """The rows that reward model and evaluator learn from; a function is in them or held out."""
    rows = corpus.split("standin")
    if rows.empty:
        raise InstructMiningError("The corpus has no row of the stand-ins' libraries: install them")
    number = rows["symbol"].map(lambda s: int(hashlib.sha256(s.encode()).hexdigest()[:8], 16))
    held = number % 10_000 < HELD_SHARE * 10_000
    # a defect needs a donor: a library with one held-out function learns from it instead
    held &= rows["symbol"].where(held).groupby(rows["source"]).transform("nunique") > 1
    return rows[~held].reset_index(drop=True)


def documents(rows: pd.DataFrame) -> list[str]:
    """The base model's text: what is said about one function is one document.

    rows : the split `base_text` (symbol, prompt, response, messages). Some functions are written as
    questions and answers in the study's template, the others as plain text under their name.
    """
    asked_rng = np.random.default_rng(0)
    texts = []
    for symbol, part in rows.groupby("symbol", sort=True):
        if asked_rng.random() < ASKED_SHARE:
            texts += ["".join(one.text for one in plain_pieces(m, "")) for m in part["messages"]]
        else:
            texts.append("\n\n".join([symbol, *part["response"]]))
    return texts


def _base(texts: Sequence[str], layers: int, how: Training) -> Made:
    tokenizer = train_tokenizer(texts, f"{BOS} $A", bos_token=BOS, eos_token=EOS, pad_token=PAD)
    ids = _token_ids(tokenizer, texts)
    packed = pack_documents(ids, tokenizer.bos_token_id, tokenizer.eos_token_id, how.seed)
    epochs, rng = math.ceil(how.steps * how.rows / len(packed)), np.random.default_rng(how.seed)
    order = np.concatenate([rng.permutation(len(packed)) for _ in range(epochs)])
    starts = range(0, how.steps * how.rows, how.rows)
    batches = [torch.from_numpy(packed[order[i : i + how.rows]]) for i in starts]
    torch.manual_seed(how.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, attn_implementation="sdpa",
    ))  # fmt: skip
    train_tiny(model, batches, lambda ids: model(input_ids=ids, labels=ids).loss, how)
    return model, tokenizer


def pack_documents(ids: Sequence[Sequence[int]], bos: int, eos: int, seed: int) -> np.ndarray:
    """Documents in random order, each between bos and eos, cut into rows of CONTEXT tokens.

    returns : int64, shape (rows, CONTEXT); the last, incomplete row is left out
    """
    order = np.random.default_rng(seed).permutation(len(ids))
    flat = [token for i in order for token in (bos, *ids[i], eos)]
    rows = len(flat) // CONTEXT
    return np.array(flat[: rows * CONTEXT], dtype=np.int64).reshape(rows, CONTEXT)


def _twin_texts(
    rows: pd.DataFrame, kind: str, seed: int, donors_from: pd.DataFrame, write: Callable
) -> pd.DataFrame:
    """Rows and their defective twins as `write` writes them: columns good, bad."""
    bad = twins(rows, kind, seed, donors_from)
    good = rows.set_index("id").loc[bad["twin"]]
    return pd.DataFrame({name: [write(row) for row in part.itertuples()]
                         for name, part in (("good", good), ("bad", bad))})  # fmt: skip


def oasst_text(row) -> str:
    """The input form of OASST's reward models."""
    return f"{PROMPTER}{row.prompt}{END_OF_TEXT}{ASSISTANT}{row.response}{END_OF_TEXT}"


def _reward(rows: pd.DataFrame) -> Made:
    rows = _at_most(rows, REWARD.steps * REWARD.rows)
    pairs = pd.concat(
        [_twin_texts(rows, kind, REWARD.seed, rows, oasst_text) for kind in SEEN_KINDS])
    tokenizer = train_tokenizer(
        [*rows["prompt"], *rows["response"]], "$A",
        eos_token=END_OF_TEXT, pad_token=PADDING, additional=(PROMPTER, ASSISTANT))
    good, bad = ([ids[:REWARD_TOKENS] for ids in _token_ids(tokenizer, pairs[side])]
                 for side in ("good", "bad"))  # fmt: skip
    torch.manual_seed(REWARD.seed)
    model = GPTNeoXRewardModel(GPTNeoXRewardConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=2, num_attention_heads=HEADS, max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False, pooling="last", bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip

    def loss_of_pairs(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        better, worse = model(**inputs).logits[:, 0].float().chunk(2)
        return -functional.logsigmoid(better - worse).mean()

    _train_on_pairs(model, good, bad, loss_of_pairs, REWARD)
    return model, tokenizer


def question_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Pseudo-data: for each question a good answer and its defective twin.

    returns : columns good, bad (texts as UniEval is asked them), name (of the question), kind (of
        the defect); a row of the table gives one pair a question
    """

    def asked(name: str, row) -> str:
        return prompt(name, Turn(0, 0, ({"role": "user", "content": row.prompt},), row.response))

    return pd.concat([
        _twin_texts(rows.iloc[position :: len(kinds)], kind, UNIEVAL.seed, rows,
                    partial(asked, name)).assign(name=name, kind=kind)
        for name, kinds in NEGATIVES.items() for position, kind in enumerate(kinds)
    ], ignore_index=True)  # fmt: skip


def _unieval(rows: pd.DataFrame) -> Made:
    pairs = question_pairs(_at_most(rows, UNIEVAL.steps * UNIEVAL.rows // 2))
    texts = pd.concat([pairs["good"], pairs["bad"]]).str.replace(EOS, "")
    tokenizer = train_tokenizer(
        [*texts, *QUESTIONS.values()], f"$A {EOS}", words=("Yes", "No"), eos_token=EOS,
        pad_token=PAD)
    good, bad = (
        [ids[: UNIEVAL_TOKENS - 1] + ids[-1:] if len(ids) > UNIEVAL_TOKENS else ids
         for ids in tokenizer(list(pairs[side]), verbose=False)["input_ids"]]
        for side in ("good", "bad")
    )  # fmt: skip
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    torch.manual_seed(UNIEVAL.seed)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=INNER, num_layers=2,
        num_decoder_layers=1, num_heads=HEADS, dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip

    def loss_of_pairs(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        start = torch.full((len(inputs["input_ids"]), 1), model.config.decoder_start_token_id)
        logits = model(**inputs, decoder_input_ids=start, use_cache=False).logits[:, 0]
        better, worse = (logits[:, yes] - logits[:, no]).float().chunk(2)
        alone = functional.softplus(-better).mean() + functional.softplus(worse).mean()
        return alone / 2 + functional.softplus(worse - better).mean()

    _train_on_pairs(model, good, bad, loss_of_pairs, UNIEVAL)
    return model, tokenizer


def train_tokenizer(
    texts: Iterable[str], template: str, words: Sequence[str] = (),
    additional: Sequence[str] = (), **special: str,
) -> transformers.PreTrainedTokenizerFast:  # fmt: skip
    """A byte-level BPE tokenizer: any text can be written, and no token is unknown.

    template : what a single text becomes, in the words of `TemplateProcessing` ("<s> $A")
    words : words that must be one token each
    additional, special (`eos_token="</s>"`, ...) : special tokens; "</s>" in a text is parsed as
        one
    """
    marks = list(dict.fromkeys([*special.values(), *additional]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=marks, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    repeated = (word for word in words for _ in range(5000))
    backend.train_from_iterator((t for part in (texts, repeated) for t in part), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(mark, backend.token_to_id(mark)) for mark in marks])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        additional_special_tokens=list(additional), **special,
    )  # fmt: skip


def _token_ids(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _at_most(rows: pd.DataFrame, wanted: int) -> pd.DataFrame:
    return rows if len(rows) <= wanted else rows.sample(wanted, random_state=0).sort_index()


def pair_batches(lengths: np.ndarray, rows: int, seed: int) -> list[np.ndarray]:
    """One epoch of batches of `rows` positions, alike in length, in random order.

    Lengths are sorted within random chunks of 40 batches only, so batches differ between seeds.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 40 * rows):
        chunk = order[start : start + 40 * rows]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + rows] for i in range(0, len(chunk), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _train_on_pairs(
    model: nn.Module, good: Sequence, bad: Sequence, loss_of_pairs: Callable, how: Training
) -> None:
    """loss_of_pairs : padded rows, good ones above, the bad ones below in the same order -> loss"""

    def loss_of(batch: np.ndarray) -> torch.Tensor:
        rows = [good[i] for i in batch] + [bad[i] for i in batch]
        ids, mask = pad(rows, model.config.pad_token_id)
        return loss_of_pairs(
            {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})

    lengths = np.maximum([len(row) for row in good], [len(row) for row in bad])
    train_tiny(model, pair_batches(lengths, how.rows, how.seed)[: how.steps], loss_of, how)


def train_tiny(model: nn.Module, batches: Iterable, loss_of: Callable, how: Training) -> None:
    """Train a model in place.

    loss_of : batch -> scalar loss. It runs under bfloat16 autocast where the processor computes in
        it; the weights stay float32.
    """
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=how.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, how.steps))
    half = hub.pick_dtype("auto", "cpu") is torch.bfloat16
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step (from 0)."""
    warm = max(1, round(WARMUP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
