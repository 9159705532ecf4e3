"""Rows of results: merged into a file, told as tables for the terminal and the book.

A row has bench, peer, ours, theirs, ratio, unit, and may have: `on` (which size), data, dtype,
template, note, machine, others (cores that other processes used meanwhile), seconds, `goal` (in
place of the table's, None for none), `failed` (why it may not be believed), `skipped` (why it was
not measured).
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path

from instructmining_core.files import write_atomic

GOALS = {
    "ppl_vs_file_order": 2.3,
    "ppl_vs_row": 2.0,
    "ppl_padding": 1.0,
    "unieval_vs_file_order": 1.7,
    "embed_vs_default": 2.0,
    "knn_vs_faiss": 0.8,
    "knn_memory_1m": 1.0,
    "mtld_vs_lexicalrichness": 2.0,
    "score_rss_1m": 1.0,
    "score_linear": 1.0,
    "sweep_vs_trainer": 5.0,
    "sweep_vs_trainer_tuned": 2.0,
    "sweep_real_vs_trainer": 4.0,
    "sweep_real_vs_trainer_tuned": 2.3,
    "sweep_real_vs_all_layers": 3.0,
    "sweep_full_depth_vs_trainer_tuned": 1.5,
    "score_vs_wana": 3.5,
    "trunk_exact": 1.0,
    "sweep_matmul_share": 1.0,
    "sweep_laptop": 1.0,
    "ppl_gpu_matmul_share": 1.0,
}
HEAD = ("bench", "on", "ours", "theirs", "unit", "ratio")
DETAILS = ("bench", "on", "peer", "data", "dtype", "template", "note")


def empty_row(bench: str, **why: str) -> dict:
    """The row of a bench without figures; `why`: skipped or failed."""
    return {"bench": bench, "peer": "", "ours": None, "theirs": None, "ratio": None, "unit": "",
            **why}


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """`old` without the benches that `new` measured again, and `new`.

    What was only skipped now does not displace what was measured before.
    """
    measured = {row["bench"] for row in old if not row.get("skipped")}
    new = [row for row in new if not (row.get("skipped") and row["bench"] in measured)]
    again = {row["bench"] for row in new}
    return sorted(
        [row for row in old if row["bench"] not in again] + new, key=lambda row: row["bench"]
    )


def write(rows: list[dict], path: Path) -> list[dict]:
    """Merge `rows` into the file, written whole or not at all."""
    old = json.loads(path.read_text()) if path.exists() else []
    rows = merged(old, rows)
    write_atomic(path, json.dumps(rows, indent=1))
    return rows


def verdict(row: dict) -> str:
    """The goal and whether it is reached; "" where there is no goal and nothing went wrong."""
    if row.get("skipped"):
        return "not measured"
    goal = row.get("goal", GOALS.get(row["bench"]))
    if row.get("failed"):
        return "MISSED (not comparable)" if goal is None else f"{goal} MISSED (not comparable)"
    if goal is None or row["ratio"] is None:
        return ""
    return f"{goal} {'ok' if row['ratio'] >= goal else 'MISSED'}"


def table(rows: list[dict]) -> str:
    """The figures as a Markdown table; `ok` where the ratio reaches the goal."""
    cells = [[*(_cell(row.get(key)) for key in HEAD), verdict(row)] for row in rows]
    return _markdown([*HEAD, "goal"], cells, numbers=("ours", "theirs", "ratio"))


def details(rows: list[dict]) -> str:
    """What each figure was measured against, on what, and under which load."""
    letters = _machines(rows)
    cells = []
    for row in rows:
        note = "; ".join(str(row[key]) for key in ("failed", "skipped", "note") if row.get(key))
        own = {**row, "note": note}
        where = letters.get(json.dumps(row.get("machine"), sort_keys=True), "")
        cells.append([*(_cell(own.get(key)) for key in DETAILS), where, _cell(row.get("others"))])
    told = [f"- Machine {letter}: {_tell(json.loads(text))}" for text, letter in letters.items()]
    return "\n".join([_markdown([*DETAILS, "machine", "others"], cells), "", *told])


def page(rows: list[dict], known: Iterable[str] = ()) -> str:
    """Both tables, then what is missed and what was never measured, for the book.

    known : every bench there is; those without a row are listed as not measured
    """
    there = {row["bench"] for row in rows}
    missed = [_name(row) for row in rows if "MISSED" in verdict(row)]
    absent = [f"`{row['bench']}`: {row['skipped']}" for row in rows if row.get("skipped")]
    absent += [f"`{name}`: not run" for name in sorted(set(known) - there)]
    return "\n".join([
        table(rows), "", "Missed: " + (", ".join(missed) or "none") + ".", "",
        *(["Not measured:", "", *(f"- {line}" for line in absent)] if absent
          else ["Not measured: none."]),
        "", "How each was measured; `others` are the cores that other processes used meanwhile.",
        "", details(rows), "",
    ])  # fmt: skip


def _name(row: dict) -> str:
    on = f" ({row['on']})" if row.get("on") else ""
    return f"`{row['bench']}`{on}"


def _machines(rows: list[dict]) -> dict[str, str]:
    """Machine as JSON -> its letter, in the order of rows."""
    seen = dict.fromkeys(json.dumps(r["machine"], sort_keys=True) for r in rows if r.get("machine"))
    return dict(zip(seen, string.ascii_uppercase, strict=False))


def _tell(machine: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None) + "."


def _cell(value) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _markdown(head: list[str], cells: list[list[str]], numbers: Iterable[str] = ()) -> str:
    rule = ["--:" if name in numbers else "---" for name in head]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])
