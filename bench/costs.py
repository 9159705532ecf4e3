"""Hours and cost of large jobs from measured rates: `python -m bench.costs --out FILE`.

A rate measured on a small model is carried to a large one by its parameters: the work of a row or
a token is in proportion to them. Prices and the GPU's share of its peak are assumptions, which the
table names; nothing of it was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from instructmining_core.files import write_atomic

CORE_PRICE, GPU_PRICE = 0.04, 2.0  # US$ an hour, assumed: a cloud core, an A100
GPU_FLOP = 0.4 * 312e12  # assumed: 40 % of an A100's bfloat16 peak
ROW_TOKENS, RUN_TOKENS = 150, 1000 * 3 * 300  # assumed: of a row; 1,000 rows of 300, 3 epochs
LLAMA = 6.74e9


@dataclass(frozen=True)
class Rate:
    """A measured rate. source : of it; cores : that gave it"""

    source: str
    per_second: float
    cores: int


CHEAP = Rate("bench.scale: 5,000,000 rows in 335 s", 5e6 / 335, 1)
EMBED = Rate("embed_vs_default, MiniLM-L6, an earlier run", 143.4, 2)
PPL = Rate("ppl_vs_row, 13.8 M parameters", 206.1, 2)
UNIEVAL = Rate("unieval_vs_file_order, 20 M parameters, an earlier run", 39.34, 2)
# 128 rows, 3 epochs, some 12,900 tokens each, and the evaluation in the same 93 s.
TRAIN_FLOP = Rate("sweep_full_depth_vs_trainer_tuned: 93 s a run of SmolLM2",
                  6 * 134.5e6 * 3 * 12_900 / 92.8, 2)  # fmt: skip
SCORING = (  # what, the rate, parameters over those it was measured with, parameters on a GPU
    ("indicators without a model", CHEAP, 1.0, 0.0),
    ("knn_6 with MiniLM", EMBED, 1.0, 22.7e6),
    ("perplexity, SmolLM2-135M", PPL, 134.5e6 / 13.8e6, 134.5e6),
    ("perplexity, LLaMA-2-7B", PPL, LLAMA / 13.8e6, LLAMA),
    ("reward, 1.4 B", PPL, 1.4e9 / 13.8e6, 1.4e9),
    ("UniEval, T5 of 770 M", UNIEVAL, 770e6 / 20e6, 770e6),
)  # fmt: skip


def costs() -> pd.DataFrame:
    """One row a job: core hours and US$ from the measured rate, GPU hours and US$ as assumed."""
    rows = []
    for what, rate, larger, parameters in SCORING:
        for count in (10**7, 10**8):
            cores = count / rate.per_second * larger * rate.cores / 3600
            gpu = 2 * parameters * ROW_TOKENS * count / GPU_FLOP / 3600
            rows.append(_row(f"{what}: {count:.0e} rows".replace("e+0", "e"), rate, cores, gpu))
    flop = 129 * 6 * LLAMA * RUN_TOKENS
    cores = flop / TRAIN_FLOP.per_second * TRAIN_FLOP.cores / 3600
    rows.append(_row("129 finetunes of LLaMA-2-7B", TRAIN_FLOP, cores, flop / GPU_FLOP / 3600))
    return pd.DataFrame(rows)


def _row(job: str, rate: Rate, cores: float, gpu: float) -> dict:
    return {"job": job, "core hours": _two(cores), "US$ (cores)": _two(cores * CORE_PRICE),
            "GPU hours (assumed)": _two(gpu) if gpu else "",
            "US$ (GPUs)": _two(gpu * GPU_PRICE) if gpu else "", "measured": rate.source}


def _two(value: float) -> str:
    """Two digits, which is more than such a reckoning has."""
    return f"{float(f'{value:.2g}'):,.10g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    table = costs()
    write_atomic(asked.out, table.to_csv(index=False))
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
