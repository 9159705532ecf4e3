"""Stand-in models, built on the spot from the embedded corpus and cached.

They take the place of LLaMA, OASST's reward model and UniEval where there is no network and no GPU,
and go through the same loading code. Each folder holds `STAND_IN.json`, so every output says that
it came from a stand-in.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from instructmining_core import files
from instructmining_core.config import InstructMiningError
from instructmining_core.data.tokenization import PLAIN
from instructmining_core.models.hub import MARKER

from .corpus import Corpus
from .tiny_models import (
    BaseConfig,
    RewardConfig,
    UniEvalConfig,
    build_base,
    build_reward,
    build_unieval,
    documents,
)
from .training import OnProgress

# Part of every stand-in's name: the number is raised when code changes what is built, and the base
# learns conversations in the plain template.
VERSION = f"1, {PLAIN}"
MAIN = ("base", "reward", "unieval")
LADDER = ("base_small", "base", "base_large")
UNTRAINED = "reward_untrained"  # the reward model before its first step: a baseline
PARTS = (*LADDER, "reward", "unieval", UNTRAINED)
CHECKED_SHARE = 0.06  # of the stand-ins' functions, kept to measure their accuracy


@dataclass(frozen=True)
class StandinConfig:
    """Shapes and training lengths of all stand-ins."""

    base: BaseConfig = BaseConfig()
    base_small: BaseConfig = BaseConfig(hidden=64, layers=3, heads=4, inner=176, steps=500)
    base_large: BaseConfig = BaseConfig(hidden=192, layers=5, heads=6, inner=512)
    reward: RewardConfig = RewardConfig()
    unieval: UniEvalConfig = UniEvalConfig()

    def of(self, part: str) -> BaseConfig | RewardConfig | UniEvalConfig:
        """The configuration of one part; InstructMiningError for a part that does not exist."""
        if part not in PARTS:
            raise InstructMiningError(f"Stand-in {part!r} is unknown; known: {', '.join(PARTS)}.")
        return replace(self.reward, steps=0) if part == UNTRAINED else getattr(self, part)


_TINY = dict(vocab=1024, hidden=32, layers=2, heads=2, inner=64)
SIZES = {
    "laptop": StandinConfig(),
    "smoke": StandinConfig(
        base=BaseConfig(**_TINY, context=128, steps=60),
        base_small=BaseConfig(**{**_TINY, "layers": 1}, context=128, steps=40),
        base_large=BaseConfig(**{**_TINY, "layers": 3}, context=128, steps=60),
        reward=RewardConfig(**_TINY, steps=40, pairs=16),
        unieval=UniEvalConfig(**_TINY, steps=40),
    ),
}


def longest_first(part: str) -> int:
    """Sorts parts by the time it takes to build them: side by side they then end together."""
    order = ("base_large", "base", "base_small", "reward", "unieval")
    return order.index(part) if part in order else len(order)


def key(corpus: Corpus, size: str, texts: Sequence[str] | None = None) -> str:
    """Hash of all that the stand-ins depend on: version, shapes, and corpus or texts."""
    digest = hashlib.sha256(VERSION.encode())
    digest.update(json.dumps(asdict(_config(size)), sort_keys=True).encode())
    digest.update(corpus.key.encode())
    for text in texts or ():
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:16]


def cached(corpus: Corpus, size: str, texts: Sequence[str] | None) -> Path:
    """The folder of the cache that holds the stand-ins of this corpus, size and text."""
    return files.cache() / "standins" / key(corpus, size, texts)


def build_cached(
    part: str, corpus: Corpus, size: str, texts: Sequence[str] | None, on_progress: OnProgress
) -> Path:
    """The folder of one cached stand-in, built first if it is not there.

    part : one of PARTS; texts : documents for the base model in place of the corpus's own
    Two processes that ask at once build once: the second waits.
    """
    root = cached(corpus, size, texts)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / f"{part}.lock")):
        if not (root / part / MARKER).exists():
            build(root, corpus, size, (part,), texts, on_progress)
    return root / part


def _untold(done: int, steps: int) -> None:
    """Nobody looks on."""


def build(
    folder: Path,
    corpus: Corpus,
    size: str,
    parts: Sequence[str],
    texts: Sequence[str] | None = None,
    on_progress: OnProgress = _untold,
) -> dict[str, dict]:
    """Build stand-ins into `folder/<part>/`, each whole or not at all.

    returns : part -> what its STAND_IN.json says (config, corpus, seconds, losses, accuracies)
    """
    config = _config(size)
    reports = {}
    for part in parts:
        own = config.of(part)
        unfinished = folder / f".{part}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        started = time.perf_counter()
        measured = _build_part(unfinished, part, corpus, own, texts, on_progress)
        reports[part] = {
            "stand_in": part, "note": "small, built on the spot, in place of a real model",
            "corpus": corpus.key, "config": asdict(own),
            "seconds": round(time.perf_counter() - started, 1), **measured,
        }  # fmt: skip
        (unfinished / MARKER).write_text(json.dumps(reports[part], indent=1))
        shutil.rmtree(folder / part, ignore_errors=True)
        unfinished.replace(folder / part)
    return reports


def _config(size: str) -> StandinConfig:
    if size not in SIZES:
        raise InstructMiningError(f"Stand-in size {size!r} is unknown; known: {', '.join(SIZES)}.")
    return SIZES[size]


def _build_part(folder: Path, part: str, corpus: Corpus,
                config: BaseConfig | RewardConfig | UniEvalConfig,
                texts: Sequence[str] | None, on_progress: OnProgress) -> dict:
    if part in LADDER:
        text = documents(corpus.split("base_text")) if texts is None else texts
        return build_base(folder, text, config, on_progress)
    learn, check = learn_and_check(corpus)
    builder = build_unieval if part == "unieval" else build_reward
    return builder(folder, learn, check, config, on_progress)


def learn_and_check(corpus: Corpus) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The stand-ins' rows in two: to learn from, and to check on; a function is in one of them."""
    rows = corpus.split("standin")
    if rows.empty:
        raise InstructMiningError("The corpus has no row of the stand-ins' libraries: install them")
    number = rows["symbol"].map(lambda s: int(hashlib.sha256(s.encode()).hexdigest()[:8], 16))
    checked = number % 10_000 < CHECKED_SHARE * 10_000
    # a defect needs a donor: a library with one checked function learns from it instead
    functions = rows["symbol"].where(checked).groupby(rows["source"]).transform("nunique")
    checked &= functions > 1
    return rows[~checked].reset_index(drop=True), rows[checked].reset_index(drop=True)


_LOOK = 0.5  # seconds between looks at the processes


def build_each(build: Callable[[str, OnProgress], object], parts: Sequence[str]) -> None:
    """Call `build(part, on_progress)` for each part, as many at a time as there are cores.

    build : a function of a module (it travels to the other processes by name)
    The matrix products are too short to be worth two threads each, so two processes of one thread
    build nearly twice as fast as one process of two, one after the other.
    Raises InstructMiningError naming the part and the exit status; what its process said is on
    stderr.
    """
    with tqdm(total=1.0, desc=f"stand-ins {', '.join(parts)}",
              bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:  # fmt: skip
        if len(parts) > 1 and _cores() > 1:
            _side_by_side(build, parts, bar)
            return
        for part in parts:
            build(part, lambda made, steps: bar.update(1 / steps / len(parts)))


def _side_by_side(build: Callable, parts: Sequence[str], bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, running = list(parts), {}
    done = {part: context.Array("q", [0, 0], lock=False) for part in parts}
    try:
        while waiting or running:
            while waiting and len(running) < _cores():
                part = waiting.pop(0)
                running[part] = context.Process(target=_work, args=(build, part, done[part]))
                running[part].start()
            time.sleep(_LOOK)
            for part in [p for p, process in running.items() if process.exitcode is not None]:
                status = running.pop(part).exitcode
                if status:
                    raise InstructMiningError(
                        f"building the stand-in {part!r} ended with {status}"
                    )
                done[part][:] = [1, 1]
            share = sum(made / steps if steps else 0 for made, steps in done.values())
            bar.update(share / len(parts) - bar.n)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _work(build: Callable, part: str, done) -> None:
    torch.set_num_threads(1)

    def told(made: int, steps: int) -> None:
        done[:] = [made, steps]

    build(part, told)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
