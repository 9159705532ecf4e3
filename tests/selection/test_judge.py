"""The judge: both orders, counts with intervals, and a client against a real local server."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import openai
import pandas as pd
import pytest
from scipy import stats

from instructmining_core.config import InstructMiningError
from instructmining_core.selection import judge
from instructmining_core.selection.judge import parse_verdict

PROMPT = [{"role": "user", "content": "What does sorted do?"}]


def shouts_longer(prompt, first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def judged(scores: np.ndarray) -> pd.DataFrame:
    """scores : (pairs, prompts) in {0, ½, 1}."""
    outcome = {0.0: "lose", 0.5: "tie", 1.0: "win"}
    return pd.DataFrame([
        {"pair": f"m{i}", "prompt_id": j, "score": s, "outcome": outcome[s], "consistent": True}
        for i, row in enumerate(scores) for j, s in enumerate(row)
    ])


def test_both_orders_and_outcomes():
    table = judge.judge_pairs([PROMPT] * 3, ["long one", "s", "same"], ["x", "longer", "tied"],
                              shouts_longer)
    assert table["outcome"].tolist() == ["win", "lose", "tie"]
    assert table["score"].tolist() == [1, 0, 0.5]
    assert table["consistent"].all()


def test_a_judge_that_favours_the_first_position_ends_in_ties():
    table = judge.judge_pairs([PROMPT] * 4, ["a"] * 4, ["b"] * 4, lambda *_: 1.0)
    assert table["score"].tolist() == [0.5] * 4
    assert not table["consistent"].any()
    line = judge.win_tie_lose(table).iloc[0]
    assert (line["tie"], line["net"], line["inconsistent"]) == (4, 0, 1)


def test_a_tie_in_one_order_is_half_a_win():
    answers = {("a", "b"): 1.0, ("b", "a"): 0.5}
    table = judge.judge_pairs([PROMPT], ["a"], ["b"], lambda _, x, y: answers[x, y])
    assert (table.loc[0, "score"], table.loc[0, "outcome"]) == (0.75, "win")
    assert not table.loc[0, "consistent"]


def test_no_verdict_is_counted_apart():
    def mute(prompt, first, second):
        return math.nan if "?" in (first, second) else 1.0 * (first < second)

    table = judge.judge_pairs([PROMPT] * 3, ["a", "?", "c"], ["b", "b", "b"], mute)
    line = judge.win_tie_lose(table).iloc[0]
    assert line[["win", "tie", "lose", "none"]].tolist() == [1, 0, 1, 1]
    assert line["net"] == 0


def test_judge_refuses_nonsense():
    with pytest.raises(InstructMiningError, match="must be equal"):
        judge.judge_pairs([PROMPT], ["a"], [], shouts_longer)
    with pytest.raises(InstructMiningError, match=r"in \[0, 1\]"):
        judge.judge_pairs([PROMPT], ["a"], ["b"], lambda *_: 2)
    with pytest.raises(InstructMiningError, match="two judged prompts"):
        judge.net_win(judge.judge_pairs([PROMPT], ["a"], ["b"], shouts_longer))


def test_the_papers_count_cannot_be_told_from_a_tie():
    found = judge.net_win_of_counts(win=34, tie=19, lose=27)
    assert round(found.net, 2) == 0.09
    assert (round(found.low, 2), round(found.high, 2)) == (-0.11, 0.28)
    assert round(found.p, 2) == 0.44


def test_counts_and_frames_agree():
    scores = np.repeat([1.0, 0.5, 0.0], [34, 19, 27])
    frame = judged(scores[None])
    by_count, by_frame = judge.net_win_of_counts(34, 19, 27), judge.net_win(frame)
    for name in ("net", "low", "high", "p", "scope"):
        assert getattr(by_frame, name) == getattr(by_count, name)
    line = judge.win_tie_lose(frame).iloc[0]
    assert line[["win", "tie", "lose"]].tolist() == [34, 19, 27]


def test_two_pairs_speak_of_these_models_three_of_the_method():
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 0.5, 1.0], (3, 40))
    assert judge.net_win(judged(scores[:2])).scope == "these models"
    assert judge.net_win(judged(scores)).scope == "the method"


def test_two_way_interval_feels_pairs_that_disagree():
    rng = np.random.default_rng(1)
    even = (rng.uniform(size=(4, 200)) < 0.6).astype(float)
    chance = np.array([[0.95], [0.95], [0.25], [0.25]])
    torn = (rng.uniform(size=(4, 200)) < chance).astype(float)
    calm, wide = judge.net_win(judged(even)), judge.net_win(judged(torn))
    assert calm.net == pytest.approx(2 * even.mean() - 1)
    assert wide.high - wide.low > 5 * (calm.high - calm.low)
    assert calm.low > 0 and wide.low < 0 < wide.high


def test_two_way_covers_in_simulation():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        values = 0.1 + rng.normal(0, 0.2, (5, 1)) + rng.normal(0, 0.5, 60) + rng.normal(
            0, 0.5, (5, 60))
        net, se, df = judge._two_way(values)
        hits += abs(net - 0.1) < stats.t.isf(0.025, df) * se
    assert 0.92 <= hits / 400 <= 0.99


def test_reward_judge_asks_once_per_answer_and_ignores_order():
    asked = []

    def score(messages):
        asked.append(messages[-1]["content"])
        return {"good": 1.0, "as good": 1.0, "bad": -1.0, "odd": math.nan}[asked[-1]]

    ask = judge.reward_judge(score)
    assert (ask(PROMPT, "good", "bad"), ask(PROMPT, "bad", "good")) == (1, 0)
    assert ask(PROMPT, "good", "as good") == 0.5
    assert math.isnan(ask(PROMPT, "good", "odd"))
    assert sorted(asked) == ["as good", "bad", "good", "odd"]


class Server(BaseHTTPRequestHandler):
    """Prefers the longer answer; `plan` holds what it does first: a status or a reply."""

    plan: list[int | str] = []
    seen: list[dict] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, **body})
        next_one = self.plan.pop(0) if self.plan else 200
        text = body["messages"][1]["content"]
        first, second = text.split("## First answer\n\n")[1].split("\n\n## Second answer\n\n")
        number = 1 if len(first) > len(second) else 2
        reply = f"Longer. **VERDICT: {number}**"
        status = next_one if isinstance(next_one, int) else 200
        answer = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        sent = json.dumps(answer if status == 200 else {"error": "no"})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write((next_one if isinstance(next_one, str) else sent).encode())

    def log_message(self, *_) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    Server.plan, Server.seen = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()
    thread.join()


def reply_of(content: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def test_api_judge_asks_in_both_orders(server):
    ask = judge.api_judge(openai.OpenAI(base_url=server, api_key="not-a-secret"), "judge-1")
    Server.plan = [429, 200, 200]  # a busy server is asked again by the client
    table = judge.judge_pairs([PROMPT], ["a long answer"], ["short"], ask)
    assert (table.loc[0, "score"], bool(table.loc[0, "consistent"])) == (1.0, True)
    assert len(Server.seen) == 3
    assert {s["path"] for s in Server.seen} == {"/v1/chat/completions"}
    assert {(s["model"], s["temperature"]) for s in Server.seen} == {("judge-1", 0)}


def test_replies_without_a_verdict_are_counted_and_never_guessed(server):
    Server.plan = [reply_of("Both are fine."), reply_of("VERDICT: 12"), 200, 200]
    ask = judge.api_judge(openai.OpenAI(base_url=server, api_key="k"), "m")
    table = judge.judge_pairs([PROMPT] * 2, ["longer"] * 2, ["x"] * 2, ask)
    assert table["outcome"].tolist() == ["none", "win"]
    assert table.loc[0, ["a_first", "a_second", "score"]].isna().all()


@pytest.mark.parametrize(("reply", "preference"), [
    ("VERDICT: 1", 1.0), ("verdict: 2", 0.0), ("**VERDICT: TIE**", 0.5),
    ("VERDICT: 1 at first sight.\nVERDICT: 2", 0.0), ("VERDICT: `1`", 1.0),
    ("", math.nan), ("The first is better.", math.nan), ("VERDICT: 12", math.nan),
])
def test_verdicts_are_read(reply, preference):
    assert parse_verdict(reply) == pytest.approx(preference, nan_ok=True)
