"""Several processes at one run give the numbers of one; a launch keeps one ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_processes
from finetuning.test_finetune import CONFIG, rows_of
from peft import PeftModel
from transformers import AutoModelForCausalLM
from two_processes import METHODS, ROWS

from instructmining_core.config import FinetuneConfig, ModelRef
from instructmining_core.finetuning.finetune import FinetuneError, finetune, stackable
from instructmining_core.finetuning.ledger import Ledger, RunSpec
from instructmining_core.finetuning.sweep import run_sweep, write_job
from instructmining_core.models.causal_lm import load_lm, response_nll
from instructmining_core.models.distributed import Group, GroupError, own_device, sharding

TOLERANCE = 2e-5  # of a loss, float32: sums in another order, magnified by training
SWEEP = FinetuneConfig(rank=2, alpha=4, learning_rate=1e-2, epochs=1, batch_size=4)
POOL = {f"h{i}": row for i, row in enumerate(rows_of(20))}
EVALS = {"eval_1": rows_of(4, seed=50)}


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def alone(lm) -> dict:
    """Each method's numbers in this one process."""
    return {name: two_processes.run(lm, name) for name in METHODS}


def specs_of(lm) -> list[RunSpec]:
    kinds = [SWEEP, SWEEP, SWEEP, replace(SWEEP, method="dora"), replace(SWEEP, method="full")]
    return [RunSpec.of("test", lm, config, [f"h{(3 * k + i) % 20}" for i in range(9)], EVALS,
                       label={"set_id": f"s{k}"}) for k, config in enumerate(kinds)]


@pytest.fixture(scope="module")
def launch(lm, tiny_lm_folder, tmp_path_factory):
    """One launch by accelerate itself for all tests: what each process found, and the folder.

    `--multi_gpu` is how accelerate is told to start processes; without a GPU they meet by gloo.
    (`--cpu` starts a single process unless there is mpirun.)
    """
    out = tmp_path_factory.mktemp("launch")
    write_job(out / "job.json", specs_of(lm), lm, POOL, EVALS, Ledger(out / "ledger"), together=2,
              keep=out / "kept")
    script = Path(two_processes.__file__)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0",
               str(script), str(tiny_lm_folder), str(out), str(out / "job.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                                "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"found{rank}.json").read_text()) for rank in range(2)], out


def close(found, expected):
    for part in ("steps", "epochs", "after"):
        assert found[part] == pytest.approx(expected[part], rel=TOLERANCE), part


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_numbers_of_one(launch, alone, name):
    assert len(alone[name]["steps"]) == 6 and len(alone[name]["epochs"]) == 2
    for found in launch[0]:
        close(found[name], alone[name])


def test_three_adapters_in_one_pass_over_two_processes(launch, lm):
    for found, expected in zip(launch[0][0]["together"], two_processes.together(lm), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["peft", "dora", "full"])
def test_layers_cut_up_among_processes_give_the_numbers_of_whole_ones(launch, lm, alone, name):
    """And what is saved loads as a whole model, by the libraries' own means."""
    both, out = launch
    for found in both:
        close(found[f"{name} cut"], alone[name])
    if name == "full":
        model = AutoModelForCausalLM.from_pretrained(out / name).eval()
    else:
        base = AutoModelForCausalLM.from_pretrained(lm.resolved.folder)
        model = PeftModel.from_pretrained(base, out / name).eval()
    loaded = response_nll(replace(lm, model=model), ROWS)["nll"].to_numpy()
    assert loaded == pytest.approx(alone[name]["after"], rel=TOLERANCE)


def test_memory_that_runs_out_in_one_process_halves_its_micro_batches(launch, alone):
    for found in launch[0]:
        assert found["memory"] == pytest.approx(alone["stack"]["steps"], rel=TOLERANCE)


def test_an_error_in_one_process_ends_the_run_in_all(launch):
    assert [found["error"] for found in launch[0]] == ["GroupError", "ValueError"]


def test_what_processes_tell_each_other(launch):
    assert [found["numbers"] for found in launch[0]] == [
        [3, 4, 0, "cuda:0", "cpu"], [3, 4, 0, "cuda:1", "cpu"]]


def test_a_launch_does_a_sweep_as_one_process_does(launch, lm, tmp_path):
    ledger = Ledger(launch[1] / "ledger")
    records = ledger.records()
    assert [r["status"] for r in records] == ["done"] * 5
    assert [r["attempt"] for r in records] == [1] * 5 and not list(ledger.folder.glob("*.claim"))
    expected = run_sweep(specs_of(lm), lm, POOL, EVALS, Ledger(tmp_path), helpers=0)
    found = ledger.load().set_index("run_id").loc[expected["run_id"]]
    assert found["loss_eval_1"].to_numpy() == pytest.approx(
        expected["loss_eval_1"].to_numpy(), rel=TOLERANCE)
    kept = {path.name for path in (launch[1] / "kept").iterdir()}
    assert kept == set(expected["run_id"])


def test_a_group_of_one_needs_nobody():
    group = Group()
    assert group.most(3) == group.least(3) == group.tell(3) == group.all_or_none(lambda: 3) == 3
    with pytest.raises(GroupError):
        group.all_or_none(lambda: (_ for _ in ()).throw(GroupError("x")))
    assert own_device("cuda") == "cuda"


def test_rows_are_shared_out_whole_and_evenly():
    lengths = [5, 40, 7, 30, 20, 9, 11]
    parts = [Group(rank, 3).share(lengths) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(7))
    # longest first, there and back: 40 30 20, 11 9 7, 5
    assert [sum(lengths[i] for i in part) for part in parts] == [40 + 7 + 5, 30 + 9, 20 + 11]


def test_cutting_up_needs_processes_and_no_stack(lm, monkeypatch):
    with pytest.raises(FinetuneError, match="several processes"):
        finetune(lm, ROWS, CONFIG, init_seed=0, order_seed=0, shard=True)
    monkeypatch.setenv("INSTRUCTMINING_SHARD", "1")
    assert not sharding() and stackable(CONFIG)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding() and not stackable(CONFIG)
    monkeypatch.setenv("INSTRUCTMINING_SHARD", "0")
    assert not sharding()


def test_a_launched_base_stays_on_the_cpu_until_it_is_cut(tiny_lm_folder, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_SHARD", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cuda")
    assert lm.device == "cuda:1"
    assert next(lm.model.parameters()).device == torch.device("cpu")
