"""A model behind a real HTTP server that is slow, busy, unwell, silent or talks nonsense."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest

from bench.judge_server import WORKERS, JudgeServer
from instructmining_core.config import InstructMiningError
from instructmining_core.selection import judge, served_model
from instructmining_core.selection.served_model import KEY, REFUSED, ServedModel

SECRET = "sk-very-secret-0123456789"
LOCAL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(served_model, "WAIT", 0.002)
    monkeypatch.delenv(KEY, raising=False)


def served(url: str, folder, **more) -> ServedModel:
    settings = {"budget": 1000, "workers": 1, "timeout": 10.0, "options": {"temperature": 0}}
    return ServedModel(url, "judge-1", folder, **settings | more)


def talks(count: int, first: int = 0) -> list[list[dict]]:
    return [[{"role": "user", "content": f"Question {i}"}] for i in range(first, first + count)]


def texts(replies) -> list[str]:
    return [reply.text for reply in replies]


def test_every_fault_is_tried_again_and_the_reply_is_the_right_one(tmp_path):
    with JudgeServer() as server:
        server.plan = [429, 500, 503, "dropped", "nonsense", "nonsense", 408]
        model = served(server.url, tmp_path)
        assert texts(model.ask(talks(3), "x")) == [f"You asked: Question {i}" for i in range(3)]
    assert server.counts()["tries"] == 3 + 7 and server.counts()["twice"] == 0


def test_a_server_that_is_too_slow_is_asked_again(tmp_path):
    with JudgeServer(delay=0.4) as server:
        model = served(server.url, tmp_path, timeout=0.1)
        with pytest.raises(InstructMiningError, match="timed out"):
            served_model_tries(model, 2)
        server.delay = 0.0
        assert texts(model.ask(talks(1), "x")) == ["You asked: Question 0"]


def served_model_tries(model: ServedModel, tries: int):
    """Ask one question with so many tries."""
    before, served_model.TRIES = served_model.TRIES, tries
    try:
        return model.ask(talks(1), "x")
    finally:
        served_model.TRIES = before


def test_a_restart_pays_nothing_twice(tmp_path):
    with JudgeServer() as server:
        first = served(server.url, tmp_path).ask(talks(20), "x")
        again = served(server.url, tmp_path).ask(talks(20), "x")
        more = served(server.url, tmp_path).ask(talks(25), "x")
        assert first == again == more[:20]
        assert server.counts()["tries"] == 25
        served(server.url, tmp_path, options={"temperature": 1}).ask(talks(1), "x")
        assert server.counts()["tries"] == 26  # another question: asked of another setting


def test_the_same_conversation_is_asked_once(tmp_path):
    with JudgeServer() as server:
        replies = served(server.url, tmp_path, workers=4).ask(talks(3) * 5, "x")
    assert replies[:3] * 5 == replies and server.counts()["tries"] == 3


def test_what_came_is_kept_when_others_fail(tmp_path):
    """Nine tries fail for one question of five: four replies are paid, and stay."""
    with JudgeServer() as server:
        server.plan = [200, 200, *[500] * served_model.TRIES]
        model = served(server.url, tmp_path)
        with pytest.raises(InstructMiningError, match="1 of 5 requests .* HTTP 500"):
            model.ask(talks(5), "x")
        assert server.counts()["delivered"] == 4
        model.ask(talks(5), "x")
        assert server.counts()["delivered"] == 5 and server.counts()["twice"] == 0


def test_the_budget_counts_every_try_and_every_process(tmp_path):
    with JudgeServer() as server:
        server.plan = [500, 500]
        served(server.url, tmp_path, budget=6).ask(talks(4), "x")  # 6 calls
        with pytest.raises(InstructMiningError, match="1 requests .* of 6 calls 6 are spent"):
            served(server.url, tmp_path, budget=6).ask(talks(5), "x")
        assert server.counts()["tries"] == 6
        served(server.url, tmp_path, budget=6).ask(talks(4), "x")  # all are kept: costs nothing
        server.plan = [500] * 9
        with pytest.raises(InstructMiningError, match="the budget of 8 calls is spent"):
            served(server.url, tmp_path, budget=8).ask(talks(5), "x")
        assert server.counts()["tries"] == 8
        served(server.url, tmp_path, budget=30).ask(talks(5), "x")


def test_one_unfit_request_is_refused_and_many_are_an_error(tmp_path):
    with JudgeServer() as server:
        server.plan = [200, 400]
        replies = served(server.url, tmp_path).ask(talks(3), "x")
        assert [reply.finish for reply in replies] == ["stop", REFUSED, "stop"]
        server.plan = [400] * 40
        with pytest.raises(InstructMiningError, match="HTTP 400, .*not now"):
            served(server.url, tmp_path).ask(talks(40, first=100), "x")
        assert len(server.plan) >= 28  # given up after ten
        with pytest.raises(InstructMiningError, match="HTTP 400"):
            served(server.url, tmp_path / "other").ask(talks(1), "x")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_can_mend_stops_at_once(status, tmp_path):
    with JudgeServer() as server:
        server.plan = [status] * 5
        with pytest.raises(InstructMiningError, match=f"HTTP {status}"):
            served(server.url, tmp_path).ask(talks(50), "x")
        assert server.counts()["tries"] <= 2  # one may have begun already


def test_no_redirect_is_followed(tmp_path):
    with JudgeServer() as server:
        server.plan = [307]
        with pytest.raises(InstructMiningError, match="sends on to another address"):
            served(server.url, tmp_path).ask(talks(2), "x")


def test_a_server_that_is_not_there_is_named(tmp_path):
    with JudgeServer() as server:
        url = server.url
    with pytest.raises(InstructMiningError, match=f"judge-1 at {url}.*refused"):
        served_model_tries(served(url, tmp_path), 2)


@pytest.mark.parametrize(("url", "words"), [
    ("http://judge.example.org/v1", "in clear"), ("http://192.168.0.7:8000/v1", "in clear"),
    ("https://user:sk-1@host/v1", "plain address"), ("https://host/v1?key=sk-1", "plain address"),
    ("ftp://host/v1", "http"), ("judge", "http"), ("", "http"),
    ("http://localhost.evil/v1", "clear"),
])  # fmt: skip
def test_unsafe_addresses_are_refused(url, words, tmp_path):
    with pytest.raises(InstructMiningError, match=words) as error:
        served(url, tmp_path)
    assert "sk-1" not in str(error.value)


@pytest.mark.parametrize("url", [LOCAL, "http://localhost:1/v1", "http://[::1]:1/v1",
                                 "https://api.example.org/v1"])  # fmt: skip
def test_safe_addresses_are_taken(url, tmp_path):
    assert served(url, tmp_path).base_url == url


def test_the_key_is_sent_and_stands_nowhere(tmp_path, monkeypatch, caplog, capfd):
    """Not in an error, though the server says it back; not in a file, a log or on the screen."""
    monkeypatch.setenv(KEY, SECRET)
    caplog.set_level(logging.DEBUG)
    with JudgeServer(record=True) as server:
        server.plan = [f"Your key is {SECRET}.", 200]
        model = served(server.url, tmp_path)
        assert texts(model.ask(talks(2), "x"))[0] == "Your key is [key]."
        monkeypatch.setattr(server, "next_step", lambda *_: 401)
        monkeypatch.setattr("bench.judge_server._Handler._send", _refuses)
        with pytest.raises(InstructMiningError, match=r"Incorrect API key: \[key\]") as error:
            model.ask(talks(3), "x")
    assert server.seen[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    shown = f"{error.value!r} {error.getrepr(style='long', chain=True)} {caplog.text}"
    shown += "".join(capfd.readouterr())
    assert SECRET not in shown
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) > 1000 and SECRET.encode() not in written
    assert SECRET not in f"{model!r}"


def _refuses(handler, status, content, kind="application/json"):
    text = json.dumps({"error": {"message": f"Incorrect API key: {SECRET}"}}).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


def test_no_other_variable_is_taken_for_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with JudgeServer(record=True) as server:
        served(server.url, tmp_path).ask(talks(1), "x")
    assert SECRET not in json.dumps(server.seen)


def test_a_key_that_is_none_is_told_without_showing_it(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, f"{SECRET}\nX-Other: 1")
    with pytest.raises(InstructMiningError, match=KEY) as error:
        served(LOCAL, tmp_path)
    assert SECRET not in str(error.value)


def test_a_proxy_of_the_environment_does_not_see_what_stays_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with JudgeServer() as server:
        assert texts(served(server.url, tmp_path).ask(talks(1), "x")) == ["You asked: Question 0"]


def test_two_processes_do_not_ask_the_same(tmp_path):
    from filelock import FileLock

    with JudgeServer() as server, FileLock(tmp_path / "asking.lock"):
        with pytest.raises(InstructMiningError, match="another process"):
            served(server.url, tmp_path).ask(talks(1), "x")


def test_nothing_is_lost_and_nothing_paid_twice_under_faults(tmp_path):
    """The bench's 20,000 requests at 200 a second, small: every verdict is there and right."""
    with JudgeServer(faults=0.05, delay=0.005) as server:
        model = served(server.url, tmp_path, workers=16)
        prompts = [[{"role": "user", "content": str(i)}] for i in range(200)]
        table = judge.judge_pairs(prompts, ["a long one"] * 200, ["short"] * 200,
                                  judge.api_judge(model))  # fmt: skip
        counts = server.counts()
    assert (table["score"] == 1).all() and table["consistent"].all()
    assert counts["asked"] == counts["delivered"] == 400 and counts["twice"] == 0
    assert counts["tries"] == 400 + sum(counts["faults"].values()) and counts["tries"] > 405


def test_a_killed_client_loses_what_was_under_way_and_no_more(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bench.judge_server import ask;"
        "ask(sys.argv[1], Path(sys.argv[2]), 200)"
    )
    with JudgeServer(delay=0.05) as server:
        child = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)],
                                 stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 60
        while server.counts()["delivered"] < 100 and time.monotonic() < until:
            time.sleep(0.02)
        child.kill()
        child.wait()
        before = server.counts()["delivered"]
        assert 100 <= before < 400
        model = ServedModel(server.url, "longer", tmp_path, budget=2000, workers=32, timeout=30.0,
                            options={"temperature": 0})  # fmt: skip
        prompts = [[{"role": "user", "content": f"Question {i}?"}] for i in range(200)]
        judged = judge.judge_pairs(prompts, ["a long answer"] * 200, ["short"] * 200,
                                   judge.api_judge(model))  # fmt: skip
        counts = server.counts()
    assert (judged["score"] == 1).all()
    assert counts["twice"] <= WORKERS  # the workers of the one that was killed
