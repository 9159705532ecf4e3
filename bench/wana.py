"""IFD and perplexity of 256 rows by `instructmining score` against `wana score` (PyPI, 0.5.1).

Both are whole commands in processes of their own, start and loading included, on the same file and
the same weights: wana reads SmolLM2's GGUF file by llama.cpp, four bits a weight, ours the folder
that the package has made of it (once a machine, not counted) in float32 or bfloat16. wana's
environment is made by `make bench-peers`, where llama.cpp compiles for ten minutes. It reads one
row a call, twice, as llama.cpp's wheel does by default: no cache is used on either side.

The two must mean the same: wana's `conditional_nll` is our `log_ppl`, and the exponential of its
two losses' difference our `ifd`. llama.cpp rounds what enters each product to eight bits, so they
agree to a few hundredths of a nat and in rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from . import data
from .pairs import Disagreement, Skipped, row
from .real import MODEL
from .trainer import computed_in

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".bench-peers" / "bin" / "wana"
ROWS = 256
GOALS = {"float32": 3.5, "bfloat16": 5.0}
LIMIT_NLL, LIMIT_RANK = 0.1, 0.97  # median difference in nats a token; rank correlation of IFD


def against_wana() -> list[dict]:
    """`score_vs_wana` in float32 and, where the processor has it, in bfloat16."""
    if not PEER.exists():
        raise Skipped("the peer's environment is not there; `make bench-peers` makes it")
    found, source = data.conversations(2 * ROWS)
    found = [one for one in found if one[-1]["content"].strip()][:ROWS]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in found))
        theirs, seconds = theirs_of(rows)
        return [versus(rows, dtype, theirs, seconds, source)
                for dtype in dict.fromkeys(("float32", computed_in("cpu")))]


def theirs_of(rows: Path) -> tuple[pd.DataFrame, float]:
    """wana's losses of each row, and the seconds of its command."""
    out = rows.with_name("scored.jsonl")
    seconds = timed([PEER, "score", rows, "-o", out], {})
    lines = out.read_text(encoding="utf-8").splitlines()
    return pd.DataFrame([json.loads(line)["wana"]["scores"] for line in lines]), seconds


def ours_of(rows: Path, dtype: str) -> tuple[pd.DataFrame, float]:
    """Our scores of each row, and the seconds of the command, whose bank is empty."""
    from instructmining_core import files
    from instructmining_core.config import ModelRef
    from instructmining_core.models import hub

    hub.fetch(hub.resolve(ModelRef(MODEL)))
    home, out = rows.with_name(f"home-{dtype}"), rows.with_name(f"{dtype}.parquet")
    (home / "results" / "cache").mkdir(parents=True)
    (home / "results" / "cache" / "gguf").symlink_to(files.cache() / "gguf")
    profile = rows.with_name(f"{dtype}.yaml")
    profile.write_text(f"extends: laptop\nmodels: {{ppl: {{id: '{MODEL}', dtype: {dtype}}}}}\n")
    seconds = timed(
        [sys.executable, "-m", "instructmining", "score", rows, "-o", out, "--profile", profile,
         "--indicators", "ppl,ifd"], {"INSTRUCTMINING_HOME": str(home)})
    return pd.read_parquet(out), seconds


def versus(rows: Path, dtype: str, theirs: pd.DataFrame, seconds: float, source: str) -> dict:
    """The row of one dtype of ours. Raises Disagreement where the scores are not the same."""
    ours, taken = ours_of(rows, dtype)
    ifd = np.exp(theirs["conditional_nll"] - theirs["unconditional_nll"])
    apart = float((ours["log_ppl"] - theirs["conditional_nll"]).abs().median())
    rank = float(ours["ifd"].corr(ifd, method="spearman"))
    if not (apart <= LIMIT_NLL and rank >= LIMIT_RANK):
        raise Disagreement(f"losses differ by {apart:.3f} nats, ranks of IFD agree to {rank:.3f}")
    return row(
        "score_vs_wana", "wana 0.5.1 (llama.cpp), `wana score`", len(ours) / taken,
        len(theirs) / seconds, "rows/s", on=dtype, goal=GOALS[dtype], template="chat-1",
        data=f"{len(ours)} contiguous rows of {source}", dtype=f"{dtype} against Q4_1",
        note=f"whole commands, {taken:.0f} against {seconds:.0f} s, once each; log-perplexities "
             f"differ by {apart:.3f} nats a token in the median, IFD's rank correlation {rank:.3f}",
    )  # fmt: skip


def timed(command: list, environment: dict[str, str]) -> float:
    """Seconds of a command in the repository's root. Raises RuntimeError with what it said."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"`{' '.join(map(str, command))[:80]}` failed: {done.stderr[-800:]}")
    return time.perf_counter() - start


BENCHES: dict[str, Callable[[], list[dict]]] = {"score_vs_wana": against_wana}
