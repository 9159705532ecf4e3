"""A judge over HTTP that is slow, busy and unwell by plan: is any reply lost, any paid for twice?

    python -m bench.judge_server --out bench/judge_server.md

The server runs in a process of its own and counts what it delivers. The client is the one of a
study (`selection.served_model`); it is stopped by SIGKILL once and started again. The tests start
the same server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from instructmining_core.selection import judge
from instructmining_core.selection.served_model import ServedModel

FAULTS = (429, 500, 503, "dropped", "nonsense")
WORKERS = 64
WAITING = 0.75  # of a worker's time, for the server; connection, verdict and cache take theirs


class JudgeServer(ThreadingHTTPServer):
    """Prefers the longer answer; to anything else it says what it was asked.

    faults : share of the tries that end in one of `FAULTS`; delay : seconds before any answer
    plan : what it does first, in order: a status, one of `FAULTS`, a reply, or a pair of a reply
        and its finish reason. seen : headers and body of every request, where `record`
    delivered, asked : by hash of the messages, replies that were sent whole, and tries
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self, faults: float = 0.0, delay: float = 0.0, record: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.delay, self.record = faults, delay, record
        self.plan: list = []
        self.seen: list[dict] = []
        self.delivered, self.asked, self.kinds = Counter(), Counter(), Counter()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no fault of ours."""

    def next_step(self, name: str, request: dict) -> object:
        """What to do with this try."""
        with self.lock:
            self.asked[name] += 1
            if self.record:
                self.seen.append(request)
            if self.plan:
                return self.plan.pop(0)
            dice = hashlib.sha256(f"{name} {self.asked[name]}".encode()).digest()
        if int.from_bytes(dice[:4], "big") / 2**32 >= self.faults:
            return 200
        return FAULTS[dice[4] % len(FAULTS)]

    def counts(self) -> dict:
        return {"tries": sum(self.asked.values()), "asked": len(self.asked),
                "delivered": len(self.delivered),
                "twice": sum(count > 1 for count in self.delivered.values()),
                "faults": {str(kind): n for kind, n in sorted(self.kinds.items(), key=str)}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        headers = {name.lower(): value for name, value in self.headers.items()}
        step = self.server.next_step(name, {**body, "path": self.path, "headers": headers})
        time.sleep(self.server.delay)
        if step == "dropped":
            self.close_connection = True
        elif step == "nonsense":
            self._send(200, b"<html>Please wait.</html>", "text/html")
        elif isinstance(step, int) and step != 200:
            self._send(step, b'{"error": {"message": "not now"}}')
        else:
            text, finish = step if isinstance(step, tuple) else (
                step if isinstance(step, str) else answer_to(body["messages"]), "stop")
            message = {"role": "assistant", "content": text}
            choice = {"message": message, "finish_reason": finish}
            self._send(200, json.dumps({"choices": [choice]}).encode())
            with self.server.lock:
                self.server.delivered[name] += 1
            return
        with self.server.lock:
            self.server.kinds[step] += 1

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.server.counts()).encode())

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("retry-after-ms", "20")
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        return


def answer_to(messages: Sequence[dict]) -> str:
    """The verdict for the longer of two answers; else what was asked."""
    text = messages[-1]["content"]
    mark = text.partition(" ")[0]
    if f"{mark} BEGIN FIRST ANSWER\n" not in text:
        return f"You asked: {text}"
    first, second = (
        text.split(f"{mark} BEGIN {name} ANSWER\n")[1].split(f"\n{mark} END {name} ANSWER")[0]
        for name in ("FIRST", "SECOND")
    )
    verdict = "TIE" if len(first) == len(second) else "1" if len(first) > len(second) else "2"
    return f"By length.\n**VERDICT {mark}: {verdict}**"


def ask(url: str, folder: Path, prompts: int) -> dict:
    """Judge made-up pairs of answers; returns how many verdicts are right, and the seconds."""
    served = ServedModel(url, "longer", folder, budget=4 * prompts, workers=WORKERS, timeout=30.0,
                         options={"temperature": 0})  # fmt: skip
    asked = [[{"role": "user", "content": f"Question {i}?"}] for i in range(prompts)]
    long, short = ["a long answer"] * prompts, ["short"] * prompts
    start = time.perf_counter()
    judged = judge.judge_pairs(asked, long, short, judge.api_judge(served))
    return {"requests": 2 * prompts, "right": int(2 * (judged["score"] == 1).sum()),
            "none": int((judged["outcome"] == "none").sum()),
            "seconds": time.perf_counter() - start}  # fmt: skip


def _child(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.judge_server", *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _counts(url: str) -> dict:
    with urllib.request.urlopen(url) as reply:
        return json.load(reply)


def _finished(child: subprocess.Popen) -> dict:
    told, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"the client ended with status {child.returncode}")
    return json.loads(told)


def measured(requests: int, rate: float, faults: float, folder: Path, killed: bool) -> dict:
    """One study's worth of requests against a fresh server, and once more when all are answered.

    killed : stop the client by SIGKILL when a third is delivered, and start it again
    """
    server = _child("--serve", faults, WAITING * WORKERS / rate)
    try:
        url = server.stdout.readline().strip()
        if killed:
            first = _child("--ask", url, folder, requests // 2)
            while _counts(url)["delivered"] < requests / 3:
                time.sleep(0.2)
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
        told = _finished(_child("--ask", url, folder, requests // 2))
        counts = _counts(url)
        again = _finished(_child("--ask", url, folder, requests // 2))
        return {**told, **counts, "again": _counts(url)["tries"] - counts["tries"],
                "right_again": again["right"]}  # fmt: skip
    finally:
        server.kill()
        server.wait()


def page(rows: dict[str, dict]) -> str:
    """The tables of the runs, in Markdown."""
    wanted = {
        "requests": "requests (both orders)", "right": "right verdicts", "none": "no verdict",
        "tries": "tries that reached the server", "twice": "delivered twice",
        "again": "tries of another run, when all are answered", "rate": "requests a second",
    }  # fmt: skip
    lines = ["# The judge's client against a server with faults", "",
             "`python -m bench.judge_server --out bench/judge_server.md`. Of the tries 5 % fail: "
             "429, 500, 503, a dropped connection, or a page that is no reply. A client that is "
             f"killed loses what its {WORKERS} workers have under way.", "",
             "| | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for key, words in wanted.items():
        numbers = (f"{row[key]:,.0f}" if row[key] == row[key] else "" for row in rows.values())
        lines.append(f"| {words} | " + " | ".join(numbers) + " |")
    kinds = sorted({kind for row in rows.values() for kind in row["faults"]})
    for kind in kinds:
        lines.append(f"| faults: {kind} | " + " | ".join(
            f"{row['faults'].get(kind, 0):,}" for row in rows.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Serve, ask, or measure both."""
    parser = argparse.ArgumentParser(prog="python -m bench.judge_server", description=__doc__)
    parser.add_argument("--serve", nargs=2, type=float, metavar=("FAULTS", "DELAY"))
    parser.add_argument("--ask", nargs=3, metavar=("URL", "FOLDER", "PROMPTS"))
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--out", type=Path, help="page to write")
    options = parser.parse_args()
    if options.serve:
        faults, delay = options.serve
        server = JudgeServer(faults, delay)
        print(server.url, flush=True)
        server.serve_forever()
    elif options.ask:
        url, folder, prompts = options.ask
        print(json.dumps(ask(url, Path(folder), int(prompts))))
    else:
        rows = {}
        for name, count, killed in (("whole", options.requests, False),
                                    ("killed and started again", options.requests // 5, True)):
            with tempfile.TemporaryDirectory() as folder:
                row = measured(count, options.rate, 0.05, Path(folder), killed)
            rows[name] = {**row, "rate": count / row["seconds"] if not killed else float("nan")}
        print(page(rows))
        if options.out:
            options.out.write_text(page(rows))


if __name__ == "__main__":
    main()
