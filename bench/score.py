"""`instructmining score` as its own process on growing JSONL files: memory and time.

Model-free indicators; every row of a file is another one (where the source begins again, a number
is added to the instruction and the answer's words come in another order), so that no row is saved
by its hash, or dropped as a near copy.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import data
from .pairs import four, limit_row
from .peak import measured

LIMIT_GIB = 2.0  # peak memory of `score` on a million rows
LIMIT_SLOPE = 1.1  # of log seconds over log rows: 1 is in proportion
SIZES = (1000, 10_000, 100_000, 1_000_000)


def on_growing_files(sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """`score_rss_1m` and `score_linear`: peak memory, and time as rows grow tenfold."""
    found, origin = data.conversations(52_000)
    with tempfile.TemporaryDirectory() as folder:
        start_up = statistics.median(_once(folder, found, 1)[0] for _ in range(3))
        taken = [_once(folder, found, size) for size in sizes]
    peak = max(gib for _, gib in taken)
    seconds = {f"{n:,}": round(t, 2) for n, (t, _) in zip(sizes, taken, strict=True)}
    fitted = slope(sizes, [t for t, _ in taken], start_up)
    told = ", ".join(f"{n} rows {t} s" for n, t in seconds.items())
    about = {"on": f"{sizes[-1]:,} rows", "data": f"{origin} in a circle, every row another",
             "template": data.TEXT_TEMPLATE}
    return [
        limit_row("score_rss_1m", f"limit {LIMIT_GIB} GiB", peak, LIMIT_GIB, "GiB",
                  note="peak of the process `instructmining score FILE`", **about),
        {"bench": "score_linear", "peer": f"limit {LIMIT_SLOPE}; in proportion is 1",
         "ours": four(fitted), "theirs": LIMIT_SLOPE, "ratio": four(LIMIT_SLOPE / fitted),
         "unit": "slope of log seconds over log rows",
         "note": f"fitted from {sizes[1]:,} rows up, less a start-up of {start_up:.2f} s; {told}",
         **about},
    ]  # fmt: skip


def slope(sizes, seconds, start_up: float) -> float:
    """Least squares of log seconds, less the start-up, over log rows, without the first size.

    At the first size the start-up is most of the time, and its noise all of the rest.
    """
    rest = np.array(seconds[1:]) - start_up
    if (rest <= 0).any():
        raise ValueError(f"a start-up of {start_up} s is more than {seconds} s took")
    return float(np.polyfit(np.log(sizes[1:]), np.log(rest), 1)[0])


def write_rows(path: Path, found: list[list[dict]], size: int) -> None:
    """A JSONL file of `size` rows, all different."""
    with path.open("w", encoding="utf-8") as stream:
        for i, messages in enumerate(itertools.islice(itertools.cycle(found), size)):
            turn = i // len(found)
            prompt, answer = messages[0]["content"], messages[-1]["content"]
            if turn:
                words = answer.split()
                random.Random(i).shuffle(words)
                prompt, answer = f"{prompt} ({turn})", " ".join(words)
            record = {"instruction": prompt, "output": answer}
            stream.write(json.dumps(record) + "\n")


def _once(folder: str, found: list[list[dict]], size: int) -> tuple[float, float]:
    source = Path(folder) / f"{size}.jsonl"
    write_rows(source, found, size)
    taken = measured("-m", "instructmining", "score", source,
                     "-o", Path(folder) / "scores.parquet")  # fmt: skip
    source.unlink()
    return taken


BENCHES: dict[str, Callable[[], list[dict]]] = {
    "score_rss_1m": on_growing_files,
    "score_linear": on_growing_files,
}
