from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[1]), *sys.path])


def row(bench, ratio):
    return {"bench": bench, "peer": "p", "ours": 1, "theirs": 2, "ratio": ratio, "unit": "rows/s"}


def test_a_new_run_replaces_its_bench_and_keeps_the_others(tmp_path):
    from bench.__main__ import write

    path = tmp_path / "results" / "bench.json"
    write([row("b", 1.0), row("b", 2.0), row("a", 3.0)], path)
    write([row("b", 9.0)], path)
    found = [(r["bench"], r["ratio"]) for r in json.loads(path.read_text())]
    assert found == [("a", 3.0), ("b", 9.0)]


def test_table_says_where_a_goal_is_missed():
    from bench.__main__ import table

    rows = [row("ppl_vs_row", 1.99), row("ppl_vs_row", 2.0), row("other", None)]
    lines = table(rows).splitlines()
    assert lines[2].endswith("| 2.0 MISSED |") and lines[3].endswith("| 2.0 ok |")
    assert lines[4].endswith("| None |  |")


def test_only_takes_a_name_or_the_start_of_names(tmp_path, monkeypatch, capsys):
    from bench import __main__ as bench

    ran = []
    names = ("ppl_a", "ppl_a_60m", "knn")
    table = {n: (lambda n=n: ran.append(n) or [row(n, 1.0)]) for n in names}
    monkeypatch.setattr(bench, "found_benches", lambda: table)
    out = ["--out", str(tmp_path / "bench.json")]
    assert bench.main(["--only", "ppl_a", *out]) == 0 and ran == ["ppl_a"]
    assert bench.main(["--only", "ppl", *out]) == 0 and ran[1:] == ["ppl_a", "ppl_a_60m"]
    assert bench.main(["--only", "nothing", *out]) == 2
    assert "known: ['knn'" in capsys.readouterr().err


def test_a_failing_bench_is_said_and_the_others_run(tmp_path, monkeypatch, capsys):
    from bench import __main__ as bench

    def broken():
        raise ImportError("no faiss")

    monkeypatch.setattr(bench, "found_benches", lambda: {"x": broken, "y": lambda: [row("y", 2.0)]})
    assert bench.main(["--out", str(tmp_path / "b.json")]) == 1
    assert "x failed: ImportError: no faiss" in capsys.readouterr().err
    assert [r["bench"] for r in json.loads((tmp_path / "b.json").read_text())] == ["y"]


def test_both_sides_of_the_perplexity_bench_give_the_same_numbers():
    from bench import data, ppl

    talks = [[{"role": "user", "content": f"Say {w}"}, {"role": "assistant", "content": w * i}]
             for i, w in enumerate(["the list ", "an axis ", "values "] * 4, 1)]
    lm = ppl.build_lm("1m", data.texts(talks), dtype="float32")
    ours = ppl.ours(lm, talks)
    for rows_a_call in (1, 5):
        np.testing.assert_allclose(ppl.theirs(lm, talks, rows_a_call), ours, rtol=1e-5)
