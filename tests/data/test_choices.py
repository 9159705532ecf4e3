"""Multiple choice by likelihood: rows, both accuracies, and lm-eval's own numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml

from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.data.choices import Question, accuracy, encode_choices, write_task
from instructmining_core.models.causal_lm import load_lm, response_nll

SORT = Question("Question: What does sort do?\nAnswer:", ("Sort the list.", "Close the file."), 0)
MEAN = Question("Question: What does mean do?\nAnswer:",
                ("Open the file.", "Compute the mean of the values.", "Brew a potion."), 1)


def test_a_choice_is_tokenised_with_its_prompt_and_cut_where_the_prompt_ends(tiny_tokenizer):
    task = encode_choices(tiny_tokenizer, [SORT, MEAN])
    assert (task.question, task.right) == ((0, 0, 1, 1, 1), (True, False, False, True, False))
    assert task.characters == (14, 15, 14, 31, 14)
    for row, text in zip(task.rows, ("Sort the list.", "Close the file."), strict=False):
        assert tiny_tokenizer.decode(row.ids) == f"{SORT.prompt} {text}"
        kept = [i for i, target in zip(row.ids, row.targets, strict=True) if target]
        assert tiny_tokenizer.decode(kept) == f" {text}"
        assert row.targets == (False,) * (len(row) - len(kept)) + (True,) * len(kept)


def test_both_accuracies_by_hand(tiny_tokenizer):
    """Characters 14, 15 and 14, 31, 14: the third choice is likeliest, the second per character."""
    task = encode_choices(tiny_tokenizer, [SORT, MEAN])
    found = accuracy(task, np.array([20.0, 21.0, 30.0, 40.0, 25.0]))
    assert (found["acc"], found["right"]) == (0.5, "10")  # of the second the third: 25 < 30 < 40
    assert (found["acc_norm"], found["right_norm"]) == (0.5, "01")  # 20/14 > 21/15; 40/31 < 25/14
    assert found["questions"] == 2


def test_a_row_without_a_likelihood_makes_both_accuracies_nan(tiny_tokenizer):
    found = accuracy(encode_choices(tiny_tokenizer, [SORT]), np.array([3.0, np.nan]))
    assert math.isnan(found["acc"]) and math.isnan(found["acc_norm"])
    assert (found["right"], found["questions"]) == ("", 1)


@pytest.mark.parametrize(("choices", "right", "words"), [
    (("one",), 0, "two or more"), (("one", "one"), 0, "all different"),
    (("one", ""), 0, "two or more"), (("one", "two"), 2, "number 2, and there are 2"),
])
def test_a_question_that_has_no_answer_is_refused(choices, right, words):
    with pytest.raises(InstructMiningError, match=words):
        Question("Which?", choices, right)


def test_a_written_task_is_lm_evals_yaml_and_its_questions(tmp_path):
    task = yaml.safe_load(write_task(tmp_path, "docstrings", [SORT, MEAN]).read_text())
    assert (task["task"], task["output_type"]) == ("docstrings", "multiple_choice")
    assert [one["metric"] for one in task["metric_list"]] == ["acc", "acc_norm"]
    lines = open(task["dataset_kwargs"]["data_files"]["test"], encoding="utf-8").read().splitlines()
    assert [json.loads(line)["right"] for line in lines] == [0, 1]
    assert json.loads(lines[1])["choices"] == list(MEAN.choices)


def questions(count: int) -> list[Question]:
    """Made-up questions of two to four choices, with odd white space, marks and scripts."""
    rng = np.random.default_rng(7)
    words = "sort the list of items , and give it ; naïve 数 in order .  two  blanks".split(" ")
    made = []
    for number in range(count):
        texts = {" ".join(rng.choice(words, rng.integers(1, 9))).strip() or "x" for _ in range(4)}
        texts |= {f"item {number}", f"order {number}"}
        choices = tuple(rng.permutation(sorted(texts))[: rng.integers(2, 5)].tolist())
        made.append(Question(f"Question: what is {rng.choice(words)} {number}?\nAnswer:", choices,
                             int(rng.integers(len(choices)))))
    return made


def test_lm_eval_gives_the_same_accuracy_question_by_question(tmp_path, tiny_lm_folder):
    pytest.importorskip("lm_eval", reason="lm-eval is the extra `benchmarks`: pip install lm-eval")
    from bench.openllm import ask

    lm, asked = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu"), questions(40)
    task = encode_choices(lm.tokenizer, asked)
    ours = accuracy(task, response_nll(lm, task.rows)["nll"].to_numpy())
    write_task(tmp_path, "made_up", asked)
    theirs = ask(lm.model, lm.tokenizer, {"made_up": 0}, tmp_path, limit=0, batch=8)["made_up"]
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == (ours["acc"], ours["acc_norm"])
    samples = sorted(theirs["samples"], key=lambda sample: sample["doc_id"])
    assert "".join(str(int(one["acc_norm"])) for one in samples) == ours["right_norm"]
    assert "".join(str(int(one["acc"])) for one in samples) == ours["right"]
