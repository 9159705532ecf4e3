"""`python -m bench [--only NAME]`: benchmarks against their peers, merged into results/bench.json.

Each file of this folder with a `BENCHES` table is found; a row of it is
{"bench", "peer", "ours", "theirs", "ratio", "unit"} and may say more (`report`). `ratio` above 1:
ours is better. What was measured before and is not run again is kept. Benches that share their
measurements share a function, which is run once and gives the rows of all of them.
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

from bench.pairs import Skipped
from bench.report import details, empty_row, page, table, write

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench.json"
Bench = Callable[[], list[dict]]


def found_benches() -> dict[str, Bench]:
    """Every benchmark of this folder by name; a file that cannot be imported stops the run."""
    found: dict[str, Bench] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("_"):
            continue
        found.update(getattr(importlib.import_module(f"bench.{module.name}"), "BENCHES", {}))
    return found


def machine() -> dict:
    """What the figures were measured on."""
    import torch
    import transformers

    from instructmining_core.finetuning.run import hardware

    return {
        "processor": hardware("cpu")["processor"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measured(bench: Bench) -> list[dict]:
    """Its rows, with the machine, the seconds taken and the cores that others used meanwhile."""
    start, before = time.perf_counter(), _processor_seconds()
    rows = bench()
    seconds = time.perf_counter() - start
    others = max(0.0, _processor_seconds() - before) / seconds
    about = {"seconds": round(seconds, 1), "others": round(others, 2), "machine": machine()}
    return [{**about, **row} for row in rows]


def _processor_seconds() -> float:
    """Seconds that processors worked for other processes than this one and its children."""
    import psutil

    system, own = psutil.cpu_times(), os.times()
    busy = sum(getattr(system, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return busy - sum(own[:4])


def run(names: list[str], bench: Bench) -> list[dict]:
    """Rows of one bench function; a row that says why where it fails or cannot be run here."""
    try:
        return measured(bench)
    except Skipped as reason:
        print(f"  skipped: {reason}", file=sys.stderr)
        return [empty_row(name, skipped=str(reason)) for name in names]
    except Exception as error:  # one bench without its peer must not hide the others
        print(f"  failed: {type(error).__name__}: {error}", file=sys.stderr)
        why = f"{type(error).__name__}: {error}"
        return [empty_row(name, failed=why[:300]) for name in names]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks named (all, or those whose name starts with one of `--only`)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="a benchmark's name or its start; may be given again")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="run nothing; write the tables of what was measured to a book page")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(arguments)
    benches = found_benches()
    if options.page:
        options.page.write_text(page(json.loads(options.out.read_text()), benches))
        return 0
    # A full name is that bench alone, though another's name may start with it.
    chosen = [name for name in benches if not options.only or name in options.only
              or any(name.startswith(o) for o in options.only if o not in benches)]
    if not chosen:
        print(f"No benchmark is called {options.only}; known: {sorted(benches)}", file=sys.stderr)
        return 2
    functions: dict[Bench, list[str]] = {}
    for name in chosen:
        functions.setdefault(benches[name], []).append(name)
    failed = False
    for bench, names in functions.items():
        print(f"{', '.join(names)} ...", file=sys.stderr, flush=True)
        rows = run(names, bench)
        failed |= any(row.get("failed") for row in rows)
        write(rows, options.out)
    rows = json.loads(options.out.read_text())
    print(f"{table(rows)}\n\n{details(rows)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
