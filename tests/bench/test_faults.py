"""The fault campaign in small: every fault once or twice, and a table that can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def test_nothing_is_lost_doubled_or_wrong(tmp_path):
    """In a process of its own: the campaign forks, and this one has pools of threads."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.faults", "--kills", "5", "--tries", "1", "--out",
         str(tmp_path / "faults.csv")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"FAULTS_SIZES": "270,2,3,8", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "faults.csv")
    assert not table[["lost", "doubled", "wrong"]].to_numpy().any(), done.stderr[-3000:]
    assert set(table["fault"]) >= {"kill -9 at a random moment", "full disk", "read-only results",
                                   "two processes on one folder", "memory limit"}
    assert table.loc[table["fault"] == "kill -9 at a random moment", "injected"].sum() >= 5
    others = table[table["fault"] != "kill -9 at a random moment"]  # five kills reach some stages
    assert (others["injected"] > 0).all()


def test_what_is_lost_doubled_or_other_is_counted(tmp_path):
    from bench.faults import Campaign, Row

    frame = pd.DataFrame({"value": [1.0, 2.0, 3.0]}, index=pd.Index(["a", "b", "c"], name="run"))
    own = object.__new__(Campaign)
    own.tables = {"sweep": frame}
    found = {"lost": frame.iloc[:2], "doubled": pd.concat([frame, frame.iloc[:1]]),
             "wrong": frame + np.array([[0], [0], [1e-9]]), "same": frame}
    for kind, result in found.items():
        row = Row("a fault", "sweep", "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bench.faults.result", lambda *_, found=result: found)
            own.compare(row, "sweep", tmp_path)
        counts = {name: getattr(row, name) for name in ("lost", "doubled", "wrong", "same")}
        assert counts == {name: int(name == kind) for name in counts}
