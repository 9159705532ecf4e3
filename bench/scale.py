"""Millions of rows on one machine: `python -m bench.scale --out book/_generated/scale.csv`.

`instructmining score` (the indicators that need no model) and `instructmining select` as processes
of their own on growing JSONL files, every row another one: seconds, peak memory, and the slope of
log seconds over log rows, less the start-up, as in `bench.score`. Files go when they are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from instructmining_core.files import write_atomic

from . import data
from .peak import measured
from .score import slope, write_rows

SIZES = (500_000, 1_000_000, 2_000_000, 5_000_000)
TOP = 10_000
RULE = {"len_out": -0.002, "compression": -0.1}  # log loss a word, and a unit of the ratio


def rule_card() -> dict:
    """A card that ranks by two columns; its numbers are made up, only the work is measured."""
    none = {"interval_these_sources": None, "interval_new_sources": None, "vif": None,
            "range": None}  # fmt: skip
    return {
        "schema": "instructmining.rule/1", "kind": "within", "intercept": 2.0,
        "coefficients": [{"name": name, "estimate": value, **none}
                         for name, value in RULE.items()],
        "standardisation": None, "held_out": [], "permutation_p": None, "models": [],
        "knn_reference": None, "fitted_on": "nothing", "not_for": "anything", "auto_size": None,
    }  # fmt: skip


def scale(sizes: Sequence[int] = SIZES, top: int = TOP) -> pd.DataFrame:
    """One row a command and size: command, rows, seconds, peak_gib, rows_a_second, slope.

    slope : over all sizes, the same in each row of a command; in proportion is 1
    """
    found, origin = data.conversations(52_000)
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        place = Path(folder)
        (place / "rule.json").write_text(json.dumps(rule_card()))
        small = _both(place, found, 100, 10)  # the start-up
        for size in tqdm(sizes, desc="scale"):
            for command, (seconds, gib) in _both(place, found, size, top).items():
                rows.append({"command": command, "rows": size, "seconds": round(seconds, 1),
                             "peak_gib": round(gib, 3),
                             "rows_a_second": round(size / seconds), "data": origin})  # fmt: skip
    table = pd.DataFrame(rows)
    for command, (start_up, _) in small.items():
        own = table["command"] == command
        # `slope` leaves out the first size, which here is as good as the others
        taken = [0.0, *table.loc[own, "seconds"]]
        table.loc[own, "slope"] = round(slope([1, *sizes], taken, start_up), 3)
    return table.sort_values(["command", "rows"], ignore_index=True)


def _both(place: Path, found, size: int, top: int) -> dict[str, tuple[float, float]]:
    """Seconds and peak GiB of the two commands on a file of so many rows."""
    source, scores = place / "rows.jsonl", place / "scores.parquet"
    write_rows(source, found, size)
    run = ("-m", "instructmining")
    taken = {
        "score": measured(*run, "score", source, "-o", scores, "--quiet"),
        "select": measured(*run, "select", scores, "--rule", place / "rule.json", "--top", top,
                           "-o", place / "best.jsonl", "--quiet"),
    }  # fmt: skip
    chosen = sum(1 for _ in (place / "best.jsonl").open())
    if chosen != top:
        raise RuntimeError(f"{chosen} of {top} rows were selected from {size}")
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    table = scale(asked.sizes)
    write_atomic(asked.out, table.to_csv(index=False))
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
