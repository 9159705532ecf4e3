"""One run, one record: names, claims, atomic writing, and what the tidy frame says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from instructmining_core.config import FinetuneConfig, ModelRef
from instructmining_core.finetuning import ledger as holders
from instructmining_core.finetuning.ledger import (
    Ledger,
    LedgerError,
    RunSpec,
    Taken,
    hash_rows,
    spec_from,
)
from instructmining_core.finetuning.run import SpecError, without_paths


def spec(**changes) -> RunSpec:
    fields = dict(
        purpose="fit", base=ModelRef("base", "sha256:1", "float32"), finetune=FinetuneConfig(),
        row_hashes=("a", "b"), init_seed=0, order_seed=0, evals={"eval_1": "x", "eval_2": "y"},
        template="plain-1", label={"set_id": "s1", "shares": {"numpy": 0.5, "json": 0.5}},
    )
    return RunSpec(**(fields | changes))


def record(run: RunSpec, status="done", loss=2.0, attempt=1, **more) -> dict:
    losses = {name: {"prompt_mean": loss, "token_mean": loss + 1, "first64": loss + 2,
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
    again = spec_from(json.loads(json.dumps(run.content())), run.label)
    assert again == run and again.run_id == run.run_id


def test_a_run_without_rows_is_refused():
    with pytest.raises(SpecError, match="no training rows"):
        spec(row_hashes=())


def test_done_and_diverged_are_finished_failed_is_not(tmp_path):
    ledger = Ledger(tmp_path)
    for seed, status in enumerate(["done", "diverged", "failed"]):
        run = spec(init_seed=seed)
        assert not ledger.has(run.run_id)
        ledger.write(record(run, status))
        assert ledger.has(run.run_id) == (status != "failed")
        assert ledger.claim(run.run_id) == (status == "failed")


def test_a_finished_run_is_never_overwritten_a_failed_one_is(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(record(spec(), "failed"))
    ledger.write(record(spec(), "done", attempt=2))
    with pytest.raises(LedgerError, match="finished already"):
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
    with pytest.raises(LedgerError, match="0123.json"):
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


def test_a_claim_is_exclusive_while_its_process_lives(tmp_path):
    ledger = Ledger(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from instructmining_core.finetuning.ledger import Ledger\n"
         "print(Ledger(sys.argv[1]).claim('r1'), flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    assert child.stdout.readline().strip() == "True"
    assert ledger.busy("r1") and not ledger.claim("r1")
    assert ledger.holder("r1")["pid"] == child.pid
    child.kill()
    child.wait()
    assert not ledger.busy("r1") and ledger.claim("r1")
    ledger.release("r1")
    assert ledger.holder("r1") is None


def claimed_by(ledger: Ledger, run_id: str, **changes) -> dict:
    """A claim file that another process might have left."""
    holder = holders.this_process() | changes
    (ledger.folder / f"{run_id}.claim").write_text(json.dumps(holder))
    return holder


def age(ledger: Ledger, run_id: str, seconds: float) -> None:
    os.utime(ledger.folder / f"{run_id}.claim", (time.time() - seconds,) * 2)


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(("seconds", "free"), [(0, False), (170, False), (190, True)])
def test_a_claim_on_another_host_expires(tmp_path, seconds, free):
    ledger = Ledger(tmp_path)
    claimed_by(ledger, "r1", host="elsewhere")
    age(ledger, "r1", seconds)
    assert ledger.busy("r1") != free and ledger.claim("r1") == free


def test_an_owner_keeps_its_claim_warm_and_no_other_s(tmp_path, monkeypatch):
    monkeypatch.setattr(holders, "BEAT", 0.01)
    ledger = Ledger(tmp_path)
    assert ledger.claim("r1") and ledger.claim("r2")
    claimed_by(ledger, "r2", host="elsewhere")
    age(ledger, "r1", 1000)
    age(ledger, "r2", 1000)
    patience = time.monotonic() + 5
    while time.monotonic() < patience and time.time() - modified(ledger, "r1") > 500:
        time.sleep(0.01)
    assert time.time() - modified(ledger, "r1") < 500 < time.time() - modified(ledger, "r2")


def modified(ledger: Ledger, run_id: str) -> float:
    return (ledger.folder / f"{run_id}.claim").stat().st_mtime


def test_taking_over_a_dead_claim_records_the_death(tmp_path, dead_pid):
    ledger, run = Ledger(tmp_path), spec()
    claimed_by(ledger, run.run_id, pid=dead_pid)
    assert ledger.claim(run, tried=0)
    found = ledger.read(run.run_id)
    assert found["error"] == f"process {dead_pid} died"
    assert (found["status"], found["attempt"], found["killed"]) == ("failed", 1, True)
    assert ledger.load()["set_id"].tolist() == ["s1"]
    ledger.write({k: v for k, v in record(run).items() if k != "attempt"})
    assert ledger.load()[["status", "attempt"]].values.tolist() == [["done", 2]]


def test_a_killed_attempt_is_no_failure_of_the_sweep(tmp_path, dead_pid):
    """`tried` leaves alone what failed since, not what died since."""
    ledger, run = Ledger(tmp_path), spec()
    for _ in range(2):
        claimed_by(ledger, run.run_id, pid=dead_pid)
        assert ledger.claim(run, tried=0)
    assert ledger.read(run.run_id)["attempt"] == 2
    ledger.write(record(run, "failed", attempt=3))
    assert not ledger.claim(run, tried=0) and not ledger.claim(run, tried=2)
    assert ledger.claim(run, tried=3)


def test_another_s_claim_is_neither_released_nor_written_over(tmp_path):
    ledger, run = Ledger(tmp_path), spec()
    assert ledger.claim(run)
    claimed_by(ledger, run.run_id, host="elsewhere")
    ledger.release(run.run_id)
    assert ledger.holder(run.run_id)["host"] == "elsewhere"
    with pytest.raises(Taken, match="on elsewhere"):
        ledger.write(record(run))
    assert ledger.load().empty


def test_what_killed_processes_left_is_cleared_away(tmp_path, dead_pid):
    ledger, run = Ledger(tmp_path), spec()
    here = holders.this_process()["host"]
    ledger.write(record(run))
    claimed_by(ledger, run.run_id, pid=dead_pid)  # killed after the record, before the claim's end
    claimed_by(ledger, "unfinished", pid=dead_pid)
    names = {f".a.json.{dead_pid}@{here}.tmp": 0, f".b.json.{os.getpid()}@{here}.tmp": 0,
             ".c.json.7@elsewhere.tmp": 0, ".d.json.7@elsewhere.tmp": 3600}
    for name, seconds in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - seconds,) * 2)
    with ledger.locked():
        left = sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".tmp", ".claim"))
    assert left == [f".b.json.{os.getpid()}@{here}.tmp", ".c.json.7@elsewhere.tmp",
                    "unfinished.claim"]


def test_a_claim_on_another_host_holds_and_a_reused_pid_does_not(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.claim("r1")
    path = tmp_path / "r1.claim"
    mine = json.loads(path.read_text())
    path.write_text(json.dumps(mine | {"host": "elsewhere"}))
    assert not ledger.claim("r1")
    path.write_text(json.dumps(mine | {"started": mine["started"] - 100}))
    assert ledger.claim("r1")


def test_a_second_sweep_is_told_who_holds_the_ledger(tmp_path):
    with Ledger(tmp_path).locked():
        code = ("import sys; from instructmining_core.finetuning.ledger import Ledger\n"
                "with Ledger(sys.argv[1]).locked(): pass")
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                               text=True)
    assert other.returncode == 1
    assert f"process {os.getpid()} on " in other.stderr and " since 2" in other.stderr
    with Ledger(tmp_path).locked():
        pass


def test_no_user_s_path_in_an_error():
    text = "FileNotFoundError: /home/me/secret/base/model.safetensors and C:\\Users\\me\\x.txt"
    assert without_paths(text) == "FileNotFoundError: model.safetensors and x.txt"
    assert without_paths("ratio 3/4, https://host/a/b") == "ratio 3/4, https://host/a/b"


def test_specifications_are_compared_without_labels():
    assert replace(spec(), label={}) == spec()
