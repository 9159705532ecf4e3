"""Several processes at one run, by accelerate, give the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import two_processes
from peft import PeftModel
from transformers import AutoModelForCausalLM
from two_processes import METHODS, ROWS

from instructmining_core.config import ModelRef
from instructmining_core.models.causal_lm import load_lm, response_nll

TOLERANCE = 2e-5  # of a loss, float32: sums in another order, magnified by training


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def launch(tiny_lm_folder, tmp_path_factory):
    """One launch for all tests: what each process found, and the folder.

    `--multi_gpu` is how accelerate is told to start processes; without a GPU they meet by gloo.
    (`--cpu` starts a single process unless there is mpirun.)
    """
    out = tmp_path_factory.mktemp("launch")
    script = Path(two_processes.__file__)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0",
               str(script), str(tiny_lm_folder), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                                "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"found{rank}.json").read_text()) for rank in range(2)], out


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_numbers_of_one(launch, lm, name):
    expected = two_processes.run(lm, name)
    assert len(expected["steps"]) == 6 and len(expected["epochs"]) == 2
    for found in launch[0]:
        for part in ("steps", "epochs", "after"):
            assert found[name][part] == pytest.approx(expected[part], rel=TOLERANCE), part


@pytest.mark.parametrize("name", ["dora", "full"])
def test_what_two_processes_save_loads_by_the_libraries_own_means(launch, lm, name):
    found, out = launch
    if name == "full":
        model = AutoModelForCausalLM.from_pretrained(out / name).eval()
    else:
        base = AutoModelForCausalLM.from_pretrained(lm.resolved.folder)
        model = PeftModel.from_pretrained(base, out / name).eval()
    loaded = response_nll(replace(lm, model=model), ROWS)["nll"].to_numpy()
    assert loaded == pytest.approx(found[0][name]["after"], rel=1e-5)
