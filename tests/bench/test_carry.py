"""A study in miniature whose sweep and gate are done in another folder, as on another machine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instructmining import plan
from instructmining.experiments import gate
from instructmining.study import Study
from instructmining_core.finetuning.ledger import Ledger
from instructmining_core.finetuning.run import commit
from instructmining_core.indicators.bank import ScoreCache

ROOT = Path(__file__).resolve().parents[2]
WORDS = np.array("sort list file path item value key row index name open close read write".split())
PROFILE = """extends: smoke
name: mini
data:
  kind: files
  folder: ../shared/data
  sources:
    [{{name: a, where: a.jsonl.gz}}, {{name: b, where: b.jsonl.gz}},
     {{name: c, where: c.jsonl.gz}}]
  eval_1: {{name: x, where: x.jsonl.gz}}
  eval_2: {{name: y, where: y.jsonl.gz}}
  eval_more: [{{name: z, where: z.jsonl.gz}}]
  human: {{name: x, where: w.jsonl.gz}}
  regime_prompts: 0
  rows_per_source: 30
  pool_rows: 40
  pools_of: [a, b]
  eval_prompts: 6
  choices: [{{name: docstrings, where: embedded, take: 4}}]
regime: {{rows: []}}
models: {{base: {{id: {base}, dtype: float32}}, ppl: {{id: {base}, dtype: float32}}, ladder: []}}
design:
  {{size: 8, fusion: 2, within: 9, mixed: 3, tokens: 0, anchors: 1, anchor_seeds: 1,
    sets_per_source: 3}}
finetune: {{max_tokens: 96}}
indicators: [len_in, len_out, log_ppl]
inference: {{columns: [len_out], permutations: 19}}
selection:
  {{size: 6, redraws: true, seeds: 2, draws: 2, matched: 2, baseline_seeds: 1, rivals: [longest],
    equal_steps: true, equal_tokens: 1, refits: 1}}
"""


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


@pytest.fixture
def home(tmp_path, tiny_lm_folder, monkeypatch):
    data = tmp_path / "shared" / "data"
    data.mkdir(parents=True)
    for seed, name in enumerate("abcxyzw"):
        rng, count = np.random.default_rng(seed % 6 if name != "w" else 9), 90
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as stream:
            for _ in range(count if name in "abc" else 8):
                asked, told = (" ".join(rng.choice(WORDS, n)) for n in rng.integers(2, 9, 2))
                stream.write(json.dumps({"instruction": asked, "output": told}) + "\n")
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mini.yaml").write_text(PROFILE.format(base=tiny_lm_folder))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(folder))
    return folder


def carried(packed, there, monkeypatch, seconds=240):
    """Put the folders together and call the script, as on a machine that has all packages."""
    for folder in packed:
        shutil.copytree(folder, there, dirs_exist_ok=True)
    python = there / "python"
    python.write_text(f'#!/bin/bash\n[ "$2" = pip ] && exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(there / "go.sh"), str(seconds)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PY": str(python), "WORKERS": "2", "OUT": str(there / "out")})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_device_is_held_against_the_cpu(capsys):
    from bench import carry

    carry.check("tiny", rows=4)
    told = [line.split(": ")[1].split(";")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 8 and told[0] == told[1] == told[2] != told[3] == told[4] == told[5]


def test_scores_and_runs_made_elsewhere_are_those_of_home(home, tmp_path, monkeypatch):
    from bench import carry

    monkeypatch.setattr(carry, "_download", lambda wanted, into: [
        (into / f"{name.partition('=')[0]}.whl").write_bytes(b"wheel" * 1000) for name in wanted])
    # first call: the bank of scores
    packed = carry.pack(tmp_path / "one", "mini.yaml", [], ["score"], mib=1, exact=True)
    carried(packed, tmp_path / "there", monkeypatch)
    out = tmp_path / "there" / "out"
    study = Study.open("mini.yaml")
    _, scores = carry.take([out / "runs.tgz", out / "bank.tgz"], "mini")
    rows = study.data.everything["row_hash"]
    assert scores >= rows.nunique()
    for key in study.scorer().keys():
        assert set(ScoreCache(study.bank).get(key, rows.tolist())) == set(rows)
    # second call: the sweep, whose jobs are made here, and the gate, whose jobs are made there
    packed = carry.pack(tmp_path / "two", "mini.yaml", ["sweep"], ["gate"], mib=1, exact=True)
    told = carried(packed, tmp_path / "again", monkeypatch)
    runs, _ = carry.take([tmp_path / "again" / "out" / "runs.tgz"], "mini")
    assert f"{runs} records" in told
    study = Study.open("mini.yaml")
    sweep, _ = plan.stage_plans(study, "sweep")
    study.list_runs("sweep", plan.run_ids(study, "sweep", sweep))
    gates, refits = gate.gate_plans(study, None), gate.refit_plans(study)
    wanted = {one for stage, plans in (("sweep", sweep), ("gate", gates), ("refit", refits))
              for one in plan.run_ids(study, stage, plans)}  # fmt: skip
    assert set(study.ledger.load()["run_id"]) == wanted and runs == len(wanted)
    # a run of each kind again at home
    elsewhere = study.ledger.load().set_index("run_id")
    shutil.move(study.folder / "ledger", tmp_path / "kept")
    study = Study.open("mini.yaml")
    for stage, plans in (("sweep", sweep[:1]), ("gate", gates[:1])):
        own = study.run(stage, plans, progress=False).set_index("run_id")
        losses = [name for name in own if name.startswith(("loss_", "base_", "accuracy_"))]
        assert {"loss_eval_1", "accuracy_docstrings"} <= set(losses)
        np.testing.assert_allclose(
            own[losses].astype(float), elsewhere.loc[own.index, losses].astype(float), rtol=2e-5)
    made = Ledger(tmp_path / "kept").records().values()
    assert {one["commit"] for one in made} == {commit()}, "the copy there has no history"
