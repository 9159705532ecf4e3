"""The fault campaign in small: every fault once or twice, and a table that can fail."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # given back afterwards


def test_nothing_is_lost_doubled_or_wrong(monkeypatch, capsys):
    monkeypatch.setenv("FAULTS_SIZES", "270,2,3,8")  # for the processes of the stages as well
    from bench import faults

    faults = importlib.reload(faults)
    table = faults.campaign(kill_count=5, tries=1)
    told = capsys.readouterr().err
    assert not table[["lost", "doubled", "wrong"]].to_numpy().any(), told
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
