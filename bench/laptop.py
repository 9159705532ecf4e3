"""The laptop sweep against its limit, read from the ledger of the study itself.

The 129 finetunes take minutes and their stand-in models more, so the sweep is not run again for the
benchmark: a record says when its run was started and ended. The seconds are those from the first
start to the last end, as a user waits for them, with whatever else the machine did meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from instructmining_core.finetuning.ledger import Ledger, RunArchive

from .pairs import Skipped, limit_row

LIMIT_SECONDS = 360.0
RUNS = 129
LONGEST_PAUSE = 60.0  # seconds in which no run was at work; beyond it the sweep was interrupted
ROOT = Path(__file__).resolve().parent.parent


def laptop() -> list[dict]:
    """`sweep_laptop`, from `results/laptop` or, without it, from the committed evidence."""
    places = {"results/laptop/ledger": Ledger, "evidence/laptop/ledger": RunArchive}
    for place, reader in places.items():
        records = sweep_records(reader(ROOT / place).records().values())
        if len(records) >= RUNS:
            return [from_records(records, place)]
    raise Skipped(f"no ledger of the laptop study with its {RUNS} runs")


def sweep_records(records: Iterable[dict]) -> list[dict]:
    """The finished records of the sweep among those of a ledger."""
    return [r for r in records if r["spec"]["purpose"] == "sweep" and r["status"] == "done"]


def from_records(records: Sequence[dict], place: str) -> dict:
    """The row. Raises Skipped where the sweep was interrupted: its time is then no sweep's."""
    spans = sorted((_time(r["started"]), _time(r["ended"])) for r in records)
    latest, pause = spans[0][1], 0.0
    for begun, ended in spans:
        pause, latest = max(pause, begun - latest), max(latest, ended)
    if pause > LONGEST_PAUSE:
        raise Skipped(f"the laptop sweep in {place} was interrupted for {pause:.0f} s")
    seconds = latest - spans[0][0] + 1  # records tell whole seconds
    first, evals = records[0], records[0]["spec"]["evals"]
    made = {**first["hardware"], **{k: first["versions"][k] for k in ("python", "torch")}}
    return limit_row(
        "sweep_laptop", f"limit {LIMIT_SECONDS:.0f} s", seconds, LIMIT_SECONDS, "s",
        on=f"{len(records)} runs", data=f"the laptop study's sets, evaluated on {len(evals)}",
        dtype=first["spec"]["base"]["dtype"], seconds=None, others=None, machine=made,
        note=f"not run for the benchmark: first start ({first_of(records)}) to last end of the "
             f"records in {place}, of commit {str(first.get('commit'))[:7]}; what else the machine "
             "did then is not known",
    )  # fmt: skip


def first_of(records: Sequence[dict]) -> str:
    """When the first run was started."""
    return min(record["started"] for record in records)


def _time(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


BENCHES: dict[str, Callable[[], list[dict]]] = {"sweep_laptop": laptop}
