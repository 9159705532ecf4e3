"""What `score`, `select`, `explain` and `fit` say of files as people have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructmining.cli import main
from instructmining.cli.rule import preflight
from instructmining_core.config import InstructMiningError
from instructmining_core.data.records import read_records
from instructmining_core.indicators.score_table import read_scores

from .test_cli import RULE


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))
    (tmp_path / "rule.json").write_text(json.dumps(RULE))
    return tmp_path


def score(name, *more):
    return main(["score", name, "-o", "s.parquet", "--indicators", "len_out,compression,script",
                 "--quiet", *more])  # fmt: skip


def select(out, *more):
    return main(["select", "s.parquet", "--rule", "rule.json", "--top", "9", "-o", out, *more])


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_columns_are_named_once_and_serve_select_and_the_rows_that_it_writes(home, capsys):
    (home / "d.csv").write_text("titel,text\nWhat is a?,It is b.\nWhat is c?,It is d or e.\n")
    assert score("d.csv") == 1
    assert "--columns question=A,answer=B" in capsys.readouterr().err
    assert not (home / "s.parquet").exists()
    assert score("d.csv", "--columns", "question=titel,answer=text") == 0
    assert read_scores("s.parquet").attrs["read"]["columns"] == {
        "question": "titel", "answer": "text"}  # fmt: skip
    assert select("best.csv") == 0
    assert pd.read_csv("best.csv")["text"].tolist() == ["It is d or e.", "It is b."]
    assert score("d.csv", "--columns", "frage=titel") == 1
    assert "--columns 'frage=titel': write OURS=YOURS" in capsys.readouterr().err


def test_an_encoding_is_named_once_and_serves_select(home, capsys):
    text = "prompt,completion\nWhat is a café?,It is a place.\nDéjà vu?,So it is again.\n"
    (home / "d.csv").write_bytes(text.encode("cp1252"))
    assert score("d.csv") == 1
    assert "--encoding cp1252" in capsys.readouterr().err
    assert score("d.csv", "--encoding", "cp1252") == 0
    assert select("best.csv") == 0
    assert set(pd.read_csv("best.csv")["prompt"]) == {"Déjà vu?", "What is a café?"}


def test_rejected_answers_have_no_value_and_are_never_selected(home, capsys):
    (home / "d.jsonl").write_text(lines(
        {"prompt": "Why?", "completion": "A bad answer that is long.", "label": False},
        {"prompt": "Why?", "completion": "A good one.", "label": True},
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Ho ho", "weight": 0},
                      {"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": "So."}]},
    ))  # fmt: skip
    assert score("d.jsonl") == 0
    said = capsys.readouterr().err
    assert "1 rows: answers that 'label' takes out of training are context, not scored" in said
    assert "1 rows: answers that 'weight' takes out" in said
    table = read_scores("s.parquet")
    assert table["len_out"].isna().tolist() == [True, False, False]
    assert table["len_out"].tolist()[1:] == [4, 2]
    assert "takes its answer out of training" in table["reasons"][0]
    assert select("best.jsonl") == 0
    kept = [json.loads(line) for line in (home / "best.jsonl").read_text().splitlines()]
    assert len(kept) == 2 and not any(row.get("label") is False for row in kept)


def test_a_file_of_which_no_row_can_be_read_is_told_once(home, capsys):
    (home / "d.jsonl").write_text(lines(*({"title": f"row {i}"} for i in range(50))))
    assert score("d.jsonl") == 1
    said = capsys.readouterr().err
    assert "none of the 50 records can be read" in said and "(and 49 more like it)" in said
    assert said.count("d.jsonl") == 1 and not (home / "s.parquet").exists()


def test_what_is_not_read_and_what_to_mind_is_told_at_the_end(home, capsys):
    (home / "d.jsonl").write_text(lines(
        {"question": "Red?", "answer": "Yes, it is.", "image": "1.jpg"},
        {"question": "Red?", "answer": "<p>No</p> it is not.", "image": "2.jpg"},
        {"question": "Why?", "answer": "Just so.<|endoftext|>"},
        {"question": "什么?", "answer": "今天天气很好"},
    ))  # fmt: skip
    assert score("d.jsonl") == 0
    said = capsys.readouterr().err
    for note in ("2 rows: 'image' is not read", "1 rows: hold HTML", "1 rows: spell marks",
                 "1 rows: are mostly not in Latin script"):  # fmt: skip
        assert note in said
    assert read_scores("s.parquet")["row_hash"].nunique() == 4


def test_a_pipe_is_read_once_and_known_by_its_bytes(home):
    rows = lines({"prompt": "a", "completion": "b c"}, {"prompt": "d", "completion": "e"})
    os.mkfifo("pipe")
    writer = subprocess.Popen([sys.executable, "-c", f"open('pipe', 'w').write({rows!r})"])
    assert score("pipe") == 0 and writer.wait() == 0
    assert read_scores("s.parquet")["len_out"].tolist() == [2, 1]


def test_select_overwrites_nothing_that_it_reads(home, capsys):
    (home / "d.jsonl").write_text(lines({"prompt": "a", "completion": "b c"}))
    assert score("d.jsonl") == 0
    before = (home / "d.jsonl").read_bytes()
    assert select("d.jsonl") == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert (home / "d.jsonl").read_bytes() == before


def test_parquet_keeps_its_types_and_metadata(home):
    features = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    table = pa.table({
        "prompt": pa.array(["a", "b", "c"]).dictionary_encode(),
        "completion": ["d", "e f", "g h i"],
        "label": pa.array([0, 1, 0], pa.int8()),
        "when": pa.array([1, 2, 3], pa.timestamp("us", "UTC")),
        "image": pa.array([{"bytes": b"\x89PNG", "path": None}] * 3),
    }).replace_schema_metadata({"huggingface": json.dumps(features)})  # fmt: skip
    pq.write_table(table, "d.parquet")
    assert score("d.parquet") == 0 and select("best.parquet") == 0
    best = pq.read_table("best.parquet")
    assert best.drop(["score"]).equals(table.take([2, 1, 0]))
    kept = json.loads(best.schema.metadata[b"huggingface"])["info"]["features"]
    assert kept["label"]["_type"] == "ClassLabel" and kept["score"]["dtype"] == "float64"
    assert select("best.jsonl") == 0
    hashes = read_scores("s.parquet")["row_hash"].tolist()
    assert read_records("best.jsonl")[0]["row_hash"].tolist() == hashes[::-1]


def test_explain_says_that_an_id_is_not_unique(home, capsys):
    (home / "d.jsonl").write_text(lines(
        {"id": 1, "prompt": "a", "completion": "b"}, {"id": "1", "prompt": "c", "completion": "d"},
        {"id": 17.0, "prompt": "e", "completion": "f"},
    ))  # fmt: skip
    assert score("d.jsonl") == 0
    assert read_scores("s.parquet")["id"].tolist() == ["1", "1", "17"]
    capsys.readouterr()
    assert main(["explain", "1", "--scores", "s.parquet", "--rule", "rule.json"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 rows have the id '1'") and "row 0" in said and "row 1" in said


RUNS = pd.DataFrame({
    "set_id": ["s0", "s1", "s2", "s3"], "share_a": [1.0, 0.5, 0.5, 1.0],
    "share_b": [0.0, 0.5, 0.5, 0.0], "len_out": [3.0, 4.0, 5.0, 4.5],
    "log_loss": [0.1, 0.2, 0.3, 0.4],
})  # fmt: skip
POOL = pd.DataFrame({"len_out": [1.0, 9.0]})


@pytest.mark.parametrize(
    ("change", "used", "says"),
    [
        ({"log_loss": [0.1, np.nan, 0.3, 0.4]}, 3, "run s1 is left out: its log_loss is nan"),
        ({"log_loss": ["0.1", "0,2", "0.3", "0.4"]}, 3, "its log_loss is 0,2"),
        ({"share_a": [1, 0.499, 0.5, 1]}, 4, "the shares are rounded"),
        ({"share_a": [100.0, 50, 50, 100], "share_b": [0.0, 50, 50, 0]}, 4, "are per cent"),
        ({"share_a": [1.0, 1, 0.5, 1], "share_b": [0.0, 0, 0.5, 0]}, 4, "only one run holds"),
        ({"set_id": ["s0", "s0", "s2", "s3"]}, 4, "1 runs repeat a set_id"),
        ({"len_out": [3.0, 4.0, 5.0, 450.0]}, 4, "lies outside the pool's rows (1 to 9)"),
        ({"share_a": [1.0] * 4, "share_b": [0.0] * 4}, 4, "all runs are of one source"),
    ],
)
def test_fit_tells_which_runs_it_reads_and_why_not(change, used, says):
    runs, notes = preflight(RUNS.assign(**change), POOL, ["len_out"])
    assert len(runs) == used and f"4 runs read, {used} used" in notes
    assert any(says in note for note in notes)
    assert runs[["share_a", "share_b"]].sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-12)


def test_fit_refuses_shares_that_are_no_parts():
    with pytest.raises(InstructMiningError, match="run s0 sum to 1.5"):
        preflight(RUNS.assign(share_b=[0.5, 0, 0, 0]), POOL, ["len_out"])


def test_fit_reads_a_table_of_runs_as_any_file(home, capsys):
    (home / "d.jsonl").write_text(lines(*({"prompt": "a", "completion": "b " * i}
                                          for i in range(1, 40))))  # fmt: skip
    assert score("d.jsonl") == 0
    noise = np.random.default_rng(0).normal(size=(3, 20))
    runs = pd.DataFrame({"set_id": np.arange(20), "share_a": 1.0, " len_out ": 20 + noise[0]})
    runs["log_loss"] = 1 - 0.1 * noise[0] + 0.01 * noise[1]
    runs = runs.round(6)  # what JSON of pandas holds
    runs.loc[3, "log_loss"] = None
    cards = []
    for name, content in {
        "runs.csv": runs.to_csv(index=False, sep=";").encode(),
        "runs.jsonl": runs.to_json(orient="records", lines=True).encode(),
        "runs.tsv": runs.to_csv(index=False, sep="\t").encode("utf-16"),
    }.items():
        (home / name).write_bytes(content)
        assert main(["fit", name, "--scores", "s.parquet", "-o", "mine.json",
                     "--permutations", "9"]) == 0  # fmt: skip
        cards.append(json.loads((home / "mine.json").read_text())["coefficients"])
        said = capsys.readouterr().err
        for note in ("20 runs read, 19 used", "run 3 is left out: its log_loss is nan",
                     "all runs are of one source", "no column compression, len_in"):  # fmt: skip
            assert note in said
    assert cards[0] == cards[1] == cards[2] and cards[0][0]["name"] == "len_out"
    assert main(["fit", "d.jsonl", "--scores", "s.parquet", "-o", "mine.json"]) == 1
    assert "its columns are prompt, completion" in capsys.readouterr().err


def test_an_input_is_not_overwritten_through_a_folder_that_is_not_there(home, capsys):
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), "d.parquet")
    before = (home / "d.parquet").read_bytes()
    assert main(["score", "d.parquet", "-o", "new/../d.parquet", "--quiet"]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert (home / "d.parquet").read_bytes() == before
