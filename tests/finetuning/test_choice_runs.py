"""Multiple-choice tasks in runs: their part of the name, of the record, and of the tidy frame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import assert_rounded

from instructmining_core.config import FinetuneConfig, ModelRef
from instructmining_core.data.choices import Question, accuracy, encode_choices
from instructmining_core.data.tokenization import encode_many
from instructmining_core.finetuning import packing, run, workers
from instructmining_core.finetuning.ledger import Ledger, tidy
from instructmining_core.finetuning.run import run_one, run_together
from instructmining_core.finetuning.run_spec import EvalSets, RunSpec
from instructmining_core.models.causal_lm import load_lm, response_nll

QUESTIONS = [Question(f"Question: What is f{i}?\nAnswer:", (f"Sort list {i}.", "Close it."), i % 2)
             for i in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_lm_folder):
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")
    talks = [[{"role": "user", "content": f"Sort {i}."}, {"role": "assistant", "content": "Done."}]
             for i in range(8)]
    encoded = encode_many(lm.tokenizer, talks, max_tokens=64)
    return lm, {str(i): row for i, row in enumerate(encoded[:6])}, encoded[6:]


def evals_of(lm, exam, asked=QUESTIONS) -> EvalSets:
    return EvalSets({"eval_1": exam}, choices={"docs": encode_choices(lm.tokenizer, asked)})


def spec(lm, evals, seed=0, **settings) -> RunSpec:
    config = FinetuneConfig(rank=2, epochs=1, batch_size=4, learning_rate=0.05, **settings)
    return RunSpec.of("fit", lm, config, tuple("012345"), evals, init_seed=seed, order_seed=seed)


def test_a_task_is_part_of_the_runs_name_and_none_leaves_it_as_it_was(world):
    lm, _, exam = world
    plain, asked = EvalSets({"eval_1": exam}), evals_of(lm, exam)
    assert plain.hashes == EvalSets(eval_1=exam).hashes and set(plain.hashes) == {"eval_1"}
    assert asked.hashes["eval_1"] == plain.hashes["eval_1"]
    assert set(asked.hashes) == {"eval_1", "choices/docs"}
    assert spec(lm, asked).run_id != spec(lm, plain).run_id
    other = [Question(one.prompt, one.choices, 1 - one.right) for one in QUESTIONS]
    assert evals_of(lm, exam, other).hashes != asked.hashes  # the same rows, other right answers


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"dropout": 0.1}])
def test_a_run_answers_the_task_as_its_model_does(world, settings):
    lm, rows, exam = world
    evals = evals_of(lm, exam)
    record = run_one(spec(lm, evals, **settings), lm, rows, evals)
    task = evals.choices["docs"]
    base = accuracy(task, response_nll(lm, task.rows)["nll"].to_numpy())
    assert record["base_choices"] == {"docs": base}
    assert set(record["losses"]) == set(record["examples"]) == {"eval_1"}
    found = record["choices"]["docs"]
    assert found["acc"] == found["right"].count("1") / 6 and len(found["right_norm"]) == 6
    row = tidy([json.loads(json.dumps(record)) | {"attempt": 1}]).iloc[0]
    assert row["accuracy_docs"] == found["acc"] and row["accuracy_docs_norm"] == found["acc_norm"]
    assert row["base_accuracy_docs"] == base["acc"]
    assert not [name for name in row.index if "choices" in name]


def test_runs_in_one_pass_answer_as_they_do_alone(world):
    lm, rows, exam = world
    evals = evals_of(lm, exam)
    specs = [spec(lm, evals, seed) for seed in (0, 1)]
    together = run_together(specs, lm, rows, evals)
    alone = [run_one(one, lm, rows, evals) for one in specs]
    assert [r["choices"] for r in together] == [r["choices"] for r in alone]


def test_a_worker_gets_the_tasks_whole(world, tmp_path):
    lm, rows, exam = world
    evals = evals_of(lm, exam)
    job = workers.sweep_job([[spec(lm, evals)]], lm, rows, evals, Ledger(tmp_path), by_epoch=(),
                            tried={})  # fmt: skip
    _, again = workers.read_job(json.loads(json.dumps(job)), lm)
    assert again.hashes == evals.hashes and list(again.choices) == ["docs"]


def test_a_failed_run_and_one_without_tasks_leave_no_number(world):
    lm, rows, exam = world
    evals = evals_of(lm, exam)
    failed = spec(lm, evals).head() | {"status": "failed", "attempt": 1, "error": "x"}
    frame = tidy([failed])
    assert np.isnan(frame["accuracy_docs"]).all() and "loss_choices/docs" not in frame
    plain = run_one(spec(lm, EvalSets({"eval_1": exam})), lm, rows, EvalSets({"eval_1": exam}))
    assert "choices" not in plain and "base_choices" not in plain


def test_a_prompt_computed_once_gives_the_numbers_of_rows_alone(world):
    """Packed rows of one question share its prompt: float32 rounding is all that differs."""
    lm, _, _ = world
    asked = [Question(f"Question: What of the many things does f{i} do?\nAnswer:",
                      ("Sort the list.", "Close it.", f"Read the lines of file {i}."), i % 3)
             for i in range(7)]  # fmt: skip
    task = encode_choices(lm.tokenizer, asked)
    alone = response_nll(lm, task.rows)["nll"].to_numpy()
    assert lm.packed is None
    with packing.packing(lm) as model:
        assert model.packed
        seen = []
        real, model.batch = model.batch, lambda *a: seen.append(real(*a)) or seen[-1]
        for tokens in (90, 4096):
            assert_rounded(run._nll_of_choices(lm, task, tokens), alone)
    prompt = len(lm.tokenizer(asked[0].prompt)["input_ids"])
    assert sum(one.elsewhere.sum() for one in seen[-1:]) >= 7 * 2 * (prompt - 2)
    assert len(seen) > 2
