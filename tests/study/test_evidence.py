"""A study that grows over sittings and machines: keep, go on, publish, compare."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from instructmining import book
from instructmining.experiments import machines
from instructmining.experiments.comparisons import LOSSES, per_example
from instructmining.study import PlannedRun, Study
from instructmining_core.indicators.score_table import read_scores, write_scores

WORDS = np.array("sort list file path item value key row index name open close read".split())
PROFILE = """extends: smoke
name: mini
data:
  kind: files
  folder: ""
  sources: [{{name: a, where: a.jsonl}}]
  eval_1: {{name: x, where: x.jsonl}}
  eval_2: {{name: y, where: y.jsonl}}
  eval_prompts: 5
models: {{base: {{id: {base}, dtype: float32}}, ladder: []}}
finetune: {{max_tokens: 64}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_lm_folder):
    """A home with a profile of files; the current folder."""
    folder, rng = tmp_path_factory.mktemp("mini"), np.random.default_rng(0)
    for name, count in {"a": 40, "x": 5, "y": 5}.items():
        rows = [{"instruction": " ".join(rng.choice(WORDS, 6)),
                 "output": " ".join(rng.choice(WORDS, 5))} for _ in range(count)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mini.yaml").write_text(PROFILE.format(base=tiny_lm_folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("INSTRUCTMINING_HOME", str(folder))
        yield folder


def run(study: Study, purpose: str) -> pd.DataFrame:
    """Four sets of a sweep, or two pools × two seeds × {selected, random}."""
    hashes = study.data.candidates["row_hash"].tolist()
    labels = [{"set_id": f"s{i}", "arm": "within", "source": "a"} for i in range(4)]
    if purpose == "gate":
        labels = [{"pool": pool, "method": method, "size": 6, "seed": seed} for pool in "pq"
                  for method in ("selected", "random") for seed in range(2)]  # fmt: skip
    plans = [PlannedRun(tuple(hashes[3 * i : 3 * i + 6]), label, label.get("seed", 0))
             for i, label in enumerate(labels)]  # fmt: skip
    return study.run(purpose, plans, progress=False)


@pytest.fixture(scope="module")
def kept(home):
    """What two sittings gave, kept after each; then the machine is another one."""
    study = Study.open("mini.yaml")
    sweep = run(study, "sweep")
    book.keep("mini.yaml")
    book.keep("mini.yaml")
    gate = run(study, "gate")
    prompts = per_example(study, gate)
    run(study, "verify")
    book.keep("mini.yaml")
    shutil.rmtree(study.folder)
    return sweep, gate, prompts


def test_another_machine_goes_on_from_the_evidence(home, kept):
    sweep, gate, prompts = kept
    assert len(list((home / "evidence" / "mini" / "ledger").iterdir())) == 2, "a part a sitting"
    study = Study.open("mini.yaml")
    with pytest.warns(UserWarning, match="4 runs of 'sweep' are those of the committed evidence"):
        assert run(study, "sweep").equals(sweep)
    with pytest.warns(UserWarning, match="8 runs of 'gate'"):
        again = run(study, "gate")
    assert again.equals(gate) and not list((study.folder / "ledger").glob("*.json"))
    found = per_example(study, again)
    assert found.keys() == prompts.keys()
    assert all((found[key] == prompts[key]).all() for key in prompts)
    assert study.base_of_sweep()["dtype"] == "float32"
    assert study.runs("sweep")["run_id"].tolist() == sorted(sweep["run_id"])


def test_what_the_runs_took(home, kept):
    sweep, gate, _ = kept
    table = machines.costs(Study.open("mini.yaml").ledger.load()).set_index("purpose")
    assert table["runs"].to_dict() == {"gate": 8, "sweep": 4}
    assert table.loc["gate", "hours"] == pytest.approx(gate["seconds"].sum() / 3600)
    assert table["machine"].str.contains("cores").all() and (table["dtype"] == "float32").all()


def test_runs_done_again_on_one_thread_are_the_same_runs(home, kept, capsys):
    run(Study.open("mini.yaml"), "gate")  # the lists of what was asked for
    run(Study.open("mini.yaml"), "sweep")
    book.compare("mini.yaml", 8, "", 1)
    said = capsys.readouterr().err
    assert "8 runs done again, 8 in evidence/mini/compared.parquet" in said
    table = pd.read_parquet(home / "evidence" / "mini" / "compared.parquet")
    assert table["purpose"].value_counts().to_dict() == {"gate": 4, "sweep": 4}
    assert set(table["threads_again"]) == {1} and set(table["dtype_again"]) == {"float32"}
    for loss in LOSSES:  # the order of float32 sums
        first, again = table[f"{loss}_first"], table[f"{loss}_again"]
        assert again.to_numpy() == pytest.approx(first.to_numpy(), rel=1e-4)
    moved = machines.differences(table)
    assert moved["loss"].tolist() == LOSSES and (moved["largest"] < 1e-3).all()
    gained = machines.gains(table)
    assert gained["pool"].tolist() == ["p", "q"] and gained["pairs"].tolist() == [1, 1]
    assert "turned" in said and gained["again"].to_numpy() == pytest.approx(
        gained["first"].to_numpy(), abs=1e-4)
    book.compare("mini.yaml", 8, "", 1)
    assert "8 runs done again, 8 in" in capsys.readouterr().err, "those of the same setting go"


def test_gains_say_which_sign_turned():
    told = {"purpose": "gate", "seed": 0, "machine_again": "m", "dtype_again": "d",
            "threads_again": 1}
    losses = [("p", "selected", 1.0, 1.1), ("p", "random", 2.0, 1.0), ("q", "selected", 1.0, 1.0),
              ("q", "random", 2.0, 2.0)]
    rows = [{**told, "pool": pool, "method": method, "loss_eval_2_first": first,
             "loss_eval_2_again": again} for pool, method, first, again in losses]
    found = machines.gains(pd.DataFrame(rows)).set_index("pool")
    assert found["turned"].to_dict() == {"p": True, "q": False}
    assert found.loc["p", "first"] == pytest.approx(np.log(2))


def test_numbers_are_replaced_runs_and_comparisons_stay(tmp_path):
    folder, evidence = tmp_path / "results", tmp_path / "evidence"
    for name in ("claims/one.json", "runs/sweep.json", "runs/verify.json", "verdict.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    scores = pd.DataFrame({"id": ["1", "2"], "file": [str(tmp_path / "a.jsonl"), "src/b.py"]})
    scores.attrs = {"indicators": {}}
    write_scores(scores, folder / "scores.parquet")
    for name in ("claims/old.json", "null.parquet", "compared.parquet", "ledger/part.parquet"):
        (evidence / name).parent.mkdir(parents=True, exist_ok=True)
        (evidence / name).touch()
    book._copy_numbers(folder, evidence)
    found = {str(path.relative_to(evidence)) for path in evidence.rglob("*") if path.is_file()}
    assert found == {"claims/one.json", "runs/sweep.json", "verdict.csv", "scores.parquet",
                     "compared.parquet", "ledger/part.parquet"}
    assert read_scores(evidence / "scores.parquet")["file"].tolist() == ["a.jsonl", "src/b.py"]
