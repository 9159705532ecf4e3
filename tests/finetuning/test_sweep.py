"""Many runs: each once, whatever happens to the process; records that say what was done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from finetuning.test_finetune import rows_of
from tqdm import auto, tqdm

from instructmining_core.config import FinetuneConfig, InstructMiningError, ModelRef
from instructmining_core.finetuning import ledger as leases
from instructmining_core.finetuning import workers
from instructmining_core.finetuning.finetune import finetune
from instructmining_core.finetuning.ledger import Ledger
from instructmining_core.finetuning.run import run_one, run_together
from instructmining_core.finetuning.run_spec import EvalSets, RunSpec
from instructmining_core.finetuning.sweep import groups_of, run_sweep
from instructmining_core.finetuning.workers import do_group
from instructmining_core.models.causal_lm import evaluate, load_lm

CONFIG = FinetuneConfig(rank=2, alpha=4, learning_rate=1e-2, epochs=1, batch_size=4)
ROWS = {f"h{i}": row for i, row in enumerate(rows_of(30))}
EVALS = EvalSets(eval_1=rows_of(4, seed=50), eval_2=rows_of(3, seed=51))
TIMES = ["seconds", "peak_memory_bytes", "attempt", "commit", "threads"]  # of one execution


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
    record = run_one(run, lm, ROWS, EVALS, by_epoch=[run.run_id])
    assert record["status"] == "done" and record["run_id"] == run.run_id
    assert record["spec"] == run.content() and record["spec_sha256"] == run.sha256
    assert len(record["data_sha256"]) == 64
    frame = pd.DataFrame(record["examples"]["eval_1"])
    assert (frame["nll"] / frame["tokens"]).mean() == pytest.approx(
        record["losses"]["eval_1"]["prompt_mean"], rel=1e-5)
    assert record["epochs"][-1]["eval_2"] == pytest.approx(
        record["losses"]["eval_2"], nan_ok=True)
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
            assert record["losses"][name] == pytest.approx(expected["losses"][name], rel=1e-5,
                                                           nan_ok=True)


def test_a_finished_run_is_not_done_again(lm, tmp_path, monkeypatch):
    first = sweep(lm, specs_of(lm, 3), tmp_path)
    monkeypatch.setattr(workers, "run_one", None)  # calling it would be an error
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
    specs, real = specs_of(lm, 4), workers.run_one

    def broken(run, *arguments, **options):
        if run.run_id == specs[1].run_id:
            raise OSError("cannot read /home/somebody/file")
        return real(run, *arguments, **options)

    monkeypatch.setattr(workers, "run_one", broken)
    monkeypatch.setattr(workers, "run_together", lambda *a, **k: 1 / 0)
    frame = sweep(lm, specs, tmp_path, together=4)
    assert frame["status"].tolist() == ["done", "failed", "done", "done"]
    assert frame["error"][1] == "OSError: cannot read file"
    monkeypatch.setattr(workers, "run_one", real)
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

    monkeypatch.setattr(workers, "run_together", small)
    frame = sweep(lm, specs_of(lm, 8), tmp_path, together=8)
    assert sizes == [8, 4, 2, 2, 4, 2, 2] and (frame["status"] == "done").all()


def test_a_diverging_run_is_a_result_and_not_tried_again(lm, tmp_path, monkeypatch):
    wild = replace(CONFIG, learning_rate=1e30, clip=0.0, epochs=3)
    specs = [spec(lm, 0, wild), spec(lm, 1)]
    frame = sweep(lm, specs, tmp_path)
    assert frame["status"].tolist() == ["diverged", "done"]
    assert frame["loss_eval_1"].isna().tolist() == [True, False]
    monkeypatch.setattr(workers, "run_one", None)
    assert sweep(lm, specs, tmp_path)["status"].tolist() == ["diverged", "done"]


def test_missing_rows_and_other_evaluations_are_refused_before_any_run(lm, tmp_path):
    with pytest.raises(InstructMiningError, match="1 rows that were not given"):
        run_sweep([spec(lm, 0)], lm, {k: v for k, v in ROWS.items() if k != "h3"}, EVALS,
                  Ledger(tmp_path))
    with pytest.raises(InstructMiningError, match="evaluation sets"):
        run_sweep([spec(lm, 0)], lm, ROWS, EvalSets(eval_1=EVALS["eval_1"]), Ledger(tmp_path))
    assert not list(Path(tmp_path).glob("*.json"))


def test_methods_share_no_pass(lm):
    kinds = [replace(CONFIG, method="dora"), CONFIG, replace(CONFIG, rank=4), CONFIG]
    specs = [spec(lm, number, config) for number, config in enumerate(kinds)]
    groups = groups_of(specs, lm, together=8)
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


def until(happened) -> None:
    """Wait for an event, as long as a worker lives that may bring it about."""
    while not happened():
        if all(map(ended, (child.pid for child in psutil.Process().children()))):
            raise AssertionError("the worker has ended before it came to its run")
        time.sleep(0.02)


def test_workers_share_the_sweep(lm, tmp_path, monkeypatch):
    """A parent that waits for its worker's first record; the numbers are the same."""
    specs, ledger = specs_of(lm, 8), Ledger(tmp_path / "two")
    expected = sweep(lm, specs, tmp_path / "one", workers=0)
    real, here = workers.run_one, []

    def waiting(run, *arguments, **options):
        if not here:
            until(lambda: ledger.has(specs[-1].run_id))  # workers begin at the end
        here.append(run.run_id)
        return real(run, *arguments, **options)

    monkeypatch.setattr(workers, "run_one", waiting)
    frame = sweep(lm, specs, tmp_path / "two", workers=1)
    assert 0 < len(here) < 8
    pd.testing.assert_frame_equal(frame.drop(columns=TIMES), expected.drop(columns=TIMES),
                                  rtol=1e-5)


@pytest.mark.parametrize(("device", "worth", "records"), [
    ("cpu", 0, [0, 1, 2]), ("cpu", 1e-3, [1, 2]), ("cpu", 1e9, []), ("cuda:1", 1e9, [0])])
def test_workers_start_where_the_work_is_worth_it_and_at_once_on_gpus(
    lm, tmp_path, monkeypatch, device, worth, records
):
    done = []  # records that were there at each start
    monkeypatch.setattr(workers.Workers, "start",
                        lambda self: done.append(len(list(tmp_path.glob("*.json")))))
    monkeypatch.setattr("instructmining_core.finetuning.sweep.WORTH", worth)
    monkeypatch.setattr("instructmining_core.finetuning.sweep.worker_devices",
                        lambda lm, wanted: [device])
    sweep(lm, specs_of(lm, 3), tmp_path, together=1)
    assert done == records


def test_workers_take_the_further_cores_or_the_further_gpus(lm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert workers.worker_devices(lm, None) == ["cpu"] * 3
    assert workers.worker_devices(lm, 0) == [] and workers.worker_devices(lm, 5) == ["cpu"] * 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    on_gpu = replace(lm, device="cuda:1")
    assert workers.worker_devices(on_gpu, None) == ["cuda:0", "cuda:2"]
    assert workers.worker_devices(on_gpu, 1) == ["cuda:0"]
    nowhere = replace(lm, resolved=replace(lm.resolved, folder=None))
    assert workers.worker_devices(nowhere, 2) == []


def test_every_process_gets_a_group(lm, monkeypatch):
    monkeypatch.setattr("instructmining_core.finetuning.sweep.adapters_per_pass", lambda *_: 64)
    sizes = [[len(g) for g in groups_of(specs_of(lm, 7), lm, None, processes=k)] for k in (1, 2, 3)]
    assert sizes == [[7], [4, 3], [3, 3, 1]]


def job_of(lm, groups, folder, **options) -> dict:
    """A sweep's job, through JSON and back."""
    options = {"by_epoch": (), "tried": {}} | options
    job = workers.sweep_job(groups, lm, ROWS, EVALS, Ledger(folder), **options)
    return json.loads(json.dumps(job))


def test_the_job_of_a_worker_is_all_that_it_needs(lm, tmp_path):
    """The same runs under the same names, with the options."""
    specs = specs_of(lm, 3)
    job = job_of(lm, [specs[:2], specs[2:]], tmp_path / "ledger", by_epoch=[specs[1].run_id])
    workers.work_on(job, load_lm(ModelRef(str(lm.resolved.folder), dtype="float32"), "cpu"),
                    os.getppid())
    frame = Ledger(tmp_path / "ledger").load().set_index("set_id")
    assert frame.loc[["s0", "s1", "s2"], "run_id"].tolist() == [s.run_id for s in specs]
    assert frame["loss_eval_1_epoch1"].notna().to_dict() == {"s0": False, "s1": True, "s2": False}


def test_an_orphaned_worker_does_nothing(lm, tmp_path):
    workers.work_on(job_of(lm, [specs_of(lm, 1)], tmp_path), lm, os.getppid() + 1)
    assert Ledger(tmp_path).load().empty


def test_a_dead_worker_is_told_once_with_its_last_words(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "COMMAND", (
        sys.executable, "-c", "raise SystemExit('line one\\nno model in /home/me/base')"))
    real = workers.run_one

    def slow(*arguments, **options):
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(workers, "run_one", slow)
    with pytest.warns(RuntimeWarning) as told:
        frame = sweep(lm, specs_of(lm, 4), tmp_path, workers=1)
    assert [str(w.message) for w in told if "worker" in str(w.message)] == [
        "A worker of the sweep ended with code 1, the others go on: no model in base"]
    assert (frame["status"] == "done").all()


def test_a_worker_killed_at_work_costs_its_run_alone(lm, tmp_path, monkeypatch):
    """kill -9 while it holds a lease; its run is done again by the parent, the attempt is told."""
    ledger, specs, real, killed = Ledger(tmp_path), specs_of(lm, 6), workers.run_one, []

    def once_the_worker_is_killed(run, *arguments, **options):
        if not killed:
            until(lambda: ledger.owner(specs[-1].run_id))
            killed.append(int(ledger.owner(specs[-1].run_id).split()[1]))
            os.kill(killed[0], signal.SIGKILL)
        return real(run, *arguments, **options)

    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", HELD_UP))
    monkeypatch.setattr(workers, "run_one", once_the_worker_is_killed)
    with pytest.warns(RuntimeWarning, match="ended with code -9"):
        frame = sweep(lm, specs, tmp_path, workers=1)
    assert frame["status"].tolist() == ["done"] * 6
    assert frame["attempt"].tolist() == [1, 1, 1, 1, 1, 2]
    assert not list(tmp_path.glob("*.lease"))


HELD_UP = """
import sys, time
from instructmining_core.finetuning import workers
workers.run_one = lambda *arguments, **options: time.sleep(100)
workers._begin(sys.argv[1], int(sys.argv[2]))
"""


def test_a_failed_run_is_left_alone_until_the_next_sweep(lm, tmp_path, monkeypatch):
    """A worker that comes late to a run that the parent saw fail."""
    ledger, specs, calls = Ledger(tmp_path), specs_of(lm, 1), []

    def broken(run, *arguments, **options):
        calls.append(run.run_id)
        raise OSError("no disk")

    monkeypatch.setattr(workers, "run_one", broken)
    now = {specs[0].run_id: 0}
    assert do_group(specs, lm, ROWS, EVALS, ledger, tried=now) == 1
    assert do_group(specs, lm, ROWS, EVALS, ledger, tried=now) == 0
    assert len(calls) == 1 and ledger.load()["attempt"].tolist() == [1]
    assert do_group(specs, lm, ROWS, EVALS, ledger, tried={specs[0].run_id: 1}) == 1
    assert ledger.load()["attempt"].tolist() == [2]


def foreign(ledger: Ledger, run_id: str) -> Path:
    """A lease of a process on another host."""
    path = ledger.folder / f"{run_id}.lease"
    path.unlink(missing_ok=True)
    path.write_text("filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=1\n"
                    f"duration={leases.EXPIRES!r}\n")
    return path


def test_a_lease_that_was_lost_on_the_way_is_not_released(lm, tmp_path, monkeypatch):
    ledger, specs, real = Ledger(tmp_path), specs_of(lm, 1), workers.run_one

    def robbed(run, *arguments, **options):
        foreign(ledger, run.run_id)
        return real(run, *arguments, **options)

    monkeypatch.setattr(workers, "run_one", robbed)
    assert do_group(specs, lm, ROWS, EVALS, ledger) == 0
    assert ledger.owner(specs[0].run_id) == "process 1 on elsewhere" and ledger.load().empty


def test_a_sweep_waits_for_another_host_and_says_so(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leases, "EXPIRES", 1.0)
    monkeypatch.setattr(leases, "BEAT", 0.2)
    ledger, specs = Ledger(tmp_path), specs_of(lm, 2)
    foreign(ledger, specs[1].run_id)
    frame = sweep(lm, specs, tmp_path, progress=True)
    assert "waiting for process 1 on elsewhere" in capsys.readouterr().err
    assert frame["status"].tolist() == ["done"] * 2 and frame["attempt"].tolist() == [1, 2]


def test_two_sweeps_on_one_ledger_share_the_runs(lm, tmp_path):
    """As on two machines that see one folder: each run once, both see all of them."""
    specs, folder = specs_of(lm, 8), tmp_path / "both"
    expected = sweep(lm, specs, tmp_path / "one", workers=0)
    other = forked(lambda: sweep(lm, specs, folder, workers=0).to_json(tmp_path / "other.json"))
    frame = sweep(lm, specs, folder, workers=0)
    os.waitpid(other, 0)
    assert frame["attempt"].tolist() == [1] * 8
    pd.testing.assert_frame_equal(frame.drop(columns=TIMES), expected.drop(columns=TIMES),
                                  rtol=1e-5)
    assert len(json.loads((tmp_path / "other.json").read_text())["run_id"]) == 8


def test_losses_by_epoch(lm, tmp_path):
    config = replace(CONFIG, epochs=3)
    specs = [spec(lm, 0, config), spec(lm, 1, config)]
    frame = sweep(lm, specs, tmp_path, by_epoch=[specs[0].run_id], together=2)
    tuned = finetune(lm, [ROWS[h] for h in specs[0].row_hashes], config, init_seed=0, order_seed=0,
                     on_epoch=lambda _, epoch: epoch == 2)
    for name in EVALS:
        after_two = evaluate(tuned.lm, EVALS[name])[0]["body_prompt_mean"]
        found = frame[[f"loss_{name}_epoch{k}" for k in (1, 2, 3)]]
        assert found.loc[0].nunique() == 3 and found.loc[1].isna().all()
        assert found.iloc[0, 1] == pytest.approx(after_two, rel=1e-5)
        assert found.iloc[0, 2] == frame.loc[0, f"loss_{name}"]
    tuned.close()
    plain = sweep(lm, specs, tmp_path / "plain", together=2)
    assert plain["loss_eval_1"].tolist() == pytest.approx(frame["loss_eval_1"].tolist(), rel=1e-6)


def test_a_resumed_sweep_tells_its_best_from_the_start(lm, tmp_path, capsys):
    frame = sweep(lm, specs_of(lm, 2), tmp_path)
    sweep(lm, specs_of(lm, 2), tmp_path, progress=True)
    assert f"best={frame['loss_eval_1'].min():.4f}" in capsys.readouterr().err


RUNS, KILLS = 10, 20
NURSERY = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import finetuning.test_sweep as t
t.kill_often({model!r}, {home!r})
"""


def kill_often(model: str, home: str) -> None:
    """Sweeps in forks of this process, which has torch loaded; each is killed, and looked after.

    A ledger that is complete is followed by the next, so that all kills hit a sweep at work.
    """
    lm, moment = load_lm(ModelRef(model, dtype="float32"), "cpu"), random.Random(0)
    begun = time.monotonic()
    os.waitpid(forked(lambda: sweep(lm, specs_of(lm, RUNS), f"{home}/quiet", workers=0)), 0)
    whole, folder, kept, killed = time.monotonic() - begun, Path(home, "killed0"), {}, 0
    while killed < KILLS:
        child = forked(lambda helped=killed % 5 == 1, to=folder: hurried(lm, to, helped))
        time.sleep(moment.uniform(0.1, 1.0) * whole / 3)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        texts = {path.name: path.read_text() for path in folder.glob("*.json")}
        assert kept.items() <= texts.items(), "a finished record has changed or is gone"
        kept = {name: t for name, t in texts.items() if json.loads(t)["status"] == "done"}
        if len(kept) == RUNS and killed < KILLS:
            folder, kept = Path(home, f"killed{killed}"), {}


def hurried(lm, folder: Path, helped: bool) -> None:
    """A sweep, at times with a worker beside it that outlives it by a run."""
    me, specs = os.getpid(), specs_of(lm, RUNS)
    if helped:
        job = job_of(lm, [[spec] for spec in specs], folder)
        worker = forked(lambda: workers.work_on(job, lm, me))
        with open(folder.parent / "workers", "a") as stream:
            stream.write(f"{worker}\n")
    sweep(lm, specs, folder, workers=0)


def forked(work) -> int:
    """Do the work in a child process; its pid."""
    child = os.fork()
    if child:
        return child
    # tqdm's own lock is shared with the parent's other forks: one killed inside it stops them all
    for bar in (tqdm, auto.tqdm):
        bar.set_lock(threading.RLock())
    try:
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_kill_9_at_random_moments_loses_and_doubles_nothing(lm, tmp_path, tiny_lm_folder):
    tests = Path(__file__).resolve().parents[1]
    code = NURSERY.format(root=str(tests.parent), tests=str(tests), model=str(tiny_lm_folder),
                          home=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    helped = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    patience = time.monotonic() + 200
    while not all(map(ended, helped)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert helped and all(map(ended, helped))
    expected = sweep(lm, specs_of(lm, RUNS), tmp_path / "quiet", workers=0)
    deaths = 0
    for folder in tmp_path.glob("killed*"):
        frame = sweep(lm, specs_of(lm, RUNS), folder, workers=0)
        pd.testing.assert_frame_equal(frame.drop(columns=TIMES), expected.drop(columns=TIMES),
                                      rtol=1e-6)
        left = [p.name for p in folder.iterdir() if p.suffix in (".tmp", ".lease")]
        assert not left and len(list(folder.glob("*.json"))) == RUNS
        deaths += (frame["attempt"] - 1).sum()
    assert 0 < deaths <= KILLS  # a kill costs at most the run it met
