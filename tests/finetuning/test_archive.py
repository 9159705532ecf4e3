"""Finished runs kept as Parquet: exact, only added to, not run again; and the committed ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructmining_core.config import FinetuneConfig, ModelRef
from instructmining_core.finetuning.ledger import ContinuedLedger, Ledger, RunArchive
from instructmining_core.finetuning.run import without_paths
from instructmining_core.finetuning.run_spec import RunSpec, hash_rows

EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"
COMMITTED = sorted({part.parents[1] for part in EVIDENCE.glob("*/ledger/*.parquet")})
LARGEST = 15e6  # bytes of all evidence


def spec(seed: int) -> RunSpec:
    return RunSpec(
        purpose="fit", base=ModelRef("base", "sha256:1", "float32"), finetune=FinetuneConfig(),
        row_hashes=("a", "b"), init_seed=seed, order_seed=0, evals={"eval_1": "x"},
        template="plain-1", label={"set_id": "s1"},
    )  # fmt: skip


def record(seed: int, status: str = "done", prompts: int = 40) -> dict:
    """As the ledger would give it back: losses of six decimals, some missing, whole tokens."""
    rng, run = np.random.default_rng(seed), spec(seed)
    nll = np.round(rng.gamma(2, 300, prompts), 6).tolist()
    examples = {"eval_1": {
        "nll": nll, "tokens": rng.integers(1, 600, prompts).tolist(),
        "nll_eos": [one if i % 3 else None for i, one in enumerate(nll)],
        "nll_first": [None] * prompts, "fine": rng.normal(size=prompts).tolist(),
    }, "none": {}}  # fmt: skip
    return {
        **run.head(), "status": status, "attempt": 1, "ended": f"2026-01-0{seed + 1}T00:00:00Z",
        "examples": examples if status == "done" else {}, "error": None, "seconds": 1 / 3,
        "losses": {"eval_1": {"prompt_mean": float(rng.normal())}} if status == "done" else {},
        "hardware": {"processor": "one", "cores": 2, "threads": 1}, "commit": "c" * 40,
    }  # fmt: skip


def test_the_record_comes_back_number_for_number(tmp_path):
    wanted = [record(0), record(1), record(2, "diverged")]
    part = RunArchive(tmp_path).append(wanted)
    archive = RunArchive(tmp_path)
    assert [archive.read(one["run_id"]) for one in wanted] == wanted
    assert archive.read("0" * 16) is None
    schema = pq.read_schema(part)
    assert schema.field("eval_1.tokens").type.value_type == pa.int32()
    assert schema.field("eval_1.nll").type.value_type == pa.int64(), "millionths"
    assert "eval_1.fine" not in schema.names, "more than six decimals: left in the JSON"


def test_the_frame_is_the_ledgers(tmp_path):
    ledger, archive = Ledger(tmp_path / "ledger"), RunArchive(tmp_path / "archive")
    for seed in range(3):
        ledger.write(record(seed))
    archive.append(ledger.records().values())
    assert archive.load().equals(ledger.load()) and len(archive.load()) == 3
    assert archive.load()[["machine", "threads"]].values.tolist() == [["one, 2 cores", 1]] * 3


def test_parts_are_added_once_and_never_touched(tmp_path):
    archive = RunArchive(tmp_path)
    first = archive.append([record(0), record(1, "failed")])
    before = first.read_bytes()
    assert archive.append([record(0)]) is None and RunArchive(tmp_path).append([record(0)]) is None
    second = archive.append([record(0), record(2)])
    assert second.name.startswith("2026-01-03-") and first.read_bytes() == before
    assert set(archive.records()) == {record(0)["run_id"], record(2)["run_id"]}
    assert archive.append([record(1)]), "what failed before and is finished now"


def test_a_crash_while_writing_leaves_no_part(tmp_path, monkeypatch):
    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        RunArchive(tmp_path).append([record(0)])
    assert list(tmp_path.iterdir()) == [] and RunArchive(tmp_path).load().empty


def test_parts_of_two_machines_may_hold_the_same_run(tmp_path):
    RunArchive(tmp_path / "a").append([record(0)])
    other = record(0) | {"seconds": 9.0}
    RunArchive(tmp_path / "b").append([other, record(3)])
    for part in (*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()):
        part.rename(tmp_path / part.name)
    found = RunArchive(tmp_path)
    assert found.read(record(0)["run_id"]) == record(0) and len(found.load()) == 2


def test_a_ledger_goes_on_from_an_archive(tmp_path):
    RunArchive(tmp_path / "kept").append([record(0), record(1)])
    ledger = ContinuedLedger(tmp_path / "own", RunArchive(tmp_path / "kept"))
    assert ledger.has(spec(0).run_id) and not (tmp_path / "own").exists(), "reading makes no folder"
    assert not ledger.lock_run(spec(0)) and ledger.lock_run(spec(2))
    ledger.write(record(2))
    Ledger(tmp_path / "own").write(record(1, "failed"))
    assert ledger.read(spec(1).run_id) == record(1), "finished there, whatever failed here"
    assert ledger.load()["status"].tolist() == ["done"] * 3
    assert ledger.kept(spec(seed).run_id for seed in (0, 0, 1, 2, 3)) == 2


@pytest.mark.parametrize("profile", COMMITTED, ids=lambda path: path.name)
def test_the_name_of_every_committed_run_recomputes_from_its_record(profile):
    archive = RunArchive(profile / "ledger")
    for run_id, found in archive.records().items():
        run = RunSpec.from_content(found["spec"], found["label"])
        assert (run.run_id, run.sha256) == (run_id, found["spec_sha256"])
        assert hash_rows(run.row_hashes) == found["data_sha256"]
        assert len(found["commit"]) >= 40 and found["hardware"]["processor"]
    names = [json.loads(path.read_text()) for path in sorted((profile / "runs").glob("*.json"))]
    assert all(archive.has(run_id) for listed in names for run_id in listed)


@pytest.mark.parametrize("profile", COMMITTED, ids=lambda path: path.name)
def test_the_losses_of_committed_runs_are_the_means_of_their_prompts(profile):
    archive = RunArchive(profile / "ledger")
    for run_id in sorted(archive.records())[:20]:
        found = archive.read(run_id)
        for name, losses in found["losses"].items():
            part = {key: np.array(one, float) for key, one in found["examples"][name].items()}
            asked = part["tokens"] > 0
            by_hand = np.mean(part["nll"][asked] / part["tokens"][asked])
            # six decimals of a sum of losses are five or more of its mean
            assert by_hand == pytest.approx(losses["prompt_mean"], abs=1e-6)


@pytest.mark.parametrize("profile", COMMITTED, ids=lambda path: path.name)
def test_no_path_of_a_machine_is_published(profile):
    for path in sorted(path for path in profile.rglob("*") if path.is_file()):
        if path.suffix != ".parquet":
            texts = [path.read_text(encoding="utf-8")]
        else:
            table = pq.read_table(path, partitioning=None)
            texts = [value.decode() for value in (table.schema.metadata or {}).values()]
            for column in table.columns:
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    texts += filter(None, column.unique().to_pylist())
        assert not [text for text in texts if without_paths(text) != text], path


def test_all_evidence_is_small():
    total = sum(path.stat().st_size for profile in COMMITTED for path in profile.rglob("*"))
    assert total < LARGEST
