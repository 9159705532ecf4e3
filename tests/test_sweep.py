"""Many runs: each once, whatever happens to the process; records that say what was done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_finetune import rows_of

from instructmining_core import sweep as sweep_module
from instructmining_core.ledger import Ledger, LedgerError, RunSpec
from instructmining_core.lm import load_lm
from instructmining_core.profiles import FinetuneConfig, ModelRef
from instructmining_core.run import RunError, run_one, run_together
from instructmining_core.sweep import groups_of, run_sweep

CONFIG = FinetuneConfig(rank=2, alpha=4, learning_rate=1e-2, epochs=1, batch_size=4)
ROWS = {f"h{i}": row for i, row in enumerate(rows_of(30))}
EVALS = {"eval_1": rows_of(4, seed=50), "eval_2": rows_of(3, seed=51)}
TIMES = ["seconds", "peak_memory_bytes", "attempt"]  # of no two executions the same


@pytest.fixture(scope="module")
def lm(tiny_lm_folder):
    return load_lm(ModelRef(str(tiny_lm_folder), dtype="float32"), "cpu")


def spec(lm, number: int, config=CONFIG, **changes) -> RunSpec:
    hashes = [f"h{(3 * number + i) % 30}" for i in range(8)]
    return RunSpec.of("test", lm, config, hashes, EVALS, order_seed=changes.pop("order_seed", 0),
                      init_seed=changes.pop("init_seed", 0), label={"set_id": f"s{number}"})


def specs_of(lm, count: int) -> list[RunSpec]:
    return [spec(lm, number) for number in range(count)]


def sweep(lm, specs, folder, **options) -> pd.DataFrame:
    return run_sweep(specs, lm, ROWS, EVALS, Ledger(folder), **options)


def test_a_record_holds_everything(lm, tmp_path):
    run = spec(lm, 0)
    record = run_one(run, lm, ROWS, EVALS, by_epoch=True)
    assert record["status"] == "done" and record["run_id"] == run.run_id
    assert record["spec"] == run.content() and record["spec_sha256"] == run.sha256
    assert len(record["data_sha256"]) == 64
    frame = pd.DataFrame(record["examples"]["eval_1"])
    assert (frame["nll"] / frame["tokens"]).mean() == pytest.approx(
        record["losses"]["eval_1"]["prompt_mean"], rel=1e-5)
    assert record["epochs"][-1]["eval_2"] == pytest.approx(record["losses"]["eval_2"])
    assert record["tokens_trained"] == sum(sum(ROWS[h].targets) for h in run.row_hashes)
    assert record["steps"] == len(record["curve"]["loss"]) == 2
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 1e6
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1
    text = json.dumps(record)
    for private in (os.environ.get("HOME", "/root"), str(tmp_path.parent)):
        assert f'"{private}' not in text and f"{private}/" not in text


def test_together_is_alone(lm):
    specs = specs_of(lm, 3)
    for run, record in zip(specs, run_together(specs, lm, ROWS, EVALS), strict=True):
        expected = run_one(run, lm, ROWS, EVALS)
        for name in EVALS:
            assert record["losses"][name] == pytest.approx(expected["losses"][name], rel=1e-5)


def test_a_finished_run_is_not_done_again(lm, tmp_path, monkeypatch):
    first = sweep(lm, specs_of(lm, 3), tmp_path)
    monkeypatch.setattr(sweep_module, "run_one", None)  # calling it would be an error
    again = sweep(lm, specs_of(lm, 3), tmp_path)
    pd.testing.assert_frame_equal(first, again)


def test_the_frame_is_in_the_order_asked_with_its_own_labels(lm, tmp_path):
    specs = specs_of(lm, 3)
    asked = [specs[2], specs[0], replace(specs[2], label={"set_id": "again"})]
    frame = sweep(lm, asked, tmp_path)
    assert frame["set_id"].tolist() == ["s2", "s0", "again"]
    assert frame["run_id"][0] == frame["run_id"][2]
    assert len(list(Path(tmp_path).glob("*.json"))) == 2


def test_anchors_are_kept_apart_by_their_seeds(lm, tmp_path):
    anchors = [spec(lm, 0, init_seed=s, order_seed=s) for s in range(3)]
    frame = sweep(lm, anchors, tmp_path)
    assert frame["run_id"].nunique() == frame["loss_eval_1"].nunique() == 3


def test_any_number_together_gives_the_same_frame(lm, tmp_path):
    frames = [sweep(lm, specs_of(lm, 5), tmp_path / str(k), together=k) for k in (1, 3)]
    pd.testing.assert_frame_equal(*(f.drop(columns=TIMES) for f in frames), rtol=1e-5)


def test_a_failing_run_leaves_a_record_and_is_tried_again(lm, tmp_path, monkeypatch):
    specs, real = specs_of(lm, 4), sweep_module.run_one

    def broken(run, *arguments, **options):
        if run.run_id == specs[1].run_id:
            raise OSError("cannot read /home/somebody/file")
        return real(run, *arguments, **options)

    monkeypatch.setattr(sweep_module, "run_one", broken)
    monkeypatch.setattr(sweep_module, "run_together", lambda *a, **k: 1 / 0)
    frame = sweep(lm, specs, tmp_path, together=4)
    assert frame["status"].tolist() == ["done", "failed", "done", "done"]
    assert frame["error"][1] == "OSError: cannot read file"
    monkeypatch.setattr(sweep_module, "run_one", real)
    frame = sweep(lm, specs, tmp_path)
    assert frame["status"].tolist() == ["done"] * 4
    assert frame["attempt"].tolist() == [1, 2, 1, 1]


def test_out_of_memory_halves_the_group(lm, tmp_path, monkeypatch):
    real, sizes = run_together, []

    def small(specs, *arguments, **options):
        sizes.append(len(specs))
        if len(specs) > 2:
            raise RuntimeError("CUDA out of memory")
        return real(specs, *arguments, **options)

    monkeypatch.setattr(sweep_module, "run_together", small)
    frame = sweep(lm, specs_of(lm, 8), tmp_path, together=8)
    assert sizes == [8, 4, 2, 2, 4, 2, 2] and (frame["status"] == "done").all()


def test_a_diverging_run_is_a_result_and_not_tried_again(lm, tmp_path, monkeypatch):
    wild = replace(CONFIG, learning_rate=1e30, clip=0.0, epochs=3)
    specs = [spec(lm, 0, wild), spec(lm, 1)]
    frame = sweep(lm, specs, tmp_path)
    assert frame["status"].tolist() == ["diverged", "done"]
    assert frame["loss_eval_1"].isna().tolist() == [True, False]
    monkeypatch.setattr(sweep_module, "run_one", None)
    assert sweep(lm, specs, tmp_path)["status"].tolist() == ["diverged", "done"]


def test_missing_rows_and_other_evaluations_are_refused_before_any_run(lm, tmp_path):
    with pytest.raises(RunError, match="1 rows that were not given"):
        run_sweep([spec(lm, 0)], lm, {k: v for k, v in ROWS.items() if k != "h3"}, EVALS,
                  Ledger(tmp_path))
    with pytest.raises(RunError, match="evaluation sets"):
        run_sweep([spec(lm, 0)], lm, ROWS, {"eval_1": EVALS["eval_1"]}, Ledger(tmp_path))
    assert not list(Path(tmp_path).glob("*.json"))


def test_a_second_sweep_is_refused(lm, tmp_path):
    with Ledger(tmp_path).locked():
        with pytest.raises(LedgerError, match="Another sweep holds"):
            sweep(lm, specs_of(lm, 1), tmp_path)


def test_methods_share_no_pass(lm):
    kinds = [replace(CONFIG, method="dora"), CONFIG, replace(CONFIG, rank=4), CONFIG]
    specs = [spec(lm, number, config) for number, config in enumerate(kinds)]
    groups = groups_of(specs, lm, ROWS, together=8)
    found = [[s.label["set_id"] for s in group] for group in groups]
    assert found == [["s0"], ["s1", "s3"], ["s2"]]


@pytest.mark.parametrize("method", ["dora", "full"])
def test_other_methods_go_through_the_sweep(lm, tmp_path, method):
    config = replace(CONFIG, method=method, learning_rate=1e-3)
    frame = sweep(lm, [spec(lm, 0, config)], tmp_path)
    assert frame["status"].tolist() == ["done"] and frame["finetune_method"].tolist() == [method]


def test_the_bar_tells_runs_and_losses(lm, tmp_path, capsys):
    sweep(lm, specs_of(lm, 2), tmp_path, progress=True)
    text = capsys.readouterr().err
    assert "2/2" in text and "best=" in text and "worst=" in text


def test_helpers_share_the_sweep(lm, tmp_path):
    """A slow parent, so that the helper surely gets some runs; the numbers are the same."""
    specs = specs_of(lm, 8)
    expected = sweep(lm, specs, tmp_path / "one", helpers=0)
    real, here = sweep_module.run_one, []

    def slow(run, *arguments, **options):
        time.sleep(4)
        here.append(run.run_id)
        return real(run, *arguments, **options)

    sweep_module.run_one = slow
    try:
        frame = sweep(lm, specs, tmp_path / "two", helpers=1)
    finally:
        sweep_module.run_one = real
    assert 0 < len(here) < 8
    pd.testing.assert_frame_equal(frame.drop(columns=TIMES), expected.drop(columns=TIMES),
                                  rtol=1e-5)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import test_sweep as t
from instructmining_core.lm import load_lm
from instructmining_core.profiles import ModelRef
lm = load_lm(ModelRef({folder!r}, dtype="float32"), "cpu")
print("ready", flush=True)
t.sweep(lm, t.specs_of(lm, 10), {ledger!r}, helpers=0)
print("finished", flush=True)
"""


def test_kill_9_at_random_moments_loses_and_doubles_nothing(lm, tmp_path, tiny_lm_folder):
    expected = sweep(lm, specs_of(lm, 10), tmp_path / "quiet", helpers=0)
    tests = Path(__file__).resolve().parent
    folder = tmp_path / "killed"
    code = KILLED.format(root=str(tests.parent), tests=str(tests), folder=str(tiny_lm_folder),
                         ledger=str(folder))
    moment, kept, kills = random.Random(0), {}, 0
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code],
                                 stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline().strip() == "ready"
        time.sleep(moment.uniform(0.02, 0.4))
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        now = {p.name: p.read_text() for p in folder.glob("*.json")}
        assert kept.items() <= now.items()  # what was finished is untouched
        for text in now.values():
            assert json.loads(text)["status"] == "done"
        kept = now
    assert kills  # at least one was in the middle
    frame = sweep(lm, specs_of(lm, 10), folder, helpers=0)
    assert len(list(folder.glob("*.json"))) == 10 and not list(folder.glob("*.claim"))
    columns = TIMES
    pd.testing.assert_frame_equal(frame.drop(columns=columns), expected.drop(columns=columns),
                                  rtol=1e-6)
