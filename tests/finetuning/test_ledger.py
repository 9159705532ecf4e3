"""One run, one record: names, leases, atomic writing, and what the tidy frame says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock._identity import host_name

from instructmining_core.config import FinetuneConfig, InstructMiningError, ModelRef
from instructmining_core.finetuning import ledger as leases
from instructmining_core.finetuning import run_spec
from instructmining_core.finetuning.ledger import Ledger, Taken
from instructmining_core.finetuning.run import without_paths
from instructmining_core.finetuning.run_spec import EvalSets, RunSpec, hash_rows

ROOT = Path(__file__).resolve().parents[2]


def spec(**changes) -> RunSpec:
    fields = dict(
        purpose="fit", base=ModelRef("base", "sha256:1", "float32"), finetune=FinetuneConfig(),
        row_hashes=("a", "b"), init_seed=0, order_seed=0, evals={"eval_1": "x", "eval_2": "y"},
        template="plain-1", label={"set_id": "s1", "shares": {"numpy": 0.5, "json": 0.5}},
    )
    return RunSpec(**(fields | changes))


def record(run: RunSpec, status="done", loss=2.0, attempt=1, **more) -> dict:
    losses = {name: {"prompt_mean": loss, "token_mean": loss + 1, "body_prompt_mean": loss,
                     "body_token_mean": loss + 1, "first64": loss + 2,
                     "without_eos": loss + 3, "effective_n": 9.0} for name in run.evals}
    return {"run_id": run.run_id, "spec": run.content(), "label": dict(run.label),
            "status": status, "losses": losses, "attempt": attempt, "error": None, "rows": 2,
            "seconds": 1.0, "tokens_trained": 10, **more}


@pytest.mark.parametrize("change", [
    {"purpose": "verify"}, {"row_hashes": ("b", "a")}, {"init_seed": 1}, {"order_seed": 1},
    {"template": "plain-2"}, {"evals": {"eval_1": "x"}},
    {"base": ModelRef("base", "sha256:2", "float32")},
    {"base": ModelRef("base", "sha256:1", "bfloat16")},
    {"finetune": FinetuneConfig(rank=4)},
])
def test_every_part_of_the_specification_is_in_the_name(change):
    assert spec(**change).run_id != spec().run_id


def test_labels_folders_and_order_of_evals_are_not():
    assert spec(label={"set_id": "other"}).run_id == spec().run_id
    assert spec(evals={"eval_2": "y", "eval_1": "x"}).run_id == spec().run_id
    here = spec(base=ModelRef("/home/me/models/base", "sha256:1", "float32"))
    assert here.run_id == spec().run_id and "home" not in json.dumps(here.content())


def test_hash_rows_is_sha256_of_the_lines():
    """The value is coreutils': printf 'a\\nb' | sha256sum."""
    expected = "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    assert hash_rows(["a", "b"]) == expected


def test_the_name_is_the_start_of_the_hash():
    assert len(spec().run_id) == 16 and spec().sha256.startswith(spec().run_id)


def test_a_record_gives_its_specification_back():
    run = spec(finetune=FinetuneConfig(target_modules=("q_proj",), betas=(0.9, 0.95)))
    again = RunSpec.from_content(json.loads(json.dumps(run.content())), run.label)
    assert again == run and again.run_id == run.run_id


def test_a_setting_that_came_later_names_only_the_runs_that_set_it(monkeypatch):
    known = run_spec.ALWAYS_HASHED
    monkeypatch.setattr(run_spec, "ALWAYS_HASHED", known - {"weight_decay"})
    plain, other = spec(), spec(finetune=FinetuneConfig(weight_decay=0.1))
    assert "weight_decay" not in plain.content()["finetune"]
    assert other.content()["finetune"]["weight_decay"] == 0.1
    for run in (plain, other):
        assert RunSpec.from_content(run.content(), {}) == run
    monkeypatch.undo()
    assert known <= set(spec().content()["finetune"])


def test_evaluation_sets_are_hashed_once(monkeypatch):
    row = SimpleNamespace(ids=(1, 2), targets=(False, True))
    evals, calls = EvalSets(eval_1=[row, row]), []
    real = run_spec.hash_rows
    monkeypatch.setattr(run_spec, "hash_rows", lambda rows: calls.append(rows) or real(rows))
    first = evals.hashes
    assert evals.hashes is first and calls == [["(1, 2)[0, 1]"] * 2]
    assert first == {"eval_1": real(["(1, 2)[0, 1]"] * 2)}


def test_a_run_without_rows_is_refused():
    with pytest.raises(InstructMiningError, match="no training rows"):
        spec(row_hashes=())


def test_done_and_diverged_are_finished_failed_is_not(tmp_path):
    ledger = Ledger(tmp_path)
    for seed, status in enumerate(["done", "diverged", "failed"]):
        run = spec(init_seed=seed)
        assert not ledger.has(run.run_id)
        ledger.write(record(run, status))
        assert ledger.has(run.run_id) == (status != "failed")
        assert ledger.lock_run(run) == (status == "failed")


def test_a_finished_run_is_never_overwritten_a_failed_one_is(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(record(spec(), "failed"))
    ledger.write(record(spec(), "done", attempt=2))
    with pytest.raises(InstructMiningError, match="finished already"):
        ledger.write(record(spec()))
    assert ledger.load()["attempt"].tolist() == [2]


def test_the_frame(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.load().empty and "status" in ledger.load()
    ledger.write(record(spec(), loss=2.0))
    ledger.write(record(spec(init_seed=7), loss=float("nan"), status="diverged"))
    frame = ledger.load().set_index("init_seed")
    row = frame.loc[0]
    assert (row["loss_eval_1"], row["loss_eval_1_token"], row["loss_eval_2_first64"]) == (2, 3, 4)
    assert row["set_id"] == "s1" and row["shares"] == {"numpy": 0.5, "json": 0.5}
    assert row["purpose"] == "fit" and row["finetune_method"] == "lora"
    assert np.isnan(frame.loc[7, "loss_eval_1"]) and frame.loc[7, "status"] == "diverged"
    assert "NaN" not in (tmp_path / f"{spec(init_seed=7).run_id}.json").read_text()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "0123.json").write_text("{")
    with pytest.raises(InstructMiningError, match="0123.json"):
        Ledger(tmp_path).load()


def test_a_crash_while_writing_leaves_the_old_record(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.write(record(spec(), "failed"))

    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        ledger.write(record(spec(), "done"))
    assert ledger.load()["status"].tolist() == ["failed"]


def marker(ledger: Ledger, run: RunSpec, **changes) -> Path:
    """The lease file that another process might have left."""
    fields = {"pid": os.getpid(), "host": host_name(), "mode": "lease", "token": "other",
              "duration": leases.EXPIRES} | changes
    path = ledger.folder / f"{run.run_id}.lease"
    path.write_text("".join(["filelock/2\n", *(f"{k}={v}\n" for k, v in fields.items())]))
    return path


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


HOLDER = """
import json, sys
from instructmining_core.finetuning.ledger import Ledger, RunSpec
ledger = Ledger(sys.argv[1])
print(ledger.lock_run(RunSpec.from_content(json.loads(sys.argv[2]), {})), flush=True)
sys.stdin.read()
"""


def test_a_run_is_one_process_s_while_it_lives(tmp_path):
    ledger = Ledger(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(spec().content())]
    child = subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == "True"
    assert not ledger.lock_run(spec())
    assert ledger.owner(spec().run_id).startswith(f"process {child.pid} on ")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until looked at
    assert ledger.lock_run(spec()) and not ledger.lock_run(spec())
    child.wait()
    assert not Ledger(tmp_path).lock_run(spec())
    ledger.release(spec().run_id)
    assert ledger.owner(spec().run_id) is None


@pytest.fixture
def hasty(monkeypatch):
    """Leases that live for half a second."""
    monkeypatch.setattr(leases, "EXPIRES", 0.5)
    monkeypatch.setattr(leases, "BEAT", 0.1)


def seconds_until_taken(ledger: Ledger, run: RunSpec, patience: float) -> float | None:
    begun = time.monotonic()
    while time.monotonic() - begun < patience:
        if ledger.lock_run(run):
            return time.monotonic() - begun
        time.sleep(0.02)
    return None


def test_a_lease_of_another_host_expires(tmp_path, hasty):
    ledger = Ledger(tmp_path)
    marker(ledger, spec(), host="elsewhere")
    assert 0.5 <= seconds_until_taken(ledger, spec(), 5)
    assert ledger.read(spec().run_id)["killed"]


def test_an_owner_keeps_its_lease_and_a_silent_one_loses_it(tmp_path, hasty, monkeypatch):
    """Another host (as it sees itself) can only watch; a stopped process gives no sign of life."""
    owner, other = Ledger(tmp_path), Ledger(tmp_path)
    assert owner.lock_run(spec())
    path = tmp_path / f"{spec().run_id}.lease"
    monkeypatch.setattr("filelock._identity.socket.gethostname", lambda: "elsewhere")
    assert seconds_until_taken(other, spec(), 1.5) is None
    path.write_text(path.read_text())  # its heart beats on the file itself: it lives
    owner._leases[spec().run_id]._stop_heartbeat()
    assert seconds_until_taken(other, spec(), 5)
    with pytest.raises(Taken, match="process"):
        owner.write(record(spec()))
    other.write(record(spec(), attempt=2))
    owner.release(spec().run_id)
    assert other.has(spec().run_id) and not path.exists()


def test_a_file_system_that_cannot_swap_names_keeps_no_dead_lease(tmp_path, hasty, monkeypatch):
    """As NFS does; filelock alone would wait for ever."""
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    ledger = Ledger(tmp_path)
    marker(ledger, spec(), host="elsewhere")
    assert seconds_until_taken(ledger, spec(), 5) >= 0.75


def test_a_process_killed_before_it_wrote_its_name_holds_nothing(tmp_path):
    (tmp_path / f"{spec().run_id}.lease").touch()
    assert Ledger(tmp_path).lock_run(spec())


def test_a_reused_pid_holds_nothing(tmp_path):
    ledger = Ledger(tmp_path)
    marker(ledger, spec(), start=1)
    assert ledger.lock_run(spec())


def test_taking_over_a_dead_lease_records_the_death(tmp_path, dead_pid):
    ledger, run = Ledger(tmp_path), spec()
    marker(ledger, run, pid=dead_pid)
    assert ledger.lock_run(run, tried=0)
    found = ledger.read(run.run_id)
    assert found["error"] == f"process {dead_pid} died"
    assert (found["status"], found["attempt"], found["killed"]) == ("failed", 1, True)
    assert ledger.load()["set_id"].tolist() == ["s1"]
    ledger.write({k: v for k, v in record(run).items() if k != "attempt"})
    assert ledger.load()[["status", "attempt"]].values.tolist() == [["done", 2]]


def test_a_killed_attempt_is_no_failure_of_the_sweep(tmp_path, dead_pid):
    """`tried` leaves alone what failed since, not what died since."""
    run = spec()
    for _ in range(2):
        ledger = Ledger(tmp_path)
        marker(ledger, run, pid=dead_pid)
        assert ledger.lock_run(run, tried=0)
        ledger.release(run.run_id)
    assert ledger.read(run.run_id)["attempt"] == 2
    ledger.write(record(run, "failed", attempt=3))
    assert not ledger.lock_run(run, tried=0) and not ledger.lock_run(run, tried=2)
    assert ledger.lock_run(run, tried=3)


def test_another_s_lease_is_neither_released_nor_written_over(tmp_path):
    ledger, run = Ledger(tmp_path), spec()
    assert ledger.lock_run(run)
    (tmp_path / f"{run.run_id}.lease").unlink()
    marker(ledger, run, host="elsewhere")
    with pytest.raises(Taken, match="on elsewhere"):
        ledger.write(record(run))
    ledger.release(run.run_id)
    with pytest.raises(Taken, match="on elsewhere"):
        ledger.write(record(run))
    assert ledger.owner(run.run_id) == "process 1 on elsewhere".replace("1", str(os.getpid()))
    assert ledger.load().empty


def test_what_killed_processes_left_is_cleared_away(tmp_path, dead_pid):
    ledger, run, here = Ledger(tmp_path), spec(), socket.gethostname()
    ledger.write(record(run))
    marker(ledger, run, pid=dead_pid)  # killed after the record, before the lease's end
    marker(ledger, spec(init_seed=9), pid=dead_pid)
    names = {f".a.json.{dead_pid}@{here}.tmp": 0, f".b.json.{os.getpid()}@{here}.tmp": 0,
             ".c.json.7@elsewhere.tmp": 0, ".d.json.7@elsewhere.tmp": 3600}
    for name, seconds in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - seconds,) * 2)
    ledger.clear()
    left = {p.name for p in tmp_path.iterdir() if p.suffix in (".tmp", ".lease")}
    assert left == {f".b.json.{os.getpid()}@{here}.tmp", ".c.json.7@elsewhere.tmp",
                    f"{spec(init_seed=9).run_id}.lease"}


def test_no_user_s_path_in_an_error():
    text = "FileNotFoundError: /home/me/secret/base/model.safetensors and C:\\Users\\me\\x.txt"
    assert without_paths(text) == "FileNotFoundError: model.safetensors and x.txt"
    assert without_paths("ratio 3/4, https://host/a/b") == "ratio 3/4, https://host/a/b"


def test_specifications_are_compared_without_labels():
    assert replace(spec(), label={}) == spec()
