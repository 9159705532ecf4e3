"""A judge behind an OpenAI-compatible HTTP interface: GPT-4 as in the paper, or a local server.

The paper's prompt to its judge is unknown; this one is ours. The key is read from the environment
at the moment of asking and kept nowhere.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .judge import JudgeError, Messages

INSTRUCTION = (
    "You compare two answers to the same request. Judge how correct, relevant and helpful each is. "
    "Length and the order of the answers do not matter. Explain in at most two sentences, then end "
    "with one line: `VERDICT: 1` if the first answer is better, `VERDICT: 2` if the second is, "
    "`VERDICT: TIE` if neither is."
)
_VERDICT = re.compile(r"VERDICT:\W*(1|2|TIE)\b", re.IGNORECASE)
_PREFERENCE = {"1": 1.0, "2": 0.0, "TIE": 0.5}
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ApiJudge:
    """Asks `POST {base_url}/chat/completions` which of two answers is better, at temperature 0.

    base_url : such as "https://api.openai.com/v1" or "http://localhost:8000/v1"; model : as the
    server names it; key_variable : name of the environment variable with the key, "" where the
    server wants none; timeout : seconds an attempt; attempts : tries at a busy server (429, 5xx);
    wait : seconds before the second try, doubled at each further one.

    Calling it asks in the order given; `judge_pairs` asks in both.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 4
    wait: float = 2.0

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise JudgeError(f"base_url must start with http:// or https://, got {self.base_url!r}")
        if url.scheme == "http" and self.key_variable and url.hostname not in _LOCAL:
            raise JudgeError(
                f"{self.base_url} would carry the key in clear text: use https, or "
                'key_variable="" for a server without a key'
            )

    def __call__(self, prompt: Messages, first: str, second: str) -> float:
        """1 if the first answer is preferred, 0 if the second, ½ a tie, NaN without a verdict."""
        return parse_verdict(self.ask(comparison(prompt, first, second)))

    def ask(self, messages: Messages) -> str:
        """The model's reply to one conversation; raises JudgeError with the server's reason."""
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0})
        headers = {"Content-Type": "application/json"} | self._authorisation()
        for attempt in range(self.attempts):
            status, text = self._post(body.encode(), headers)
            busy = status == 429 or status >= 500
            if not busy or attempt + 1 == self.attempts:
                break
            time.sleep(self.wait * 2**attempt)
        if status != 200:
            raise JudgeError(f"{self.base_url} answered {status}: {text[:300]}")
        try:
            return json.loads(text)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{self.base_url} sent no chat completion: {text[:300]}") from error

    def _authorisation(self) -> dict[str, str]:
        if not self.key_variable:
            return {}
        key = os.environ.get(self.key_variable)
        if not key:
            raise JudgeError(f"the judge needs a key: set the variable {self.key_variable}")
        return {"Authorization": f"Bearer {key}"}

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        url = urlsplit(self.base_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        # http.client follows no redirect, so the key reaches no other host than the one named.
        connection = kind(url.hostname, url.port, timeout=self.timeout)
        try:
            connection.request("POST", url.path.rstrip("/") + "/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            return 599, f"no connection ({type(error).__name__}: {error})"
        finally:
            connection.close()


def comparison(prompt: Sequence[dict[str, str]], first: str, second: str) -> Messages:
    """The conversation that asks for a comparison of two answers to `prompt`."""
    request = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in prompt)
    parts = [("Request", request), ("First answer", first), ("Second answer", second)]
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in parts)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def parse_verdict(reply: str) -> float:
    """The last verdict line of a reply as a preference for the first answer; NaN if it has none.

    >>> parse_verdict("Both are right, the first is clearer. VERDICT: 1")
    1.0
    """
    found = _VERDICT.findall(reply)
    return _PREFERENCE[found[-1].upper()] if found else math.nan
