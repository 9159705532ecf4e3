"""`python -m bench [--only NAME]`: benchmarks against their peers, merged into results/bench.json.

Each file of this folder with a `BENCHES` table is found; a row of it is
{"bench", "peer", "ours", "theirs", "ratio", "unit"} and may say more. `ratio` above 1: ours is
better. What was measured before and is not run again is kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench.json"
GOALS = {
    "ppl_vs_file_order": 2.3,
    "ppl_vs_row": 2.0,
    "ppl_padding": 1.0,
    "unieval_vs_file_order": 1.7,
    "embed_vs_default": 2.0,
    "knn_vs_faiss": 0.8,
    "mtld_vs_lexicalrichness": 2.0,
    "score_rss_1m": 1.0,
    "sweep_vs_trainer": 5.0,
    "sweep_vs_trainer_tuned": 2.0,
    "sweep_matmul_share": 1.0,
}


def found_benches() -> dict[str, Callable[[], list[dict]]]:
    """Every benchmark of this folder by name; a file that cannot be imported stops the run."""
    table: dict[str, Callable[[], list[dict]]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("_"):
            continue
        table.update(getattr(importlib.import_module(f"bench.{module.name}"), "BENCHES", {}))
    return table


def machine() -> dict:
    """What the figures were measured on."""
    import torch
    import transformers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """`old` without the benches that `new` measured again, and `new`."""
    again = {row["bench"] for row in new}
    return sorted(
        [row for row in old if row["bench"] not in again] + new, key=lambda row: row["bench"]
    )


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; `ok` where the ratio reaches the goal."""
    head = ("bench", "peer", "ours", "theirs", "unit", "ratio", "goal")
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * 5 + "|"]
    for row in rows:
        goal = GOALS.get(row["bench"])
        known = goal is not None and row["ratio"] is not None
        mark = "" if not known else f"{goal} {'ok' if row['ratio'] >= goal else 'MISSED'}"
        cells = [row[key] for key in head[:-1]]
        lines.append("| " + " | ".join(map(str, [*cells, mark])) + " |")
    return "\n".join(lines)


def page(rows: list[dict]) -> str:
    """The table with the machine it was measured on, for the book."""
    seen = rows[-1].get("machine", {}) if rows else {}
    told = ", ".join(f"{key} {value}" for key, value in seen.items() if value is not None)
    return f"{table(rows)}\n\nMachine: {told}.\n"


def write(rows: list[dict], path: Path) -> list[dict]:
    """Merge `rows` into the file, written whole or not at all."""
    old = json.loads(path.read_text()) if path.exists() else []
    rows = merged(old, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1))
    part.replace(path)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks named (all, or those whose name starts with one of `--only`)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="a benchmark's name or its start; may be given again")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="run nothing; write the table of what was measured to a book page")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.page:
        options.page.write_text(page(json.loads(options.out.read_text())))
        return 0
    benches = found_benches()
    # A full name is that bench alone, though another's name may start with it.
    chosen = [name for name in benches if not options.only or name in options.only
              or any(name.startswith(o) for o in options.only if o not in benches)]
    if not chosen:
        print(f"No benchmark is called {options.only}; known: {sorted(benches)}", file=sys.stderr)
        return 2
    failed = []
    for name in chosen:
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows = benches[name]()
        except Exception as error:  # one bench without its peer must not hide the others
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        about = {"seconds": round(time.perf_counter() - start, 1), "machine": machine()}
        write([{**row, **about} for row in rows], options.out)
    if options.out.exists():
        print(table(json.loads(options.out.read_text())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
