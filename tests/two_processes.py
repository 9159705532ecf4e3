"""What `test_distributed` starts in two processes, and does in one, to compare the numbers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from finetuning.test_finetune import CONFIG, rows_of

from instructmining_core.config import ModelRef
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.models.causal_lm import LM, load_lm, response_nll

# 11 rows in steps of 5, 5 and 1: in the last one process has nothing to do
ROWS = rows_of(11)
METHODS = {
    "dora": replace(CONFIG, method="dora"),
    "full": replace(CONFIG, method="full", learning_rate=2e-3),
    "full, one row at once": replace(CONFIG, method="full", learning_rate=2e-3, micro_tokens=1),
}  # fmt: skip


def run(lm: LM, name: str, save: Path | None = None) -> dict[str, list]:
    """Losses of the steps, after each epoch, and at the end."""
    epochs: list[float] = []
    tuned = finetune(
        lm, ROWS, METHODS[name], init_seed=1, order_seed=2,
        on_epoch=lambda model, _: epochs.append(response_nll(model, ROWS[:3])["nll"].sum()))
    after = response_nll(tuned.lm, ROWS)["nll"].tolist()
    if save is not None:
        tuned.save(save)
    tuned.close()
    return {"steps": tuned.curve["loss"].tolist(), "epochs": epochs, "after": after}


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    lm = load_lm(ModelRef(folder, dtype="float32"), "cpu")
    found = {name: run(lm, name, Path(out) / name) for name in METHODS}
    Path(out, f"found{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
