"""`instructmining references`: answers of a teacher at a real local server."""

from __future__ import annotations

import json

import pytest

from bench.judge_server import JudgeServer
from instructmining.cli import main
from instructmining_core.data.records import read_records
from instructmining_core.selection import served_model

PROMPTS = [{"prompt_id": 81, "category": "writing", "turns": ["Write a line.", "Another."]},
           {"id": "b", "instruction": "Add.", "input": "1 and 2", "output": "an old answer"},
           {"id": "c", "prompt": "Name a sea."}]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(served_model, "WAIT", 0.002)
    monkeypatch.delenv(served_model.KEY, raising=False)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    return tmp_path


def run(url: str, *more: str) -> int:
    return main(["references", "p.jsonl", "-o", "out.jsonl", "--base-url", url, "--model", "t",
                 "--workers", "1", *more])  # fmt: skip


def test_answers_are_written_in_order_and_can_be_read_as_an_evaluation_set(home, capsys):
    with JudgeServer(record=True) as server:
        assert run(server.url, "--max-tokens", "64") == 0
    table, problems = read_records("out.jsonl")
    assert not problems and table["id"].tolist()[1:] == ["b", "c"]
    answers = [messages[-1]["content"] for messages in table["messages"]]
    assert answers == ["You asked: Write a line.", "You asked: Add.\n\n1 and 2",
                       "You asked: Name a sea."]
    assert "an old answer" not in json.dumps(server.seen)
    assert {one["max_tokens"] for one in server.seen} == {64}
    assert "3 answers of t\n" in capsys.readouterr().out


def test_it_goes_on_where_it_ended_and_overwrites_nothing(home, capsys):
    with JudgeServer() as server:
        server.plan = [200, 401]
        assert run(server.url) == 1
        assert not (home / "out.jsonl").exists()
        assert run(server.url) == 0
        assert server.counts()["delivered"] == 3 and server.counts()["twice"] == 0
        written = (home / "out.jsonl").read_bytes()
        assert run(server.url) == 1 and (home / "out.jsonl").read_bytes() == written
    errors = capsys.readouterr().err
    assert "HTTP 401" in errors and "out.jsonl is there; name another file" in errors


def test_answers_that_were_cut_or_refused_are_left_out_and_counted(home, capsys):
    with JudgeServer() as server:
        server.plan = [("The sea is", "length"), ("", "content_filter"), 200]
        assert run(server.url) == 0
    assert len((home / "out.jsonl").read_text().splitlines()) == 1
    told = capsys.readouterr().out
    assert "left out, cut: 1" in told and "left out, refused: 1" in told
