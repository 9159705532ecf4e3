"""Multiple-choice tasks by likelihood, as lm-eval counts them.

Source: Gao et al., Language Model Evaluation Harness (doi 10.5281/zenodo.12608602), tasks of
`output_type: multiple_choice` without shots: a model chooses the text with the largest
log-likelihood after the prompt (`acc`), or the largest one per character (`acc_norm`). Prompts are
plain text, without a chat template, as on the leaderboard. `write_task` writes a task in lm-eval's
own format, so that its numbers can be held against ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ..config import InstructMiningError
from ..files import write_atomic
from .tokenization import Encoded, clean_text


@dataclass(frozen=True)
class Question:
    """A prompt, the texts that may follow it after a blank, and the right one's place."""

    prompt: str
    choices: tuple[str, ...]
    right: int

    def __post_init__(self) -> None:
        if len(set(self.choices)) < max(2, len(self.choices)) or not all(self.choices):
            raise InstructMiningError(
                f"The choices after {self.prompt[:60]!r} must be two or more texts, all different.")
        if not 0 <= self.right < len(self.choices):
            raise InstructMiningError(
                f"The right choice after {self.prompt[:60]!r} is number {self.right}, and there "
                f"are {len(self.choices)}.")  # fmt: skip


@dataclass(frozen=True)
class EncodedChoices:
    """A task as rows: one a choice, those of a question one after the other.

    rows : prompt and choice, whose tokens are the targets; of each row:
    question : number of its question; right : whether it is the right choice; characters : of it
    """

    rows: tuple[Encoded, ...]
    question: tuple[int, ...]
    right: tuple[bool, ...]
    characters: tuple[int, ...]

    def lines(self) -> list[str]:
        """A line a row with all that can change a number, for hashes."""
        told = zip(self.rows, self.question, self.right, self.characters, strict=True)
        return [f"{row.ids}{[int(t) for t in row.targets]}{(question, int(right), size)}"
                for row, question, right, size in told]


def encode_choices(tokenizer, questions: Sequence[Question]) -> EncodedChoices:
    """Tokenise as lm-eval does: prompt and choice as one text, cut where the prompt alone ends."""

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer([clean_text(text) for text in texts], add_special_tokens=False,
                         return_attention_mask=False, verbose=False)["input_ids"]

    told = [(number, place == one.right, choice, one.prompt)
            for number, one in enumerate(questions) for place, choice in enumerate(one.choices)]
    whole = ids([f"{prompt} {choice}" for *_, choice, prompt in told])
    before = ids([one.prompt for one in questions])
    cuts = [len(before[number]) for number, *_ in told]
    rows = tuple(Encoded(tuple(row), tuple(i >= cut for i in range(len(row))))
                 for row, cut in zip(whole, cuts, strict=True))
    return EncodedChoices(rows, tuple(one[0] for one in told), tuple(one[1] for one in told),
                          tuple(len(one[2]) for one in told))


def accuracy(choices: EncodedChoices, nll: np.ndarray) -> dict[str, Any]:
    """lm-eval's two accuracies from the summed negative log-likelihoods of the rows, in nats.

    returns : acc, acc_norm (of characters), questions, and `right` and `right_norm`: "1" or "0" for
        each question in order. One row without a likelihood makes both accuracies NaN: the share
        of the other questions would be another number.
    """
    table = pd.DataFrame({"question": choices.question, "right": choices.right,
                          "acc": -np.asarray(nll, float)})  # fmt: skip
    table["acc_norm"] = table["acc"] / np.array(choices.characters)
    found: dict[str, Any] = {"questions": len(set(choices.question))}
    for name, told in (("acc", "right"), ("acc_norm", "right_norm")):
        known = bool(np.isfinite(table["acc"]).all()) and len(table) > 0
        chosen = table.groupby("question")[name].idxmax() if known else []
        hits = table["right"].loc[chosen]
        found[name] = float(hits.mean()) if known else float("nan")
        found[told] = "".join("01"[hit] for hit in hits)
    return found


def write_task(folder: Path, name: str, questions: Sequence[Question]) -> Path:
    """Write a task for lm-eval: `name.yaml`, and its questions in `name.jsonl` beside it.

    The questions are others' text: the folder is one that is not committed.
    """
    rows = [{"prompt": one.prompt, "choices": list(one.choices), "right": one.right}
            for one in questions]
    data = folder / f"{name}.jsonl"
    write_atomic(data, "".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
               for metric in ("acc", "acc_norm")]
    task = {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
        "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "right",
        "target_delimiter": " ", "metric_list": metrics, "metadata": {"version": 1},
    }
    write_atomic(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return folder / f"{name}.yaml"
