"""`score` of many rows against an earlier commit: `python -m bench.score_rows --rows 1000000`.

The commit's tree is put out beside this one (`git worktree`), and both score the same JSONL file in
turn, each in a process of its own, with the indicators that need no model. The least of the times
counts: what else the machine does only adds. Prints one JSON line; the exit status is 1 where the
limits on time or memory are not kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import data
from .peak import ROOT, measured
from .score import write_rows

LIMIT_TIME, LIMIT_GIB = 1.3, 0.5
PACKAGES = ("instructmining", "instructmining_core")  # the command moved from the second


def scored(tree: Path, source: Path) -> tuple[float, float]:
    """Seconds and peak GiB of `score` by the code of a tree."""
    package = next(name for name in PACKAGES if (tree / name).is_dir())
    out = source.with_suffix(".parquet")
    return measured("-m", package, "score", source, "-o", out, tree=tree)


def compared(rows: int, commit: str, repeats: int) -> dict:
    """Seconds and GiB of both, and the ratio of their least times."""
    found, origin = data.conversations(min(rows, 52_000))
    with tempfile.TemporaryDirectory() as folder:
        source, old = Path(folder) / "rows.jsonl", Path(folder) / "tree"
        write_rows(source, found, rows)
        del found
        subprocess.run(["git", "worktree", "add", "--detach", old, commit], cwd=ROOT, check=True,
                       capture_output=True)  # fmt: skip
        try:
            taken = [(scored(ROOT, source), scored(old, source)) for _ in range(repeats)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    ours, theirs = ([one[side][0] for one in taken] for side in (0, 1))
    return {
        "rows": rows, "data": f"{origin} in a circle, every row another", "against": commit,
        "seconds": [round(one, 1) for one in ours], "theirs": [round(one, 1) for one in theirs],
        "ratio": round(min(ours) / min(theirs), 3), "limit": LIMIT_TIME,
        "peak GiB": round(max(one[0][1] for one in taken), 3), "limit GiB": LIMIT_GIB,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.score_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--against", default="7804a24", metavar="COMMIT")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    row = compared(asked.rows, asked.against, asked.repeats)
    print(json.dumps(row))
    sys.exit(int(row["ratio"] > LIMIT_TIME or row["peak GiB"] > LIMIT_GIB))
