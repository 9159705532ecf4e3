"""A chat model at an OpenAI-compatible server: many requests at once, a budget, nothing paid twice.

Hosted servers, vLLM, Ollama and llama.cpp speak it. A reply is kept in an SQLite file as soon as it
is there, under the hash of what was asked, so that a restart asks only for what is missing. The key
is read from the environment variable `KEY` alone: not from OPENAI_API_KEY, which a profile that
somebody else wrote could otherwise send to its own server.
"""

from __future__ import annotations

import ipaddress
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..config import InstructMiningError
from ..data.fields import Messages
from ..data.records import row_hash
from ..data.tokenization import clean_text
from ..indicators.bank import ScoreCache

KEY = "INSTRUCTMINING_API_KEY"
TRIES = 9  # of one request; the waits between them add up to more than a minute
WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds after the first failed try, doubled after each; at most
IN_A_ROW = 10  # failed requests without a reply between them: what is wrong is not one request
BUSY = frozenset({408, 409, 425, 429})  # tried again, as is 500 and above
UNFIT = frozenset({400, 413, 422})  # what the server says of one request, such as one too long
REFUSED = "refused"
_COUNT = "calls"  # the row of the cache that counts what was sent


@dataclass(frozen=True)
class Reply:
    """text : of the answer, "" where there is none; finish : why it ended, in the server's word
    ("stop", "length", ...), or `REFUSED` for a request that the server does not take."""

    text: str
    finish: str


@dataclass(frozen=True)
class _Failure:
    """why : in words, without the key; kind : `REFUSED`, "lost" (every try failed) or "fatal" (no
    other request would fare better)."""

    why: str
    kind: str


_Outcomes = list[tuple[str, Reply | _Failure]]  # by the hash of what was asked


class ServedModel:
    """One model at one server.

    base_url : up to and without "/chat/completions"; https, or http on this machine
    model : as the server names it; folder : of the kept replies
    budget : requests that may be sent in all, failed tries and those of earlier processes counted
    workers : requests under way at once; timeout : seconds for one
    options : further fields of a request, such as temperature; they are part of what is asked

    Raises InstructMiningError for an address that could give the key or the texts away.
    """

    def __init__(
        self, base_url: str, model: str, folder: Path, *, budget: int, workers: int,
        timeout: float, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        local = _checked(base_url)
        try:
            import openai
        except ImportError:
            raise InstructMiningError(
                "a model at a server needs the openai client: pip install 'instructmining[judge]'"
            ) from None
        self.model, self.base_url, self.folder = model, base_url, folder
        self.budget, self.workers, self.options = budget, workers, dict(options)
        self._key = {"indicator": "reply", "server": base_url, "model": model, **self.options}
        self._secret, self._openai = _secret(), openai
        # No redirect is followed, and what goes to this machine takes no proxy on the way.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._secret or "none", max_retries=0, timeout=timeout,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not local),
        )  # fmt: skip
        self._calls, self._counting = 0, threading.Lock()

    def ask(self, conversations: Sequence[Messages], what: str) -> list[Reply]:
        """The reply to each conversation, in their order; what stands there twice is asked once.

        what : for the progress bar. Raises InstructMiningError where the budget does not reach, or
        where requests failed to the end; all replies that came are kept then.
        """
        hashes = [row_hash(messages) for messages in conversations]
        wanted = dict(zip(hashes, conversations, strict=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "asking.lock", timeout=0):
                replies = self._replies(wanted, what)
        except Timeout:
            raise InstructMiningError(
                f"another process is asking with the replies in {self.folder}; wait for its end"
            ) from None
        return [replies[one] for one in hashes]

    def _replies(self, wanted: dict[str, Messages], what: str) -> dict[str, Reply]:
        cache = ScoreCache(self.folder)
        known = cache.get(self._key, [*wanted, _COUNT])
        self._calls = int(known.pop(_COUNT, ((0.0,), ()))[0][0])
        replies = {name: Reply(*said) for name, (_, said) in known.items()}
        missing = {name: wanted[name] for name in wanted if name not in replies}
        if len(missing) > self.budget - self._calls:
            raise InstructMiningError(
                f"{len(missing)} requests to {self.model} are not answered yet, and of the budget "
                f"of {self.budget} calls {self._calls} are spent: raise the budget, or ask less")
        failures: dict[str, _Failure] = {}
        bar = tqdm(total=len(wanted), initial=len(replies), desc=what, unit="reply",
                   disable=not missing)  # fmt: skip

        def keep(found: _Outcomes) -> None:
            new = {name: one for name, one in found if isinstance(one, Reply)}
            failures.update({name: one for name, one in found if isinstance(one, _Failure)})
            cache.add(self._key, {
                _COUNT: ((float(self._calls),), ("",)),
                **{name: ((), (one.text, one.finish)) for name, one in new.items()},
            })
            replies.update(new)
            bar.update(len(new))

        with bar:
            self._send(missing, keep)
        replies |= {name: Reply("", REFUSED) for name, one in failures.items()
                    if one.kind == REFUSED and replies}  # fmt: skip
        if len(replies) < len(wanted):
            told = min(failures.values(), key=lambda one: one.kind)  # "fatal" before "lost"
            raise InstructMiningError(
                f"{len(wanted) - len(replies)} of {len(wanted)} requests to {self.model} at "
                f"{self.base_url} have no reply: {told.why}. What came is kept in {self.folder}: "
                "run again to go on")
        return replies

    def _send(self, missing: dict[str, Messages], keep: Callable[[_Outcomes], None]) -> None:
        """Send all; not the rest once the fault is no single request's.

        A worker takes no new request before its reply is on the disk: a process that is killed
        loses no more than it has workers.
        """
        came: SimpleQueue = SimpleQueue()
        stop, room = threading.Event(), threading.Semaphore(self.workers)
        in_a_row = 0

        def work(name: str) -> None:
            nonlocal in_a_row
            room.acquire()
            if stop.is_set():
                return
            one = self._outcome(missing[name], stop)
            with self._counting:
                in_a_row = in_a_row + 1 if isinstance(one, _Failure) else 0
                if in_a_row >= IN_A_ROW or getattr(one, "kind", "") == "fatal":
                    stop.set()
            came.put((name, one))

        left, pool = len(missing), ThreadPoolExecutor(self.workers)
        try:
            for name in missing:
                pool.submit(work, name)
            while left and not stop.is_set():
                found = [came.get(), *_there(came)]
                left -= len(found)
                keep(found)
                room.release(len(found))
        finally:  # also when it is stopped by hand: what is under way is waited for, and kept
            stop.set()
            room.release(self.workers)
            pool.shutdown(cancel_futures=True)
            keep(_there(came))

    def _outcome(self, messages: Messages, stop: threading.Event) -> Reply | _Failure:
        """One request, tried again with growing waits while the server is busy or unwell."""
        plain = [{"role": m["role"], "content": clean_text(m["content"])} for m in messages]
        found = _Failure("not sent: others failed before it", "lost")
        for attempt in range(TRIES):
            with self._counting:
                if self._calls >= self.budget:
                    return _Failure(f"the budget of {self.budget} calls is spent", "fatal")
                self._calls += 1
            found, wait = self._once(plain)
            if isinstance(found, Reply) or found.kind != "lost":
                break
            wait = max(wait, WAIT * 2**attempt * random.uniform(0.75, 1.25))
            if attempt + 1 == TRIES or stop.wait(min(wait, LONGEST_WAIT)):
                break
        return found

    def _once(self, messages: Messages) -> tuple[Reply | _Failure, float]:
        """One try, and the seconds that the server asks to wait."""
        create = self._client.chat.completions.with_raw_response.create
        try:
            answer = create(model=self.model, messages=messages, **self.options).http_response
            choice = answer.json()["choices"][0]
            text = choice["message"].get("content") or ""
            return Reply(self._without_key(text), str(choice.get("finish_reason") or "stop")), 0.0
        except (ValueError, LookupError, TypeError, AttributeError):
            return _Failure("what it sent is no chat completion", "lost"), 0.0
        except self._openai.APIStatusError as error:
            status = error.status_code
            why = self._without_key(f"HTTP {status}, {error.message}")[:300]
            if status in UNFIT:
                return _Failure(why, REFUSED), 0.0
            if status in BUSY or status >= 500:
                return _Failure(why, "lost"), _asked_wait(error.response.headers)
            if 300 <= status < 400:
                why = f"it sends on to another address (HTTP {status}); name that one as base_url"
            return _Failure(why, "fatal"), 0.0
        except self._openai.APIConnectionError as error:
            why = f"{error.message} {error.__cause__ or ''}".strip()
            return _Failure(self._without_key(why)[:300], "lost"), 0.0

    def _without_key(self, text: str) -> str:
        return text.replace(self._secret, "[key]") if self._secret else text


def _there(came: SimpleQueue) -> _Outcomes:
    """What has come, without waiting for more; only this thread takes from it."""
    return [came.get() for _ in range(came.qsize())]


def _secret() -> str:
    """The key of the environment, "" without one."""
    secret = os.environ.get(KEY, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        # told here: the HTTP client's own error would show the header, and so the key
        raise InstructMiningError(f"the environment variable {KEY} holds what is no key")
    return secret


def _checked(base_url: str) -> bool:
    """Whether the address is this machine's. Raises InstructMiningError for an unsafe one."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InstructMiningError(
            "base_url must be a plain address, without a name, a key or a query: it is written "
            f"into records. A key belongs into the environment variable {KEY}")
    if not host or parts.scheme not in ("http", "https"):
        raise InstructMiningError(f"base_url {base_url!r} is no address with http:// or https://")
    if parts.scheme == "http" and not local:
        raise InstructMiningError(
            f"base_url {base_url!r} would carry key and texts in clear over a network: take "
            "https, or a tunnel to a port of this machine")
    return local


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds of `retry-after-ms` or `retry-after`; 0 without one, or where it is a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
    return 0.0
